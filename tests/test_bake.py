"""Baked files: bytes kept, rule reproduced in stock llama.cpp, base restored bit for bit."""

import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_rule
from gguf import GGUFReader
from reference import ReferenceLlama, kl, open_gguf
from tolerances import KL_TINY_FLOAT, KL_TINY_LAYOUT_ALONE, KL_TINY_QUANTISED, KL_TINY_QUANTISED_OTHERS

from npti_export.compiler.exact import compile_exact
from npti_export.errors import ArchitectureError, DiskFullError, GGUFError, ModelError, OutputError
from npti_export.export.gguf import check_base, plan_bake, record, strip, write_bake
from npti_export.files import sha256_file
from npti_export.gguf.reader import read_gguf

# K- and I-quants have blocks of 256; the others are tried on the narrow model.
NARROW = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"]
WIDE = [
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    *("IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "Q2_0"),
]
TOKENS = [1, 300, 45, 77, 512, 900, 31, 8, 650, 222, 19, 404, 3, 1000, 99, 250]


def tiny_of(make_tiny, kind):
    return make_tiny(kind) if kind in NARROW else make_tiny(kind, hidden=256, width=512, layers=2)


def bake(base_path, out, rule, units=5, metadata=None):
    base = read_gguf(base_path)
    check_base(base)
    plan = plan_bake(base, compile_exact(rule, units), metadata or {}, sha256_file(base_path))
    write_bake(plan, out)
    return plan


def rule_for(path, seed=0):
    header = read_gguf(path)
    return random_rule(header.get("llama.block_count"), header.get("llama.feed_forward_length"), seed)


def llama_logits(path):
    """Of stock llama.cpp, as anybody would load the file; of a split model, its first file."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llama.eval(TOKENS)
    return llama.scores[: len(TOKENS)].copy()


@pytest.mark.parametrize("kind", NARROW + WIDE)
def test_existing_blocks_are_byte_identical_and_strip_restores_the_file(make_tiny, tmp_path, kind):
    base, out = tiny_of(make_tiny, kind), tmp_path / "steered.gguf"
    plan = bake(base, out, rule_for(base))
    old, new = open_gguf(base), open_gguf(out)
    wide = {tensor.name: tensor for tensor in new.tensors}
    for tensor in old.tensors:
        was, now = tensor.data.view(np.uint8), wide[tensor.name].data.view(np.uint8)
        assert wide[tensor.name].tensor_type == tensor.tensor_type
        if was.ndim > 1:
            now = now[: was.shape[0], : was.shape[1]]
        np.testing.assert_array_equal(now, was, err_msg=tensor.name)
    assert out.stat().st_size == plan.nbytes
    width = old.fields["llama.feed_forward_length"].contents()
    assert new.fields["llama.feed_forward_length"].contents() == width + plan.extra
    for key, field in old.fields.items():
        if not key.startswith("GGUF.") and key != "llama.feed_forward_length":
            assert new.fields[key].contents() == field.contents(), key
    assert strip(out, tmp_path / "stripped.gguf", force=False) == sha256_file(base)
    assert (tmp_path / "stripped.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("kind", NARROW + WIDE)
def test_llama_cpp_runs_the_rule(make_tiny, tmp_path, kind):
    base, out = tiny_of(make_tiny, kind), tmp_path / "steered.gguf"
    rule = rule_for(base)
    bake(base, out, rule, units=5 if kind in ("F32", "F16", "BF16") else 4)
    reference = ReferenceLlama(base)
    want, plain = reference.logits(TOKENS, rule.shift, rule.clamp), reference.logits(TOKENS)
    effect, error = kl(want, plain), kl(want, llama_logits(out))
    floor = kl(plain, llama_logits(base))
    assert effect > 0.03
    if kind in ("F32", "F16", "BF16"):
        assert error < max(KL_TINY_FLOAT, 2 * floor)
        assert effect > 1000 * error
    else:
        assert error < KL_TINY_QUANTISED.get(kind, KL_TINY_QUANTISED_OTHERS)
        assert effect > 4 * error


def test_codebooks_without_room_for_corrections(make_tiny, tmp_path):
    """Seven clamps of five units each fill the padding; their layout alone holds their columns together."""
    base, out = tiny_of(make_tiny, "IQ2_XXS"), tmp_path / "steered.gguf"
    rule = rule_for(base)
    plan = bake(base, out, rule, units=5)
    assert plan.program.layers[0].corrects is None
    reference = ReferenceLlama(base)
    want = reference.logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, llama_logits(out))
    assert error < KL_TINY_LAYOUT_ALONE
    assert kl(want, reference.logits(TOKENS)) > 4 * error


def test_types_may_differ_within_a_file_and_between_layers(make_tiny, tmp_path):
    kinds = {
        "blk.0.ffn_gate.weight": "IQ2_XS",
        "blk.0.ffn_up.weight": "Q6_K",
        "blk.0.ffn_down.weight": "Q8_0",
        "blk.1.ffn_gate.weight": "MXFP4",
        "blk.1.ffn_up.weight": "TQ2_0",
        "blk.1.ffn_down.weight": "IQ1_M",
        "blk.2.ffn_gate.weight": "F32",
        "blk.2.ffn_up.weight": "BF16",
        "blk.2.ffn_down.weight": "Q4_0",
    }
    base = make_tiny("Q5_1", hidden=256, width=512, layers=3, kinds=tuple(kinds.items()))
    out = tmp_path / "s.gguf"
    rule = rule_for(base)
    plan = bake(base, out, rule, units=4)
    assert plan.extra == 256  # IQ1_M's block, though every other layer would do with less
    for tensor in GGUFReader(out).tensors:
        assert tensor.tensor_type.name == kinds.get(tensor.name, tensor.tensor_type.name)
    reference = ReferenceLlama(base)
    want = reference.logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, llama_logits(out))
    assert error < KL_TINY_QUANTISED_OTHERS
    assert kl(want, reference.logits(TOKENS)) > 4 * error
    strip(out, tmp_path / "base.gguf", force=False)
    assert (tmp_path / "base.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("stem", ["ffn_gate", "ffn_down"])
def test_weights_that_are_not_finite(make_tiny, tmp_path, stem):
    """In a quantised block they would make ggml abort the process."""
    base = tmp_path / "nan.gguf"
    shutil.copy(tiny_of(make_tiny, "IQ3_S"), base)
    tensor = read_gguf(base).by_name[f"blk.0.{stem}.weight"]
    with base.open("rb+") as stream:
        for block in range(tensor.nbytes // 110):
            stream.seek(tensor.offset + 110 * block)
            stream.write(np.float16(np.nan).tobytes())
    with pytest.raises(GGUFError, match=rf"nan.gguf: blk.0.{stem}.weight: .* not finite.*; the file is damaged or"):
        bake(base, tmp_path / "s.gguf", rule_for(base))


@pytest.mark.parametrize("stem", ["ffn_gate", "ffn_up", "ffn_down"])
def test_a_scale_beside_a_weight_is_refused(tiny, stem):
    """llama.cpp aborts where an NVFP4 gate has both a scale and a bias, and elsewhere multiplies the bias, too."""
    header = read_gguf(tiny)
    scale = replace(header.by_name["output_norm.weight"], name=f"blk.1.{stem}.scale")
    with pytest.raises(ModelError, match=f"blk.1.{stem} has a scale beside it"):
        check_base(replace(header, tensors=(*header.tensors, scale)))


def test_a_rule_that_only_shifts_is_exact_in_float32(tiny, tmp_path):
    rule = random_rule(3, 96, per_layer=(9, 0))
    bake(tiny, tmp_path / "s.gguf", rule)
    want = ReferenceLlama(tiny).logits(TOKENS, rule.shift)
    assert (
        kl(want, llama_logits(tmp_path / "s.gguf"))
        < 2 * kl(ReferenceLlama(tiny).logits(TOKENS), llama_logits(tiny)) + 1e-7
    )
    assert kl(want, ReferenceLlama(tiny).logits(TOKENS)) > 0.02


def test_units_that_do_nothing_change_nothing(tiny, tmp_path):
    """An empty rule in some layers: their padding and biases leave the model alone."""
    rule = rule_for(tiny)
    shift, clamp = rule.shift.copy(), rule.clamp.copy()
    shift[1:], clamp[1:] = 0, False
    bake(tiny, tmp_path / "s.gguf", type(rule)(shift, clamp))
    names = [tensor.name for tensor in read_gguf(tmp_path / "s.gguf").tensors if tensor.name.endswith("bias")]
    assert names == ["blk.0.ffn_gate.bias"]
    want = ReferenceLlama(tiny).logits(TOKENS, shift, clamp)
    assert kl(want, llama_logits(tmp_path / "s.gguf")) < KL_TINY_FLOAT


def odd_file(path, tiny, alignment):
    """The same model laid out strangely: tensors in reverse order in the file, junk in the gaps and at the end.

    Legal by the specification, though llama.cpp itself wants them in order, as the steered file has them.
    """
    header = read_gguf(tiny)
    data = tiny.read_bytes()
    parts, offsets, position = [], {}, 0
    for number, tensor in enumerate(reversed(header.tensors)):
        offsets[tensor.name] = position
        block = data[tensor.offset : tensor.offset + tensor.nbytes]
        gap = -(len(block) + position) % alignment + alignment * (number % 3)
        parts += [block, bytes((7 * number + i) % 256 for i in range(gap))]
        position += len(block) + gap
    head = [b"GGUF", struct.pack("<IQQ", 3, len(header.tensors), len(header.keys))]
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()  # noqa: E731
    head += [text(entry.key) + entry.raw for entry in header.keys]
    for tensor in header.tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head.append(text(tensor.name) + shape + struct.pack("<IQ", tensor.type_id, offsets[tensor.name]))
    head = b"".join(head)
    path.write_bytes(head + b"\xaa" * (-len(head) % alignment) + b"".join(parts) + b"tail")


def test_a_base_with_quirks_comes_back_bit_for_bit(make_tiny, tmp_path):
    tiny = make_tiny(alignment=64)
    base, out = tmp_path / "odd.gguf", tmp_path / "steered.gguf"
    odd_file(base, tiny, 64)
    rule = rule_for(base)
    bake(base, out, rule)
    assert kl(ReferenceLlama(tiny).logits(TOKENS, rule.shift, rule.clamp), llama_logits(out)) < KL_TINY_FLOAT
    strip(out, tmp_path / "stripped.gguf", force=False)
    assert (tmp_path / "stripped.gguf").read_bytes() == base.read_bytes()


def test_metadata_placeholders_are_patched_in_place(tiny, tmp_path):
    out = tmp_path / "s.gguf"
    bake(tiny, out, rule_for(tiny), metadata={"trait": "openness+", "fidelity.kl": float("nan"), "gamma": 0.7})
    size = out.stat().st_size
    record(out, {"fidelity.kl": 0.125})
    header = read_gguf(out)
    assert (header.get("npti.trait"), header.get("npti.fidelity.kl"), header.get("npti.gamma")) == (
        "openness+",
        0.125,
        0.7,
    )
    assert header.get("npti.base.sha256") == sha256_file(tiny)
    assert out.stat().st_size == size


def test_the_same_inputs_give_the_same_bytes(tiny, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        bake(tiny, tmp_path / name, rule_for(tiny))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_damaged_steered_file_is_not_stripped(tiny, tmp_path):
    out = tmp_path / "s.gguf"
    bake(tiny, out, rule_for(tiny))
    tensor = read_gguf(out).by_name["blk.1.attn_q.weight"]
    with out.open("rb+") as stream:
        stream.seek(tensor.offset + 5)
        stream.write(b"\x55")
    with pytest.raises(GGUFError, match="cannot be restored"):
        strip(out, tmp_path / "base.gguf", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]


def test_what_cannot_be_stripped_or_baked(tiny, tmp_path, make_tiny):
    with pytest.raises(GGUFError, match="nothing to strip"):
        strip(tiny, tmp_path / "x.gguf", force=False)
    out = tmp_path / "s.gguf"
    bake(tiny, out, rule_for(tiny))
    with pytest.raises(ModelError, match="steered already"):
        check_base(read_gguf(out))
    with pytest.raises(OutputError, match="exists already"):
        strip(out, out, force=False)
    data = tiny.read_bytes().replace(
        b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama",
        b"general.architecture" + struct.pack("<IQ", 8, 5) + b"gemma",
    )
    (tmp_path / "gemma.gguf").write_bytes(data)
    with pytest.raises(ArchitectureError, match="cannot be added to a GGUF of gemma: its activation is GELU"):
        check_base(read_gguf(tmp_path / "gemma.gguf"))


def test_a_header_that_contradicts_its_tensors(tiny, tmp_path):
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    data = tiny.read_bytes().replace(key + struct.pack("<I", 96), key + struct.pack("<I", 64))
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=r"blk.0.ffn_gate.weight is \(64, 96\), not \(64, 64\)"):
        check_base(read_gguf(tmp_path / "x.gguf"))


def test_no_room_is_said_before_writing(tiny, tmp_path, monkeypatch):
    base = read_gguf(tiny)
    plan = plan_bake(base, compile_exact(rule_for(tiny), 4), {}, "0" * 64)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(DiskFullError, match=r"needs 0 MB|needs \d+ MB but only 0 MB"):
        write_bake(plan, tmp_path / "s.gguf")
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_are_streamed_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    """With every tensor counted as large, and chunks of a few rows."""
    bake(tiny, tmp_path / "a.gguf", rule_for(tiny))
    monkeypatch.setattr("npti_export.export.gguf._AHEAD_BYTES", 1)
    monkeypatch.setattr("npti_export.export.widen.CHUNK", 1000)
    bake(tiny, tmp_path / "b.gguf", rule_for(tiny))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    strip(tmp_path / "b.gguf", tmp_path / "base.gguf", force=False)
    assert (tmp_path / "base.gguf").read_bytes() == tiny.read_bytes()


def test_a_base_cut_short_while_it_is_read(make_tiny, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(make_tiny(), base)
    plan = plan_bake(read_gguf(base), compile_exact(rule_for(base), 4), {}, "0" * 64)
    with base.open("rb+") as stream:
        stream.truncate(plan.base.size // 2)
    with pytest.raises(GGUFError, match="changed or ended while it was read"):
        write_bake(plan, tmp_path / "s.gguf")
