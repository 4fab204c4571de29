"""Damaged GGUF files, one by one: what the fuzzer found, or a look at what it cannot reach."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rule
from fuzz_mutations import bytes_entry, text_entry
from fuzz_seeds import Entry, Tensor, steer, take_apart, with_quirks, write_base

from npti_export.compiler.exact import compile_exact
from npti_export.errors import AdapterError, GGUFError, ModelError
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import naming, sha256_file
from npti_export.gguf.blocks import quantise, type_id_of
from npti_export.gguf.reader import read_gguf
from npti_export.gguf.weights import read_matrix
from npti_export.inspection import inspect_file
from npti_export.models import gguf_source
from npti_export.rule import SteeringRule
from npti_export.rule_io import base_name, encode_rule, load_rule


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, one with quirks, and what they look like steered."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base.gguf", alignment=64)
    (folder / "quirks.gguf").write_bytes(with_quirks((folder / "base.gguf").read_bytes()))
    for name in ("base", "quirks"):
        steer(folder / f"{name}.gguf", folder / f"{name}-steered.gguf")
    return folder


@pytest.fixture
def damaged(made, tmp_path):
    """damaged(name, change) -> path of the file with its parts changed."""

    def make(name, change):
        file = take_apart((made / f"{name}.gguf").read_bytes())
        change(file)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(file.encode())
        if file.size:
            os.truncate(path, file.size)
        return path

    return make


def set_key(key, kind, raw):
    def change(file):
        file.entries = [one for one in file.entries if one.key != key] + [Entry(key, kind, raw)]

    return change


def set_entry(entry):
    return set_key(entry.key, entry.kind, entry.raw)


def number(key, value):
    return set_key(key, 4, struct.pack("<I", value))


def add_tensor(name, shape, nbytes):
    def change(file):
        file.tensors.append(Tensor(name, shape, 0, len(file.data)))
        file.data += bytes(nbytes + -nbytes % file.alignment)

    return change


def peak_of(work):
    """The most memory that Python and numpy took meanwhile, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bake(base, out, rule):
    header = read_gguf(base)
    check_base(header)
    write_bake(plan_bake(header, compile_exact(rule, 4), {}, sha256_file(base)), out)


# --- the header


@pytest.mark.parametrize("layers", [3, 513, 2**24, 2**32 - 1])
def test_more_layers_than_there_are(damaged, layers):
    """The names of all the layers' norms were listed before the first was looked for."""
    path = damaged("base", number(b"llama.block_count", layers))
    started = time.perf_counter()
    for use in (gguf_source, lambda path: check_base(read_gguf(path))):
        with pytest.raises(GGUFError, match=r"blk.2.\S+ is missing|llama.block_count is \d+, and more than 512 cannot"):
            use(path)
    assert time.perf_counter() - started < 1


def test_fewer_layers_than_there_are(damaged):
    """Was an IndexError in the middle of baking."""
    with pytest.raises(GGUFError, match=r"blk.1.ffn_gate.weight belongs to none of the 1 layers"):
        check_base(read_gguf(damaged("base", number(b"llama.block_count", 1))))


@pytest.mark.parametrize("name", [b"blk.2.ffn_down.weight", b"blk.9.ffn_gate.bias", b"blk.123456.ffn_up.bias"])
def test_an_mlp_of_no_layer(damaged, name):
    with pytest.raises(GGUFError, match="belongs to none of the 2 layers"):
        check_base(read_gguf(damaged("base", add_tensor(name, [32, 64], 8192))))


def test_a_width_of_another_type_could_not_be_restored(damaged):
    path = damaged("base", set_key(b"llama.feed_forward_length", 10, struct.pack("<Q", 64)))
    with pytest.raises(GGUFError, match="feed_forward_length is not a uint32"):
        check_base(read_gguf(path))


@pytest.mark.parametrize("key", ["general.architecture", "general.name", "general.license"])
@pytest.mark.parametrize(("kind", "raw"), [(4, bytes(4)), (9, struct.pack("<IQ", 8, 0))])
def test_a_needed_string_that_is_none(damaged, key, kind, raw):
    with pytest.raises(GGUFError, match=f"{key} is not a string"):
        gguf_source(damaged("base", set_key(key.encode(), kind, raw)))


def test_a_string_that_is_not_text_names_the_file(damaged):
    path = damaged("base", set_entry(text_entry(b"general.name", b"\xff")))
    with pytest.raises(GGUFError, match=r"damaged.gguf: 'general.name': a string .* is not UTF-8"):
        gguf_source(path)


def test_a_name_of_megabytes_or_with_control_characters_does_not_get_into_a_message(damaged):
    for text in (b"x" * (1 << 20), b"\x1b[2J"):
        with pytest.raises(GGUFError, match=r"general.architecture is '.{1,60}…?'?; the file is damaged$") as error:
            gguf_source(damaged("base", set_entry(text_entry(b"general.architecture", text))))
        assert str(error.value).isprintable()

    def rename(file):
        file.tensors[0].name = b"a\nb"

    with pytest.raises(GGUFError, match=r"the name of a tensor 'a\\nb' cannot be printed"):
        read_gguf(damaged("base", rename))


@pytest.mark.parametrize(("kind", "raw"), [(10, struct.pack("<Q", 32)), (7, b"\1"), (4, struct.pack("<I", 48))])
def test_an_alignment_that_llama_cpp_would_not_take(damaged, kind, raw):
    with pytest.raises(GGUFError, match=r"general.alignment is not a uint32 that is a power of two"):
        read_gguf(damaged("base", set_key(b"general.alignment", kind, raw)))


def test_many_tensors_of_which_the_last_two_are_one(damaged):
    """Which one occurs twice was found by counting each among all the others: minutes."""

    def change(file):
        file.tensors = [Tensor(b"%d" % one, [1], 0, 0) for one in range(30000)] + [Tensor(b"29999", [1], 0, 0)]

    path = damaged("base", change)
    started = time.perf_counter()
    with pytest.raises(GGUFError, match="tensor '29999' occurs twice"):
        read_gguf(path)
    assert time.perf_counter() - started < 5


def test_counts_that_fit_into_a_hole(damaged):
    """Zeros are well-formed keys without a name: a hole of gigabytes has millions."""

    def change(file):
        file.counts["keys"] = 1 << 27
        file.size = 4 << 30

    path = damaged("base", change)
    with pytest.raises(GGUFError, match="claims 134217728 keys"):
        read_gguf(path)


def test_a_string_that_fits_into_a_hole(damaged):
    def change(file):
        file.entries.append(Entry(b"hole", 8, struct.pack("<Q", 2 << 30)))
        file.size = 4 << 30

    path = damaged("base", change)

    def read():
        with pytest.raises(GGUFError, match="header claims to be longer than 128 MB"):
            read_gguf(path)

    assert peak_of(read) < 8 << 20


def test_a_hole_at_the_end_is_not_read(damaged):
    """What lies after the last tensor was read whole, to be kept in the steered file."""

    def change(file):
        file.size = 4 << 30

    path = damaged("base", change)
    with pytest.raises(GGUFError, match="MB of it belong to no tensor"):
        check_base(read_gguf(path))


def test_gaps_are_looked_at_in_pieces(damaged, tmp_path):
    """Sixteen megabytes of zeros are no news, but one byte in them is."""

    def change(file):
        file.data += bytes((16 << 20) - 64)

    path = damaged("base", change)
    header, rule = read_gguf(path), random_rule(2, 64)
    check_base(header)
    assert peak_of(lambda: plan_bake(header, compile_exact(rule, 4), {}, "0" * 64)) < 12 << 20
    with path.open("rb+") as stream:
        stream.seek(-(9 << 20), os.SEEK_END)
        stream.write(b"\1")
    bake(path, tmp_path / "steered.gguf", rule)
    strip(tmp_path / "steered.gguf", tmp_path / "back.gguf", force=False)
    assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_gaps_of_alignment_take_no_memory(tmp_path):
    base, out, back = (tmp_path / name for name in ("base.gguf", "steered.gguf", "back.gguf"))
    write_base(base, layers=5, alignment=1 << 20)
    assert base.stat().st_size > 25 << 20
    assert peak_of(lambda: bake(base, out, random_rule(5, 64))) < 12 << 20  # of which two chunks of sha256_file
    assert peak_of(lambda: strip(out, back, force=False)) < 12 << 20
    assert back.read_bytes() == base.read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GGUFError, match="is not a file"):
        read_gguf(tmp_path / "pipe.gguf")


# --- the weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite(damaged, value):
    def change(file):
        offset = next(one.offset for one in file.tensors if one.name == b"blk.1.ffn_norm.weight")
        file.data = file.data[:offset] + struct.pack("<f", value) + file.data[offset + 4 :]

    with pytest.raises(GGUFError, match=r"blk.1.ffn_norm.weight holds values that are not finite"):
        gguf_source(damaged("base", change))


def test_a_norm_of_another_length(damaged):
    def change(file):
        next(one for one in file.tensors if one.name == b"output_norm.weight").shape = [16]

    with pytest.raises(GGUFError, match=r"output_norm.weight is \(16,\), not \(32,\)"):
        gguf_source(damaged("base", change))


def test_columns_that_are_not_finite_do_not_end_the_process(tmp_path):
    """ggml calls abort() where IQ3_S has to store a NaN, hence a process of its own."""
    base = tmp_path / "base.gguf"
    write_base(base, hidden=256, width=256, layers=2)
    file = take_apart(base.read_bytes())
    down = next(one for one in file.tensors if one.name == b"blk.0.ffn_down.weight")
    blocks = quantise(np.ones((256, 256), np.float32), type_id_of("IQ3_S"))
    blocks[:, :2] = np.array([np.nan], np.float16).view(np.uint8)
    file.data = file.data[: down.offset] + blocks.tobytes() + file.data[down.offset + blocks.nbytes :]
    down.kind = type_id_of("IQ3_S")
    base.write_bytes(file.encode())
    code = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_damaged_gguf import bake, random_rule
        bake(Path(sys.argv[2]), Path(sys.argv[3]), random_rule(2, 256))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__), base, tmp_path / "out.gguf"],  # noqa: PTH120
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, (done.returncode, done.stderr)  # an abort is -6
    assert f"GGUFError: {base}: blk.0.ffn_down.weight: a column is not finite" in done.stderr


def test_a_rule_that_does_nothing(made, tmp_path):
    """No new columns at all: ggml divides by their number."""
    out = tmp_path / "steered.gguf"
    bake(made / "base.gguf", out, SteeringRule(np.zeros((2, 64), np.float32), np.zeros((2, 64), bool)))
    assert read_gguf(out).require_int("llama.feed_forward_length") == 64
    strip(out, tmp_path / "back.gguf", force=False)
    assert (tmp_path / "back.gguf").read_bytes() == (made / "base.gguf").read_bytes()


# --- what a steered file carries


@pytest.mark.parametrize("name", ["base-steered", "quirks-steered"])
@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
def test_a_lying_size_of_the_base(damaged, tmp_path, name, size):
    path = damaged(name, set_key(b"npti.base.bytes", 10, struct.pack("<Q", size)))
    with pytest.raises(GGUFError, match=r"npti.base.bytes is \d+, and more than|cannot be restored|truncated"):
        strip(path, tmp_path / "base.gguf", force=False)
    assert not (tmp_path / "base.gguf").exists()


def test_a_base_shorter_than_its_header(damaged, tmp_path):
    path = damaged("quirks-steered", set_key(b"npti.base.bytes", 10, struct.pack("<Q", 99)))
    with pytest.raises(GGUFError, match=r"npti.base.bytes is 99, less than npti.base.header is long"):
        strip(path, tmp_path / "base.gguf", force=False)


@pytest.mark.parametrize("key", ["npti.base.header", "npti.base.gaps"])
@pytest.mark.parametrize(("kind", "raw"), [(10, struct.pack("<Q", 2**40)), (9, struct.pack("<IQi", 5, 1, -1))])
def test_bytes_of_another_type(damaged, tmp_path, key, kind, raw):
    with pytest.raises(GGUFError, match=f"{key} is not an array of bytes"):
        strip(damaged("quirks-steered", set_key(key.encode(), kind, raw)), tmp_path / "base.gguf", force=False)


@pytest.mark.parametrize("width", [1, 33, 63, 97])
def test_a_lying_width_of_the_base(damaged, tmp_path, width):
    path = damaged("base-steered", number(b"npti.base.feed_forward_length", width))
    with pytest.raises(GGUFError, match=r"cannot be restored|cannot have \d+ neurons|is narrower"):
        strip(path, tmp_path / "base.gguf", force=False)


def test_a_steered_mlp_of_no_layer(damaged, tmp_path):
    with pytest.raises(GGUFError, match=r"blk.9.ffn_down.weight belongs to none of the 2 layers"):
        strip(
            damaged("base-steered", add_tensor(b"blk.9.ffn_down.weight", [32], 128)),
            tmp_path / "base.gguf",
            force=False,
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [2**30, 2**30]}, "layers of 1073741824 neurons cannot be"),
        ({"shape": [0, 5]}, "0 layers of 5 neurons cannot be"),
        ({"shape": [2, 64, 1]}, "too many values"),
        ({"shift_index": [-1]}, "do not match"),
        ({"shift_index": [128]}, "do not match"),
        ({"shift_index": [1, 2]}, "do not match"),
        ({"clamp_index": [-128]}, "do not match"),
        ({"shift_value": [float("nan")]}, "not finite"),
        ({"clamp_index": np.zeros(1, np.float32)}, "clamp_index is not a row of int32"),
        ({"shift_value": np.zeros((1, 1), np.float32)}, "shift_value is not a row of float32"),
    ],
)
def test_a_damaged_rule(damaged, changes, says):
    """Negative indices counted from the end, one value went to many neurons, a shape of any size was allocated."""
    from safetensors.numpy import load, save

    shift = np.zeros((2, 64), np.float32)
    shift[1, 3] = 0.5
    tensors = load(encode_rule(SteeringRule(shift, np.zeros((2, 64), bool))))
    for name, value in changes.items():
        tensors[name] = np.array(value, getattr(value, "dtype", tensors[name].dtype))
    with pytest.raises(AdapterError, match=f"its steering rule is damaged .*{says}"):
        load_rule(damaged("base-steered", set_entry(bytes_entry(b"npti.rule", save(tensors)))))


@pytest.mark.parametrize("text", [b"[" * 100000, b"", b"[]", b'{"trait": 1}', b"1" * 5000])
def test_a_damaged_provenance(damaged, text):
    with pytest.raises(AdapterError, match="does not say where its rule came from"):
        load_rule(damaged("base-steered", set_entry(text_entry(b"npti.provenance", text))))


@pytest.mark.parametrize("name", [b"a\0b", b"/..", b"..", b"x\ny"])
def test_a_base_name_that_names_no_file(damaged, name):
    """The base is taken out under this name for --from, in a folder of its own."""
    with pytest.raises(AdapterError, match=r"npti.base.name is .*no file's name"):
        base_name(read_gguf(damaged("base-steered", set_entry(text_entry(b"npti.base.name", name)))))


@pytest.mark.parametrize("name", ["1" * 5000, "é" * 200 + ".gguf", "\\u4e2d" * 80 + ".gguf"])
def test_of_a_long_base_name_the_end_is_left(damaged, tmp_path, name):
    """A name of 80 characters that are not ASCII is recorded with 480; ``--from`` could not write such a file."""
    path = damaged("base-steered", set_entry(text_entry(b"npti.base.name", name.encode())))
    found = base_name(read_gguf(path))
    assert name.endswith(found)
    assert len(found) >= 100
    strip(path, tmp_path / found, force=False)


def test_folders_of_a_base_name_are_dropped(damaged, made):
    path = damaged("base-steered", set_entry(text_entry(b"npti.base.name", b"/etc/../x.gguf")))
    assert base_name(read_gguf(path)) == "x.gguf"
    assert base_name(read_gguf(made / "base-steered.gguf")) == "base.gguf"


def test_inspect_decodes_no_arrays(damaged, made):
    shown = inspect_file(made / "quirks-steered.gguf")
    assert shown["npti.base.header"] == f"{read_gguf(made / 'quirks.gguf').data_start} bytes"
    path = damaged("base-steered", set_key(b"npti.rule", 10, bytes(8)))
    assert inspect_file(path)["npti.rule"] == 0
    with pytest.raises(ModelError, match="steered already"):
        gguf_source(path)


def test_weights_of_a_file_that_became_shorter(tiny, tmp_path):
    """Between its header and its weights."""
    path = Path(shutil.copy(tiny, tmp_path / "m.gguf"))
    header = read_gguf(path)
    tensor = header.by_name["blk.2.ffn_down.weight"]
    os.truncate(path, tensor.offset + 1000)
    with pytest.raises(GGUFError, match=r"m\.gguf: became shorter while it was read \(blk\.2\.ffn_down\.weight\)"):
        read_matrix(header, tensor.name)


def test_reading_that_fails_names_the_file(tmp_path):
    with pytest.raises(OSError, match="Input/output error") as failed, naming(tmp_path / "m.gguf"):
        raise OSError(errno.EIO, "Input/output error")
    assert failed.value.filename == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("error", [RuntimeError("Failed to load shared library"), OSError("wrong ELF class")])
def test_a_broken_llama_cpp_is_said_in_one_sentence(monkeypatch, error):
    import llama_cpp._ctypes_extensions as loader

    from npti_export.gguf.ggml import ggml

    def fails(*_):
        raise error

    monkeypatch.setattr(loader, "load_shared_library", fails)
    with pytest.raises(ModelError, match=rf"llama\.cpp cannot be loaded \({error}\); install llama-cpp-python again"):
        ggml.__wrapped__()
