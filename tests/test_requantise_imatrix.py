"""Quantising with an importance matrix: the bytes are those of llama.cpp's quantiser given the same matrix."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from imatrix import mean_squares, quantised_by_llama, sums_for, write_gguf, write_legacy
from jobs import main_job, npti
from tolerances import KL_FEW_BITS

from npti_export.errors import ModelError
from npti_export.export.gguf import strip
from npti_export.files import sha256_file
from npti_export.gguf.imatrix import read_imatrix
from npti_export.gguf.reader import read_gguf
from npti_export.gguf.requantise import (
    FILE_TYPES,
    IGNORE_MATRIX,
    NEED_MATRIX,
    matrix_sizes,
    parse_file_type,
    quantise_file,
)
from npti_export.job import Job, prepared, with_base
from npti_export.loader import Timings
from npti_export.progress import Silent
from npti_export.traits import parse_trait

KEYS = {"file": "m.gguf", "dataset": "calibration.txt", "entries_count": 14, "chunks_count": 30}
WHOLE = ("Q4_K_M", "IQ3_XXS", "IQ2_XS", "IQ1_S")  # types of which the whole job is run
DOWN = "blk.0.ffn_down.weight"


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def half(make_tiny):
    return make_tiny("F16", hidden=256, width=512, layers=2)


@pytest.fixture(scope="module")
def small(make_tiny):
    return make_tiny("F16", hidden=256, width=256, layers=1)


@pytest.fixture(scope="module")
def sums(half):
    return sums_for(read_gguf(half))


@pytest.fixture(scope="module")
def matrix(sums, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("matrix") / "m.gguf", sums)


@pytest.mark.parametrize("name", [name for name in FILE_TYPES if name not in (*IGNORE_MATRIX, *WHOLE)])
def test_the_bytes_of_llama_cpp(name, small, tmp_path):
    """For any number of threads and any buffer; and other ones without the matrix, where there can be none."""
    assert parse_file_type(name, matrix=True) == name
    sums = sums_for(read_gguf(small))
    read = read_imatrix(write_gguf(tmp_path / "m.gguf", sums))
    notes = Notes()
    quantise_file(small, tmp_path / "q.gguf", name, notes, threads=3, matrix=read)
    keys = KEYS | {"entries_count": 7}
    given = {"values": mean_squares(sums), "keys": keys, "threads": 1, "buffer": 1 << 16}
    expected = quantised_by_llama(small, tmp_path / "expected.gguf", name, **given)
    assert (tmp_path / "q.gguf").read_bytes() == expected.read_bytes()
    made = read_gguf(tmp_path / "q.gguf")
    assert made.get("general.file_type") == LlamaFileType["MOSTLY_" + name]
    assert {key: made.get(f"quantize.imatrix.{key}") for key in keys} == keys
    assert notes.notes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.gguf", "m.gguf", "q.gguf"]
    if name not in NEED_MATRIX:
        plain = quantised_by_llama(small, tmp_path / "plain.gguf", name, None, {})
        assert not np.array_equal(weights(plain)[DOWN], weights(expected)[DOWN])


def weights(path):
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", IGNORE_MATRIX)
def test_types_to_which_a_matrix_means_nothing(name, half, sums, tmp_path):
    """So it is refused: llama.cpp writes the same weights with it."""
    plain = weights(quantised_by_llama(half, tmp_path / "plain.gguf", name, None, {}))
    weighed = weights(quantised_by_llama(half, tmp_path / "q.gguf", name, mean_squares(sums), KEYS))
    assert all(np.array_equal(plain[tensor], weighed[tensor]) for tensor in plain)
    with pytest.raises(ModelError, match=f"{name}: takes no heed of an importance matrix; .* take one of IQ1_S, "):
        parse_file_type(name, matrix=True)


def test_the_same_from_a_legacy_file(half, sums, tmp_path):
    read = read_imatrix(write_legacy(tmp_path / "m.dat", sums))
    quantise_file(half, tmp_path / "q.gguf", "Q3_K_M", Silent(), matrix=read)
    made = read_gguf(tmp_path / "q.gguf")
    assert made.get("quantize.imatrix.file") == "m.dat"
    values = {name: read.importance([name])[name] for name in sums}
    assert all(np.allclose(values[name], one, rtol=1e-6) for name, one in mean_squares(sums).items())
    expected = quantised_by_llama(half, tmp_path / "e.gguf", "Q3_K_M", values, KEYS | {"file": "m.dat"})
    assert (tmp_path / "q.gguf").read_bytes() == expected.read_bytes()


def write_mixture(path, experts=3, hidden=256, width=256):
    """As much of a mixture of experts as llama.cpp's quantiser asks for."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    for stem in ("gate", "up", "down"):
        values = rng.normal(size=(experts, width, hidden)).astype(np.float16)
        writer.add_tensor(f"blk.0.ffn_{stem}_exps.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_each_expert_has_a_matrix_of_its_own(tmp_path):
    """One of them was never chosen."""
    mixture = write_mixture(tmp_path / "moe.gguf")
    header = read_gguf(mixture)
    sums, name = sums_for(header), "blk.0.ffn_up_exps.weight"
    sums[name][1][1] = 0
    assert matrix_sizes(header)[name] == 3 * 256
    read = read_imatrix(write_gguf(tmp_path / "m.gguf", sums))
    read.check_for(matrix_sizes(header), "moe")
    quantise_file(mixture, tmp_path / "q.gguf", "IQ3_XXS", Silent(), matrix=read)
    values, keys = mean_squares(sums), KEYS | {"entries_count": 3}
    expected = quantised_by_llama(mixture, tmp_path / "e.gguf", "IQ3_XXS", values, keys)
    assert (tmp_path / "q.gguf").read_bytes() == expected.read_bytes()
    values[name] = np.roll(values[name], 256)  # each to the next expert
    other = weights(quantised_by_llama(mixture, tmp_path / "o.gguf", "IQ3_XXS", values, keys))[name]
    same = [np.array_equal(one, two) for one, two in zip(other, weights(expected)[name], strict=True)]
    assert same == [False] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="no locks by which a leftover is known")
def test_what_a_killed_job_left_goes_with_the_next(small, tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from npti_export.gguf import requantise
from npti_export.gguf.imatrix import read_imatrix
from npti_export.progress import Silent
requantise.run_captured = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
half, target, matrix = map(Path, sys.argv[1:])
requantise.quantise_file(half, target, "IQ3_XXS", Silent(), matrix=read_imatrix(matrix))
"""
    matrix, target = write_gguf(tmp_path / "m.gguf", sums_for(read_gguf(small))), tmp_path / "q.gguf"
    assert subprocess.run([sys.executable, "-c", program, small, target, matrix]).returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path != matrix)
    assert [path.name for path in left.iterdir()] == ["importance.safetensors"]
    quantise_file(small, target, "IQ3_XXS", Silent(), matrix=read_imatrix(matrix))
    assert sorted(tmp_path.iterdir()) == [matrix, target]


def test_a_tensor_without_an_entry(half, tmp_path):
    """llama.cpp's own words where the type needs one, else a note."""
    read = read_imatrix(write_gguf(tmp_path / "m.gguf", sums_for(read_gguf(half), without=[DOWN])))
    with pytest.raises(
        ModelError, match=f"to IQ3_XXS: .*Missing importance matrix for tensor {DOWN} in a very low-bit"
    ):
        quantise_file(half, tmp_path / "q.gguf", "IQ3_XXS", Silent(), matrix=read)
    notes = Notes()
    quantise_file(half, tmp_path / "q.gguf", "Q4_K_M", notes, matrix=read)
    assert notes.notes == [f"m.gguf has nothing about {DOWN}: quantised without"]


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_job(name, small, cli_environment, tmp_path):
    """The base that the steered file gives back is what llama.cpp makes with the matrix."""
    sums = sums_for(read_gguf(small))
    matrix = write_gguf(tmp_path / "m.gguf", sums)
    # what few bits lose grows with the rule's effect
    limit = ["--gamma", "0.5", "--set", f"verify.kl_limit_quantised={KL_FEW_BITS[name]}"] if name in KL_FEW_BITS else []
    arguments = ["--requantize", name.lower(), "--imatrix", matrix, "--report", "report.json", *limit]
    done = npti(*main_job(small, "model.gguf", *arguments), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "m.gguf", "model.gguf", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fidelity"]["kl_rule_base"] > 2 * report["fidelity"]["kl_rule_artifact"]
    assert read_gguf(tmp_path / "model.gguf").get("quantize.imatrix.file") == "m.gguf"
    expected = quantised_by_llama(small, tmp_path / "e.gguf", name, mean_squares(sums), KEYS | {"entries_count": 7})
    strip(tmp_path / "model.gguf", tmp_path / "base.gguf", force=False)
    assert (tmp_path / "base.gguf").read_bytes() == expected.read_bytes()
    assert report["artifact"]["base_sha256"] == sha256_file(expected)
    if name not in NEED_MATRIX:
        plain = quantised_by_llama(small, tmp_path / "plain.gguf", name, None, {})
        assert sha256_file(plain) != sha256_file(expected)


def test_bases_with_and_without_are_kept_apart(half, sums, matrix, tmp_path):
    """An identification is kept by the bytes of its base: the same for the same matrix elsewhere, else others."""

    def digest(imatrix):
        job = Job((parse_trait("calm"),), tmp_path / "o.gguf", model=str(half), requantize="Q4_K_M", imatrix=imatrix)
        with prepared(job) as asked, with_base(asked, Silent(), Timings()) as ready:
            assert ready.source.digest == sha256_file(ready.base.path)
            return ready.source.digest

    (tmp_path / "elsewhere").mkdir()
    copy = write_gguf(tmp_path / "elsewhere" / "m.gguf", sums)
    other = write_gguf(tmp_path / "m.gguf", sums_for(read_gguf(half), seed=1))
    assert digest(matrix) == digest(copy)
    assert len({digest(matrix), digest(None), digest(other)}) == 3


REFUSED = [
    (["--imatrix", "m.gguf"], "--imatrix weighs what --requantize TYPE rounds; give a type, or leave --imatrix out"),
    (["--imatrix", "m.gguf", "--model", "F16"], "give a type, or leave --imatrix out"),
    (["--imatrix", "m.gguf", "--requantize", "Q4_K_M"], "is quantised already"),
    (["--imatrix", "m.gguf", "--requantize", "Q8_0", "--model", "F16"], "takes no heed of an importance matrix"),
    (
        ["--requantize", "IQ2_XS", "--model", "F16"],
        "needs an importance matrix; give the model's own by --imatrix FILE",
    ),
    (["--imatrix", "none.gguf", "--requantize", "IQ2_XS", "--model", "F16"], "none.gguf: there is no such file"),
    (["--imatrix", "half.gguf", "--requantize", "IQ2_XS", "--model", "F16"], "half.gguf: tensor blk.1"),
    (["--imatrix", "m.gguf", "--requantize", "IQ2_XS", "--model", "other"], f"({DOWN}: 512 columns, not 256"),
    (
        ["--imatrix", "m.gguf", "--format", "peft", "--model", "F16"],
        "--imatrix weighs what --requantize rounds; it goes",
    ),
    (["--imatrix", "m.gguf", "--out", "m.gguf", "--force", "--requantize", "IQ2_XS", "--model", "F16"], "is an input"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_bad_input(arguments, says, half, small, matrix, cli_environment, tmp_path):
    data = matrix.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data)
    (tmp_path / "half.gguf").write_bytes(data[:-4000])
    places = {"F16": half, "other": small}
    arguments = [places.get(one, one) for one in arguments]
    if "--out" not in arguments:
        arguments += ["--out", "o"]
    done = npti("--trait", "calm", *arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.gguf", "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == data
