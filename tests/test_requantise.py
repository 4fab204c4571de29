"""Quantising a float GGUF by llama.cpp's quantiser before the job goes on with it."""

import json
import math
import os
import shutil

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from jobs import main_job, npti

from npti_export.base_file import made_base, plan_base
from npti_export.errors import DiskFullError, ModelError
from npti_export.export.gguf import check_base
from npti_export.files import sha256_file
from npti_export.gguf import requantise
from npti_export.gguf.blocks import decode, type_name
from npti_export.gguf.reader import read_gguf
from npti_export.gguf.requantise import (
    FILE_TYPES,
    NEED_MATRIX,
    check_float,
    parse_file_type,
    quantise_file,
    quantised_name,
)
from npti_export.job import Job, prepared, with_base
from npti_export.loader import Timings
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.traits import parse_trait

SIZES = {"hidden": 256, "width": 512}  # K-quants have blocks of 256


@pytest.fixture(scope="module")
def half(make_tiny):
    return make_tiny("F16", **SIZES)


class Steps(Silent):
    def __init__(self):
        self.total = self.done = 0

    def start(self, stage, total):
        self.total = total

    def advance(self, steps, tokens=0):
        self.done += steps


@pytest.mark.parametrize("name", [name for name in FILE_TYPES if name not in NEED_MATRIX])
def test_every_type(name, half, tmp_path):
    """The enumeration of gguf-py, which is not ours, says what number a name has; the file can be baked."""
    progress = Steps()
    quantise_file(half, tmp_path / "q.gguf", name, progress)
    made = read_gguf(tmp_path / "q.gguf")
    assert made.get("general.file_type") == LlamaFileType["MOSTLY_" + name]
    assert progress.done == progress.total == len(made.tensors)
    kinds = {type_name(made.require_tensor(f"blk.{layer}.ffn_gate.weight").type_id) for layer in range(3)}
    assert kinds == {FILE_TYPES[name][1]}
    check_base(made)
    assert gguf_source(made.path).fingerprint == gguf_source(half).fingerprint
    bits = requantise.least_bytes(requantise.matrix_elements(made), name)
    assert bits <= sum(tensor.nbytes for tensor in made.tensors)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_are_those_of_gguf_py(name, half, tmp_path):
    quantise_file(half, tmp_path / "q.gguf", name, Silent())
    weights = {tensor.name: tensor for tensor in GGUFReader(half).tensors}
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "q.gguf").tensors}
    for layer in range(3):
        for stem in ("ffn_gate", "ffn_up", "ffn_down"):
            place = f"blk.{layer}.{stem}.weight"
            expected = gguf.quants.quantize(weights[place].data.astype(np.float32), GGMLQuantizationType[name])
            assert np.array_equal(found[place].data, expected), place


def test_a_k_quant_is_near_the_weights(half, tmp_path):
    quantise_file(half, tmp_path / "q.gguf", "Q4_K_M", Silent())
    weights = {tensor.name: tensor for tensor in GGUFReader(half).tensors}
    for tensor in read_gguf(tmp_path / "q.gguf").tensors:
        if "ffn_gate" in tensor.name:
            raw = np.fromfile(tmp_path / "q.gguf", np.uint8, tensor.nbytes, offset=tensor.offset)
            values = decode(raw.reshape(tensor.rows, tensor.row_bytes), tensor.type_id)
            truth = weights[tensor.name].data.astype(np.float32)
            error = np.linalg.norm(values - truth) / np.linalg.norm(truth)
            assert 0.01 < error < 0.1  # 4 bits of a normal distribution: 0.076 measured for Q4_K


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS"])
def test_the_same_bytes_each_time_and_for_any_number_of_threads(name, half, tmp_path):
    found = set()
    for threads in (1, 1, 3):
        quantise_file(half, tmp_path / "q.gguf", name, Silent(), threads=threads)
        found.add(sha256_file(tmp_path / "q.gguf"))
    assert len(found) == 1
    assert found != {sha256_file(half)}


@pytest.mark.parametrize("name", NEED_MATRIX)
def test_llama_cpp_itself_wants_a_matrix_for_those_that_are_refused(name, half, tmp_path):
    with pytest.raises(ModelError, match=r"this quantization requires an imatrix!.*exit code 1"):
        quantise_file(half, tmp_path / "q.gguf", name, Silent())


def test_names():
    assert [parse_file_type(text) for text in ("q4_k_m", " Q4_K", "q5_k", "iq4_xs", "bf16")] == [
        "Q4_K_M", "Q4_K_M", "Q5_K_M", "IQ4_XS", "BF16",
    ]  # fmt: skip
    assert quantised_name("model.gguf", "Q4_K_M") == "model-Q4_K_M.gguf"
    assert quantised_name("Llama-3.2-1B-Instruct-BF16.gguf", "Q8_0") == "Llama-3.2-1B-Instruct-Q8_0.gguf"
    assert quantised_name("a.fp16.gguf", "Q8_0") == "a-Q8_0.gguf"
    assert quantised_name("half16.gguf", "Q8_0") == "half16-Q8_0.gguf"
    assert len(os.fsencode(quantised_name("é" * 120 + ".gguf", "Q8_0"))) <= 255


BAD = [
    ("Q9_Z", "is no type of llama.cpp's quantiser; take one of Q2_K, "),
    ("iq2_xxs", "needs an importance matrix; give the model's own by --imatrix FILE, or take one of Q2_K, "),
    ("TQ1_0", "no extra neurons"),
    ("f32", "no more exact"),
]


@pytest.mark.parametrize(("name", "says"), BAD)
def test_bad_types(name, says):
    with pytest.raises(ModelError, match=says) as caught:
        parse_file_type(name)
    assert "Q4_K_M, " in str(caught.value)


def test_what_is_quantised_or_of_the_type_already(make_tiny, half):
    with pytest.raises(ModelError, match=r"is quantised already \(blk.0.attn_q.weight is Q4_1\)"):
        check_float(read_gguf(make_tiny("Q4_1")), "Q8_0")
    check_float(read_gguf(half), "F16")  # the tiny models' embeddings are F32
    with pytest.raises(ModelError, match="is F32 already"):
        check_float(read_gguf(make_tiny()), "F32")


def plan(path, kind):
    return plan_base(gguf_source(path), read_gguf(path), converter=None, requantize=kind, trust_remote_code=False)


def test_no_room_is_known_before_the_first_byte(half, tmp_path, monkeypatch):
    needed = plan(half, "Q8_0").nbytes
    elements = 3 * (256 * 512 * 3 + 256 * 256 * 3) + 1024 * 256
    assert needed == 2 * elements * 34 // 32
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(needed, 1, needed - 1))
    with (
        pytest.raises(DiskFullError, match="only"),
        made_base(plan(half, "Q8_0"), tmp_path / "o.gguf", Silent(), Timings()),
    ):
        pass
    assert not any(tmp_path.iterdir())


def test_weights_that_cannot_be_quantised_leave_nothing_behind(half, tmp_path):
    """One weight is not a number; llama.cpp says so, and its words reach the user."""
    broken = tmp_path / "broken.gguf"
    shutil.copy(half, broken)
    tensor = read_gguf(broken).require_tensor("blk.1.ffn_up.weight")
    with broken.open("rb+") as stream:
        stream.seek(tensor.offset)
        stream.write(np.float16(math.nan).tobytes())
    with (
        pytest.raises(ModelError, match=r"it to Q8_0: .*nan value.* has invalid data"),
        made_base(plan(broken, "Q8_0"), tmp_path / "o.gguf", Silent(), Timings()),
    ):
        raise AssertionError("was made all the same")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.fixture(scope="module")
def shallow(make_tiny):
    """What random layers round, later random layers make more of: with one, a file is 0.2 to 0.35 of its limit away."""
    return make_tiny("F16", layers=1, **SIZES)


@pytest.fixture(scope="module")
def steered(shallow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    environment = {**os.environ, "NPTI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = main_job(shallow, "model.gguf", "--requantize", "q4_k_m", "--report", "report.json")
    done = npti(*arguments, environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, environment, done


def test_the_job_goes_on_with_the_quantised_file(steered, shallow, tmp_path):
    from npti_export.export.gguf import strip

    folder, _, done = steered
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "model.gguf", "report.json"]
    assert "llama_model_quantize" not in done.stderr
    made = read_gguf(folder / "model.gguf")
    assert made.get("npti.base.name") == "tiny-Q4_K_M.gguf"
    report = json.loads((folder / "report.json").read_text())
    assert report["seconds"]["quantise"] > 0
    assert report["fidelity"]["kl_rule_base"] > 2 * report["fidelity"]["kl_rule_artifact"]
    quantise_file(shallow, tmp_path / "q.gguf", "Q4_K_M", Silent())
    assert strip(folder / "model.gguf", tmp_path / "base.gguf", force=False) == sha256_file(tmp_path / "q.gguf")
    assert report["artifact"]["base_sha256"] == sha256_file(tmp_path / "q.gguf")


def test_the_identification_is_kept_for_the_same_weights_wherever_they_are(steered, shallow, tmp_path):
    folder, environment, _ = steered
    shutil.copy(shallow, tmp_path / "copy.gguf")
    more = ["--requantize", "Q4_K_M", "--gamma", "0.9"]
    again = npti(*main_job("copy.gguf", "again.gguf", *more), environment=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from 3 finished batches" in again.stderr
    assert len(list((folder / "cache" / "identify").glob("*.safetensors"))) == 1


REFUSED = [
    (["--requantize", "Q8_0", "--format", "peft"], "--requantize quantises the GGUF to bake into"),
    (["--requantize", "nonsense"], "is no type of llama.cpp's quantiser"),
    (["--requantize", "Q8_0"], "is quantised already"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_bad_input(arguments, says, cli_environment, tmp_path):
    done = npti("--trait", "calm", "--out", "o", *arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_base_is_quantised_for_baking_only_and_the_model_stays(half, make_tiny, tmp_path):
    model = make_tiny(**SIZES)  # the same weights in F32
    job = Job((parse_trait("calm"),), tmp_path / "o.gguf", model=str(model), base=half, requantize="Q8_0")
    with prepared(job) as asked, with_base(asked, Silent(), Timings()) as ready:
        assert ready.source == asked.source
        assert ready.base.path.name == "tiny-Q8_0.gguf"
        assert gguf_source(ready.base.path).fingerprint == ready.source.fingerprint
    job = Job((parse_trait("calm"),), tmp_path / "o.gguf", model=str(half), requantize="Q8_0")
    with prepared(job) as asked, with_base(asked, Silent(), Timings()) as ready:
        assert ready.source.path == ready.base.path
        assert ready.source.digest == sha256_file(ready.base.path)
    assert not any(tmp_path.iterdir())
