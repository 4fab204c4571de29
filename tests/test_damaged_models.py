"""Damaged models of the other kinds, one by one: split, re-homed, with a width for each layer, with MLP biases."""

import hashlib
import json
import os
import random
import shutil
import struct

import numpy as np
import pytest
from fuzz_models import widths_array
from fuzz_mutations import bytes_entry, text_entry
from fuzz_seeds import (
    ARRAY,
    Entry,
    Tensor,
    rule_for,
    said_of,
    steer,
    take_apart,
    write_base,
)

from npti_export.compiler.exact import compile_exact
from npti_export.errors import AdapterError, GGUFError, ModelError
from npti_export.export.control_vector import read_directions, write_control_vector
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import sha256_file
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.gguf.shards import named_shards, read_model, shard_paths
from npti_export.inspection import inspect_file
from npti_export.models import gguf_source
from npti_export.rule_io import base_name

BASES = {
    "qwen2": {"gate": "Q4_0", "family": "qwen2", "attention": True},
    "deci": {"family": "deci", "width": [64, 0, 96], "biases": ("ffn_gate",)},
    "biases": {"biases": ("ffn_gate", "ffn_up", "ffn_down")},
    "split": {"attention": True, "biases": ("ffn_gate",), "split_max_tensors": 9},
    "moved": {"family": "qwen2", "attention": True, "split_max_tensors": 9, "small_first_shard": True},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made[name]: the (first) file of a base; of what it looks like steered with "-steered"."""
    folder, result = tmp_path_factory.mktemp("made"), {}
    for name, options in BASES.items():
        write_base(folder / f"{name}.gguf", **options)
        first = next(folder.glob(f"{name}-00001-of-*.gguf"), folder / f"{name}.gguf")
        steered = shard_paths(folder / f"{name}-steered.gguf", len(named_shards(first)))[0]
        steer(first, steered)
        result |= {name: first, f"{name}-steered": steered}
    return result


@pytest.fixture
def damaged(made, tmp_path):
    """damaged(name, change, part=0) -> the (first) file of a copy with the parts of one of its files changed."""

    def make(name, change, part=0):
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        paths = [folder / one.name for one in named_shards(made[name])]
        for one, copy in zip(named_shards(made[name]), paths, strict=True):
            shutil.copy(one, copy)
        file = take_apart(paths[part].read_bytes())
        change(file)
        paths[part].write_bytes(file.encode())
        return paths[0]

    return make


def put(*entries):
    def change(file):
        for entry in entries:
            file.entries = [one for one in file.entries if one.key != entry.key] + [entry]

    return change


def number(key, value):
    return Entry(key, 4, struct.pack("<I", value))


def alter(name, **changes):
    def change(file):
        tensor = next(one for one in file.tensors if one.name == name)
        for key, value in changes.items():
            setattr(tensor, key, value)

    return change


def add(name, shape, kind=0, nbytes=8192):
    def change(file):
        file.data = file.data.ljust(len(file.data) + -len(file.data) % file.alignment, b"\0")
        file.tensors.append(Tensor(name, shape, kind, len(file.data)))
        file.data += bytes(nbytes)

    return change


def digests_of(first):
    return [sha256_file(one) for one in named_shards(first)]


def bake(first, out, rule=None):
    base = read_model(first)
    check_base(base)
    program = compile_exact(rule or rule_for(mlp_widths(base)), 4)
    write_bake(plan_bake(base, program, {}, digests_of(first)), out)


def refuses_to_strip(path, folder, match):
    """Nothing is written."""
    with pytest.raises(GGUFError, match=match):
        strip(path, folder / "back.gguf", force=False)
    assert not list(folder.glob("back*"))


@pytest.mark.parametrize("name", BASES)
def test_undamaged_ones_come_back(made, tmp_path, name):
    first = made[name]
    assert strip(made[f"{name}-steered"], tmp_path / "back.gguf", force=False) == sha256_file(first)
    back = shard_paths(tmp_path / "back.gguf", len(named_shards(first)))
    assert [one.read_bytes() for one in back] == [one.read_bytes() for one in named_shards(first)]
    changed = [a != b for a, b in zip(digests_of(first), digests_of(made[f"{name}-steered"]), strict=True)]
    assert all(changed)


# --- widths


@pytest.mark.parametrize(
    ("inner", "count"), [(0, 3), (1, 3), (7, 3), (10, 3), (11, 3), (5, 2), (5, 4), (5, 0), (5, 100000)]
)
def test_widths_that_llama_cpp_would_not_take(damaged, made, inner, count, tmp_path):
    """An int8 held no width above 127 once it was widened; booleans counted as numbers."""
    kind, raw = widths_array(random.Random(0), inner, count)
    says = "feed_forward_length is not one width for each of 3 layers"
    path = damaged("deci", put(Entry(b"deci.feed_forward_length", kind, raw)))
    for use in (gguf_source, lambda path: check_base(read_gguf(path))):
        with pytest.raises(GGUFError, match=says):
            use(path)
    path = damaged("deci-steered", put(Entry(b"npti.base.feed_forward_length", kind, raw)))
    refuses_to_strip(path, tmp_path, says)
    assert gguf_source(made["deci"]).shape.width == 96


@pytest.mark.parametrize("value", [-1, 1 << 25, 2**31 - 1])
def test_widths_that_cannot_be(damaged, value):
    raw = struct.pack("<IQiii", 5, 3, 64, value, 96)
    with pytest.raises(GGUFError, match="is not one width for each of 3 layers"):
        gguf_source(damaged("deci", put(Entry(b"deci.feed_forward_length", ARRAY, raw))))


def test_an_mlp_in_a_layer_of_no_neurons(damaged):
    """It was widened to nothing, or by neurons that its other tensors did not have."""
    for name in (b"blk.1.ffn_gate.weight", b"blk.1.ffn_up.bias"):
        with pytest.raises(GGUFError, match=rf"{name.decode()} belongs to none of the 3 layers"):
            check_base(read_gguf(damaged("deci", add(name, [64, 32]))))


def test_inspect_counts_widths(made):
    assert inspect_file(made["deci"])["mlp width"] == "3 values"


# --- biases


@pytest.mark.parametrize("name", [b"x.ffn_gate.bias", b"blk.0.xffn_gate.bias", b"blk.00.ffn_gate.bias", b"a.b.ffn_up"])
def test_a_tensor_called_nearly_like_a_bias_is_none(damaged, tmp_path, name):
    """The number of its layer was sought in its name."""
    path = damaged("biases", add(name, [7], kind=1, nbytes=32))
    bake(path, tmp_path / "steered.gguf")
    strip(tmp_path / "steered.gguf", tmp_path / "back.gguf", force=False)
    assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_a_bias_of_another_type_or_length(damaged):
    for change in ({"kind": 1}, {"shape": [32]}, {"shape": [32, 2]}):
        with pytest.raises(GGUFError, match=r"blk.1.ffn_up.bias is not 64 values of F32"):
            check_base(read_gguf(damaged("biases", alter(b"blk.1.ffn_up.bias", **change))))


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "gate_biases is too short"), (bytes(3), "not made of float32"), (bytes(64), "restored|too short")],
)
def test_damaged_gate_biases_of_the_base(damaged, tmp_path, data, says):
    """Bytes that are not made of float32 were an error of numpy's."""
    refuses_to_strip(damaged("biases-steered", put(bytes_entry(b"npti.base.gate_biases", data))), tmp_path, says)


def test_a_steered_bias_that_is_not_float32(damaged, tmp_path):
    change = alter(b"blk.0.ffn_gate.bias", kind=1)
    refuses_to_strip(damaged("biases-steered", change), tmp_path, "blk.0.ffn_gate.bias is not F32")


def test_a_steered_mlp_that_is_not_as_wide_as_it_says(damaged, tmp_path):
    """A row as long as the file was read at once."""
    for shape in ([1 << 11, 1], [32, 32], [96 * 32]):
        change = alter(b"blk.0.ffn_down.weight", shape=shape)
        refuses_to_strip(damaged("biases-steered", change), tmp_path, r"blk.0.ffn_down.weight.*(go with|cannot have)")


def test_a_base_header_with_other_tensors(damaged, made, tmp_path):
    """The header of another file is one, too: its tensors are looked for in the steered file."""
    file = take_apart(made["deci"].read_bytes())
    file.data = b""
    entry = bytes_entry(b"npti.base.header", file.encode())
    refuses_to_strip(damaged("biases-steered", put(entry)), tmp_path, "outside the file|missing|not as large|restored")


# --- qwen2


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("attention.head_count", 64, "heads have 0 dimensions"),
        ("attention.head_count", 10, "heads have 3 dimensions"),
        ("attention.key_length", 24, r"attn_q.weight, \(32, 32\), is not made of heads of 24 dimensions"),
        ("attention.key_length", 1 << 24, "is not made of heads of 16777216 dimensions"),
    ],
)
def test_heads_that_cannot_be(damaged, tmp_path, key, value, says):
    """Heads of no dimensions were a division by zero, odd ones in a steered file an error of numpy's."""
    with pytest.raises(GGUFError, match=says):
        check_base(read_gguf(damaged("qwen2", put(number(f"qwen2.{key}".encode(), value)))))
    refuses_to_strip(damaged("qwen2-steered", put(number(f"llama.{key}".encode(), value))), tmp_path, says)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [(b"blk.0.attn_q.bias", [32], 8), (b"blk.0.attn_k.weight", [512], 8), (b"blk.1.attn_k.weight", [64, 16], 2)],
)
def test_rows_that_are_not_made_of_heads(damaged, name, shape, kind):
    """A quantised vector has blocks across its elements: fewer bytes were written than the file had room for."""
    with pytest.raises(GGUFError, match=rf"{name.decode()}, .* is not made of heads of 8 dimensions"):
        check_base(read_gguf(damaged("qwen2", alter(name, shape=shape, kind=kind))))


@pytest.mark.parametrize("text", [b"qwen3", b"gemma", b"\0", b"x" * 70000, b"llama"])
def test_a_lying_family_of_the_base(damaged, tmp_path, text):
    refuses_to_strip(
        damaged("qwen2-steered", put(text_entry(b"npti.base.architecture", text))), tmp_path, "cannot be restored"
    )


def test_a_rotation_that_is_no_number(damaged):
    entry = Entry(b"qwen2.rope.dimension_count", ARRAY, struct.pack("<IQI", 4, 1, 8))
    with pytest.raises(GGUFError, match=r"qwen2.rope.dimension_count is not a number"):
        check_base(read_gguf(damaged("qwen2", put(entry))))


# --- split files


@pytest.mark.parametrize("kind", [0, 4, 10, 11, 12])
def test_a_count_of_another_type(damaged, kind):
    """llama.cpp takes no other either; 2**60 of a uint64 were counted through."""
    raw = {0: b"\3", 4: struct.pack("<I", 3), 12: struct.pack("<d", 3.0)}.get(kind, struct.pack("<Q", 1 << 60))
    with pytest.raises(GGUFError, match=r"split.count is missing or not a number"):
        read_model(damaged("split", put(Entry(b"split.count", kind, raw))))


def test_tensors_counted_in_a_byte(damaged):
    """Was an error of struct's once there were more than 255 of them."""
    for part in (0, 1):
        with pytest.raises(GGUFError, match=r"split.tensors.count is missing or not a number"):
            read_model(damaged("split", put(Entry(b"split.tensors.count", 0, b"\x16")), part))


def test_thousands_of_missing_files_are_not_all_named(damaged):
    first = damaged("split", put(Entry(b"split.count", 2, struct.pack("<H", 65535))))
    first = first.rename(first.with_name("split-00001-of-65535.gguf"))
    with pytest.raises(GGUFError, match=r"without split-00002-of-65535.gguf, .* and 65531 more; put them") as error:
        read_model(first)
    assert len(str(error.value)) < 400


def test_digits_of_another_script(damaged):
    """They were read as a number, whose file has another name."""
    first = damaged("split", lambda file: None)
    first = first.rename(first.with_name("split-٠٠٠٠١-of-00003.gguf"))
    with pytest.raises(GGUFError, match=r"call it NAME-00001-of-00003.gguf again"):
        read_model(first)


def test_folders_are_not_left(damaged):
    """The other files are looked for beside the first, whatever its keys say."""
    names = [text_entry(key, b"../../x") for key in (b"split.name", b"general.name", b"npti.base.name")]
    first = damaged("split", put(*names))
    assert {part.path.parent for part in read_model(first).shards} == {first.parent}


@pytest.mark.parametrize("name", ["split", "moved"])
def test_metadata_in_another_file_than_the_first(damaged, made, tmp_path, name):
    """Keys of the family were changed there, too: a string was no width, and two could end up with one name."""
    entries = [Entry(f"{one}.x".encode(), 4, bytes(4)) for one in ("qwen2", "llama")]
    entries += [text_entry(b"llama.feed_forward_length", b"wide"), text_entry(b"general.architecture", b"gpt")]
    entries += [Entry(b"qwen2.feed_forward_length", ARRAY, struct.pack("<IQ", 8, 0))]
    first = damaged(name, put(*entries), part=1)
    bake(first, shard_paths(tmp_path / "steered.gguf", len(named_shards(first)))[0])
    steered = shard_paths(tmp_path / "steered.gguf", len(named_shards(first)))
    strip(steered[0], tmp_path / "back.gguf", force=False)
    back = shard_paths(tmp_path / "back.gguf", len(steered))
    assert [one.read_bytes() for one in back] == [one.read_bytes() for one in named_shards(first)]


def test_steering_in_another_file_than_the_first(damaged):
    first = damaged("split", put(Entry(b"npti.base.sha256", 4, bytes(4))), part=2)
    with pytest.raises(ModelError, match="is steered already"):
        check_base(read_model(first))


def test_a_part_of_an_unsteered_model_among_steered_ones(made, damaged, tmp_path):
    first = damaged("split-steered", lambda file: None)
    last = named_shards(first)[-1]
    shutil.copy(named_shards(made["split"])[-1], last)
    refuses_to_strip(first, tmp_path, r"00003-of-00003.gguf: (split.tensors.count is|was not made)")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_damaged_part_and_no_base_is_written(damaged, tmp_path, part):
    change = put(text_entry(b"npti.base.sha256", hashlib.sha256(b"").hexdigest().encode()))
    refuses_to_strip(
        damaged("split-steered", change, part), tmp_path, rf"0000{part + 1}-of-00003.gguf: the base cannot"
    )
    change = put(text_entry(b"npti.base.sha256", b"x" * 64))
    refuses_to_strip(
        damaged("split-steered", change, part), tmp_path, rf"0000{part + 1}-of-00003.gguf: was not made by"
    )


def test_a_base_name_of_another_number_of_files(damaged):
    """``--from`` failed with the name of a folder of ours."""
    first = damaged("split-steered", put(text_entry(b"npti.base.name", b"x-00001-of-00009.gguf")))
    with pytest.raises(AdapterError, match="not the first of 3 files"):
        base_name(read_model(first))


def test_a_header_that_no_steered_file_can_carry(damaged):
    """Twice a header of 65 MB is more than we read again ourselves."""

    def change(file):
        file.version = 2
        file.entries.append(bytes_entry(b"long", bytes(65 << 20)))
        file.data += b"\1"

    path = damaged("biases", change)
    base = read_gguf(path)
    with pytest.raises(GGUFError, match="header of its steered file would be too long"):
        plan_bake(base, compile_exact(rule_for([64, 64]), 4), {"x": bytes(64 << 20)}, "0" * 64)
    os.unlink(path)  # noqa: PTH108


# --- control vectors


def test_a_control_vector_that_is_not_finite(tmp_path):
    path, directions = tmp_path / "vector.gguf", np.ones((2, 32), np.float32)
    write_control_vector(path, directions, "llama", said_of(rule_for([64] * 3), tmp_path / "base.gguf"))
    assert (read_directions(path, 3, 32) == directions).all()
    assert json.dumps(inspect_file(path)["for"]) == '"llama"'
    file = take_apart(path.read_bytes())
    file.data = struct.pack("<f", float("nan")) + file.data[4:]
    path.write_bytes(file.encode())
    with pytest.raises(GGUFError, match="values that are not finite"):
        read_directions(path, 3, 32)
