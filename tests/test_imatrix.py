"""Reading importance matrices, of both kinds that llama.cpp has written, and refusing what is none."""

import os
import random
import re
import struct
import tracemalloc

import fuzz_mutations
import fuzz_seeds
import numpy as np
import pytest
from imatrix import CHUNK, mean_squares, write_gguf, write_legacy

from npti_export.errors import GGUFError, ModelError, NptiError
from npti_export.files import sha256_file
from npti_export.gguf.imatrix import read_imatrix

DOWN, UP = "blk.0.ffn_down.weight", "blk.0.ffn_up_exps.weight"


@pytest.fixture
def sums():
    """A plain tensor, and one of three experts of which one was never chosen."""
    rng = np.random.default_rng(0)
    return {
        DOWN: (rng.gamma(0.5, 1e4, (1, 8)).astype(np.float32), np.array([7 * CHUNK])),
        UP: (rng.gamma(0.5, 1e4, (3, 4)).astype(np.float32), np.array([100, 0, 3 * CHUNK + 1])),
    }


def test_the_gguf_kind(sums, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", sums, more=[(f"{DOWN}.in_sum", np.ones(8, np.float32))])
    read = read_imatrix(path)
    assert read.digest == sha256_file(path)
    assert read.metadata == {
        "quantize.imatrix.file": "m.gguf",
        "quantize.imatrix.dataset": "calibration.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 30,
    }
    found, expected = read.importance([DOWN, UP, "output.weight"]), mean_squares(sums)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values), name
    assert np.array_equal(found[UP][4:8], np.ones(4))


def test_the_legacy_kind(sums, tmp_path):
    path = write_legacy(tmp_path / "m.dat", sums)
    read = read_imatrix(path)
    assert list(read.metadata.values()) == ["m.dat", "calibration.txt", 2, 30]
    found = read.importance([DOWN, UP])
    for name, (values, counts) in sums.items():
        calls = np.float32(-(-int(counts.max()) // CHUNK))
        stored = np.where(counts[:, None] == 0, 1, values / np.maximum(counts, 1)[:, None]) * calls
        assert np.array_equal(found[name], stored.astype(np.float32).ravel() / calls), name
    assert np.allclose(found[DOWN], mean_squares(sums)[DOWN], rtol=1e-6)  # a few roundings of float32


def test_what_may_be_missing(sums, tmp_path):
    for number, ending in enumerate([{"chunks": None, "dataset": None}, {"dataset": None}, {"dataset": b""}]):
        read = read_imatrix(write_legacy(tmp_path / f"{number}.dat", sums, **ending))
        assert (read.dataset, read.chunks) == (None, 0 if number == 0 else 30)
    path = write_gguf(tmp_path / "m.gguf", sums, chunks=0)
    file = fuzz_seeds.take_apart(path.read_bytes())
    file.entry(b"imatrix.datasets").raw = struct.pack("<IQ", fuzz_seeds.STRING, 0)  # which gguf-py leaves out
    path.write_bytes(file.encode())
    read = read_imatrix(path)
    assert read.metadata == {"quantize.imatrix.file": "m.gguf", "quantize.imatrix.entries_count": 2}


def test_a_legacy_entry_of_no_chunks_is_taken_as_it_is(tmp_path):
    name = DOWN.encode()
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii2f", 0, 2, 3.0, 0.5)
    (tmp_path / "m.dat").write_bytes(data)
    assert read_imatrix(tmp_path / "m.dat").importance([DOWN])[DOWN].tolist() == [3.0, 0.5]


def test_counts_are_rounded_as_lround_does(sums, tmp_path):
    sums[UP] = (np.full((3, 4), 6, np.float32), np.array([0.4, 1.5, 2.5]))
    found = read_imatrix(write_gguf(tmp_path / "m.gguf", sums)).importance([UP])[UP]
    assert found.tolist() == [1.0] * 4 + [3.0] * 4 + [2.0] * 4


def test_names_are_cut_as_llama_quantize_cuts_them_but_not_within_a_character(sums, tmp_path):
    read = read_imatrix(write_gguf(tmp_path / ("é" * 100 + ".gguf"), sums, datasets=["a" + "é" * 100, "other"]))
    assert list(read.metadata.values())[:2] == ["é" * 63, "a" + "é" * 63]


def damaged(sums, change):
    """Arguments of write_gguf, changed."""
    given = {"sums": dict(sums)}
    change(given)
    return given


def _values(name, place, value):
    def change(given):
        values, counts = (np.array(one, np.float32) for one in given["sums"][name])
        (values if place == 0 else counts).ravel()[1 if name == UP else 0] = value
        given["sums"][name] = values, counts

    return change


DAMAGE = [
    (_values(DOWN, 0, np.nan), f"{DOWN} has a value that is negative or not finite"),
    (_values(DOWN, 0, np.inf), f"{DOWN} has a value that is negative or not finite"),
    (_values(UP, 0, -1.0), f"{UP} has a value that is negative or not finite"),
    (_values(UP, 1, np.nan), f"{UP}.counts has a value that is no number of tokens"),
    (_values(UP, 1, -1), f"{UP}.counts has a value that is no number of tokens"),
    (_values(UP, 1, 1e30), f"{UP}.counts has a value that is no number of tokens"),
    (lambda given: given["sums"].update({UP: (np.ones((3, 4), np.float32), np.ones(2))}), "12 sums .* 2 counts"),
    (lambda given: given["sums"].update({UP: (np.ones((3, 4), np.float32), np.ones(4))}), "in 3 rows .* 4 counts"),
    (lambda given: given.update(more=[("x.in_sum2", np.ones(4, np.float32))]), "x.in_sum2 without its other half"),
    (lambda given: given.update(more=[("x.counts", np.ones(1, np.float32))]), "x.counts without its other half"),
    (
        lambda given: given.update(more=[(f"x.{one}", np.ones(4, np.float16)) for one in ("in_sum2", "counts")]),
        "the sums and counts of x are not F32",
    ),
    (lambda given: given.update(datasets=["a\nb"]), r"data set, 'a\\nb', cannot be"),
    (lambda given: given.update(datasets=["x" * 5000]), "data set, 'xxx.*…, cannot be"),
    (lambda given: given.update(datasets=[1, 2]), "imatrix.datasets is missing or no list of names"),
    (lambda given: given.update(chunks=1 << 31), "imatrix.chunk_count is missing or not a uint32 below"),
    (lambda given: given.update(sums={}), "has 0 entries"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_ggufs(number, sums, tmp_path):
    change, says = DAMAGE[number]
    path = write_gguf(tmp_path / "m.gguf", **damaged(sums, change))
    with pytest.raises(ModelError, match=says) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value)


def test_ggufs_with_another_structure(sums, tmp_path, tiny):
    data = write_gguf(tmp_path / "m.gguf", sums).read_bytes()

    def refused(change, says):
        file = fuzz_seeds.take_apart(data)
        change(file)
        (tmp_path / "x.gguf").write_bytes(file.encode())
        with pytest.raises(ModelError, match=says):
            read_imatrix(tmp_path / "x.gguf")

    for key in (b"imatrix.datasets", b"imatrix.chunk_count", b"imatrix.chunk_size"):
        refused(lambda file, key=key: file.entries.remove(file.entry(key)), f"{key.decode()} is missing")
    refused(lambda file: setattr(file.entry(b"imatrix.chunk_size"), "kind", 5), "imatrix.chunk_size is missing or not")
    refused(lambda file: file.entries.remove(file.entry(b"general.type")), "no importance matrix")
    refused(lambda file: file.tensors.append(file.tensors[0]), "occurs twice")
    refused(lambda file: setattr(file.tensors[0], "shape", [2**40]), "outside the file")
    refused(lambda file: setattr(file, "data", file.data[:16]), "truncated")
    with pytest.raises(ModelError, match="is a GGUF, but no importance matrix"):
        read_imatrix(tiny)


def test_legacy_files_cut_anywhere_are_refused(sums, tmp_path):
    path = write_legacy(tmp_path / "m.dat", sums)
    data = path.read_bytes()
    entries = len(write_legacy(tmp_path / "n.dat", sums, None, None).read_bytes())
    for end in range(len(data)):
        path.write_bytes(data[:end])
        if end in (entries, entries + 4):  # without a data set, or the number of chunks
            assert len(read_imatrix(path).entries) == 2
            continue
        with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: ends within .* is truncated"):
            read_imatrix(path)


NAME = struct.pack("<i", len(DOWN)) + DOWN.encode()
ONE = NAME + struct.pack("<ii2f", 3, 2, 3.0, 0.5)
LEGACY = [
    (struct.pack("<i", 0) + ONE, "the number of entries is 0"),
    (struct.pack("<i", -1) + ONE, "the number of entries is -1"),
    (b"%PDF-1.7 and so on, for as long as it takes", "the number of entries is .* no importance matrix"),
    (struct.pack("<i", 2) + ONE + ONE, f"{DOWN} occurs twice"),
    (struct.pack("<ii", 1, -5) + ONE, "the length of entry 1 of 1's name is -5"),
    (struct.pack("<ii", 1, 1 << 30) + ONE, "the length of entry 1 of 1's name is 1073741824"),
    (struct.pack("<ii2s", 1, 2, b"\xff\xfe") + ONE, "the name of entry 1 of 1 is no text"),
    (struct.pack("<ii2s", 1, 2, b"a\x1b") + ONE, "the name of entry 1 of 1 is no text"),
    (struct.pack("<i", 1) + NAME + struct.pack("<ii", -1, 2), f"the number of chunks of {DOWN} is -1"),
    (struct.pack("<i", 1) + NAME + struct.pack("<ii", 1, 0), f"the number of values of {DOWN} is 0"),
    (struct.pack("<i", 1) + NAME + struct.pack("<ii", 1, 2**31 - 1), f"the number of values of {DOWN} is 2147483647"),
    (struct.pack("<i", 1) + NAME + struct.pack("<ii2f", 1, 2, 1.0, float("nan")), "negative or not finite"),
    (struct.pack("<i", 1) + NAME + struct.pack("<ii2f", 1, 2, -1.0, 1.0), "negative or not finite"),
    (struct.pack("<i", 1) + ONE + struct.pack("<i", -3), "the number of chunks is -3"),
    (struct.pack("<i", 1) + ONE + struct.pack("<ii", 3, -1), "the length of its data set's name is -1"),
    (struct.pack("<i", 1) + ONE + struct.pack("<ii2s", 3, 2, b"\xff\xff"), "the name of its data set is no text"),
    (struct.pack("<i", 1) + ONE + struct.pack("<ii2s", 3, 1, b"ab"), "goes on after its end"),
]


@pytest.mark.parametrize(("data", "says"), LEGACY)
def test_damaged_legacy_files(data, says, tmp_path):
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=says) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_thousands_of_damaged_legacy_files(sums, tmp_path):
    """GGUFs go through the fuzzer of GGUFs; bytes changed at random are refused in one line, or read as they are."""
    rng, path = random.Random(5), tmp_path / "m.dat"
    whole = write_legacy(path, sums).read_bytes()
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        rng.choice(fuzz_mutations.BYTES)(rng, data, len(data))
        path.write_bytes(data)
        try:
            read = read_imatrix(path)
        except NptiError as error:
            refused += 1
            text = str(error)
            assert text.startswith(f"{path}: "), text
            assert text.isprintable(), text
            assert len(text) - len(str(path)) < 400, text
        else:
            for values in read.importance(read.entries).values():
                assert np.isfinite(values).all()
                assert values.min() >= 0
    assert 1000 < refused < 2000


def test_memory_is_that_of_one_entry(tmp_path):
    """Four entries of 64 MB in a file that is a hole but for their heads."""
    path, values = tmp_path / "m.dat", 1 << 24
    with path.open("wb") as stream:
        stream.write(struct.pack("<i", 4))
        for place in range(4):
            name = f"blk.{place}.ffn_down.weight".encode()
            stream.write(struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, values))
            stream.seek(4 * values, os.SEEK_CUR)
        stream.truncate()
    tracemalloc.start()
    assert len(read_imatrix(path).entries) == 4
    assert tracemalloc.get_traced_memory()[1] < 150e6  # 67 MB, once more while it is read, and masks
    tracemalloc.stop()


def test_what_is_no_file(sums, tmp_path):
    with pytest.raises(ModelError, match="there is no such file"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(ModelError, match="is not a file"):
        read_imatrix(tmp_path)
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(5 << 30)
    with pytest.raises(ModelError, match="has 5 GB, more than any"):
        read_imatrix(tmp_path / "huge")


def test_a_matrix_of_another_model(sums, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", sums)
    read = read_imatrix(path)
    read.check_for({DOWN: 8, UP: 12, "output.weight": 3}, "it")
    read.check_for({DOWN: 8}, "it")
    with pytest.raises(
        ModelError, match=rf"m\.gguf: .* than it \({DOWN}: 8 columns, not 16; {UP}: 12 columns, not 4\)"
    ):
        read.check_for({DOWN: 16, UP: 4}, "it")
    with pytest.raises(ModelError, match=rf"another model than it, .* among its 2 \({DOWN}; {UP}\)"):
        read.check_for({"output.weight": 8}, "it")
    sums["token_embd.weight"] = sums[DOWN]  # llama.cpp passes over that one
    read_imatrix(write_gguf(path, sums)).check_for({"token_embd.weight": 16, DOWN: 8}, "it")


def test_a_file_that_changes_meanwhile(sums, tmp_path):
    path = write_legacy(tmp_path / "m.dat", sums)
    read = read_imatrix(path)
    write_legacy(path, sums, chunks=31)
    with pytest.raises(ModelError, match="changed while the job ran"):
        read.importance([DOWN])
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read again"):
        read.importance([DOWN])


def test_a_truncated_gguf_is_our_error(sums, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", sums)
    data = path.read_bytes()
    for end in range(24, len(data) - 32, 7):
        path.write_bytes(data[:end])
        with pytest.raises(GGUFError, match="truncated"):
            read_imatrix(path)
