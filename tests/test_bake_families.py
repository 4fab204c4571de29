"""Baking into other families than llama: as themselves, or written as llama; into MLPs with biases of their own."""

import struct

import numpy as np
import pytest
from conftest import random_rule
from gguf import GGUFReader
from reference import ReferenceLlama, kl
from test_bake import TOKENS, bake, llama_logits
from tolerances import KL_SAME_MODEL, KL_TINY_FLOAT, KL_TINY_QUANTISED_OTHERS

from npti_export.errors import ModelError
from npti_export.export.gguf import check_base, strip
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.rule import SteeringRule

BIASES = ("ffn_gate", "ffn_up", "ffn_down")


def rule_within(path, seed=0):
    """A random rule that steers only neurons that there are."""
    rng, widths = np.random.default_rng(seed), mlp_widths(read_gguf(path))
    shift, clamp = np.zeros((len(widths), max(widths)), np.float32), np.zeros((len(widths), max(widths)), bool)
    for layer, width in enumerate(widths):
        chosen = rng.permutation(width)
        shift[layer, chosen[:5]] = rng.uniform(0.5, 2.0, 5)[: min(5, width)]
        clamp[layer, chosen[5:12]] = True
    return SteeringRule(shift, clamp)


def check_steered(base, folder, rule, limit=KL_TINY_FLOAT):
    """Bakes, compares with the reference, strips; returns the steered file."""
    out = folder / "steered.gguf"
    bake(base, out, rule)
    reference = ReferenceLlama(base)
    want, plain = reference.logits(TOKENS, rule.shift, rule.clamp), reference.logits(TOKENS)
    error = kl(want, llama_logits(out))
    assert error < limit
    assert kl(want, plain) > max(0.02, 10 * error)
    strip(out, folder / "stripped.gguf", force=False)
    assert (folder / "stripped.gguf").read_bytes() == base.read_bytes()
    return out


@pytest.mark.parametrize("family", ["granite", "minicpm", "mistral3", "deci"])
def test_families_baked_as_themselves(make_tiny, tmp_path, family):
    base = make_tiny(family=family)
    assert read_gguf(check_steered(base, tmp_path, rule_within(base))).architecture == family


@pytest.mark.parametrize("biases", [("ffn_gate",), ("ffn_up",), BIASES], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "deci"])
def test_mlps_with_biases_of_their_own(make_tiny, tmp_path, family, biases):
    base = make_tiny(family=family, biases=biases)
    out = check_steered(base, tmp_path, rule_within(base))
    gates = [tensor for tensor in GGUFReader(out).tensors if tensor.name.endswith("ffn_gate.bias")]
    assert len(gates) == 3
    for tensor in gates:
        assert (tensor.data[:96] == -1000).sum() == 7


def test_a_base_with_neurons_that_are_off_already(make_tiny, tmp_path):
    """Values equal to the one that switches off come back as what they were."""
    base = tmp_path / "base.gguf"
    base.write_bytes(make_tiny(biases=("ffn_gate",)).read_bytes())
    rule = rule_within(base)
    off, on = np.flatnonzero(rule.clamp[0])[0], np.flatnonzero((rule.shift[0] == 0) & ~rule.clamp[0])[0]
    with base.open("rb+") as stream:
        for neuron in (off, on):
            stream.seek(read_gguf(base).by_name["blk.0.ffn_gate.bias"].offset + 4 * int(neuron))
            stream.write(struct.pack("<f", -1000.0))
    check_steered(base, tmp_path, rule)


def test_layers_with_a_width_each(make_tiny, tmp_path):
    base = make_tiny(family="deci", width=(96, 0, 64, 32), layers=4)
    rule = rule_within(base)
    rule.shift[3], rule.clamp[3] = 0, False
    out = check_steered(base, tmp_path, rule)
    assert mlp_widths(read_gguf(out)) == [160, 0, 128, 32]  # a layer that is not steered stays as it is
    beyond = SteeringRule(rule.shift.copy(), rule.clamp)
    beyond.shift[2, 70] = 1
    with pytest.raises(ModelError, match="layer 2 has 64 neurons, and the rule steers one beyond"):
        bake(base, tmp_path / "x.gguf", beyond)


def test_an_array_of_equal_widths_stays_one(make_tiny, tmp_path):
    """llama.cpp takes it for llama, if all are equal; so they are widened alike."""
    base = make_tiny(width=(96, 96, 96))
    rule = random_rule(3, 96)
    out = check_steered(base, tmp_path, rule)
    assert mlp_widths(read_gguf(out)) == [160, 160, 160]


def test_qwen2_written_as_llama_is_the_same_model(make_tiny, tmp_path):
    base, out = make_tiny(family="qwen2"), tmp_path / "llama.gguf"
    nothing = SteeringRule(np.zeros((3, 96), np.float32), np.zeros((3, 96), bool))
    bake(base, out, nothing)
    header = read_gguf(out)
    assert header.architecture == "llama"
    assert not [entry.key for entry in header.keys if entry.key.startswith("qwen2.")]
    assert kl(llama_logits(base), llama_logits(out)) < KL_SAME_MODEL
    old, new = ({tensor.name: tensor.data for tensor in GGUFReader(path).tensors} for path in (base, out))
    for name, data in old.items():
        same = name not in [f"blk.{n}.attn_{p}.{w}" for n in range(3) for p in "qk" for w in ("weight", "bias")]
        assert np.array_equal(data, new[name]) == same, name
        np.testing.assert_array_equal(np.sort(data, axis=0), np.sort(new[name], axis=0))
    strip(out, tmp_path / "stripped.gguf", force=False)
    assert (tmp_path / "stripped.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q8_0", "Q4_K"])
def test_qwen2_steered(make_tiny, tmp_path, kind):
    sizes = {"hidden": 256, "width": 512, "layers": 2} if kind == "Q4_K" else {}
    base = make_tiny(kind, family="qwen2", **sizes)
    limit = KL_TINY_FLOAT if kind in ("F32", "F16") else KL_TINY_QUANTISED_OTHERS
    out = check_steered(base, tmp_path, rule_within(base), limit)
    recovery = [entry for entry in read_gguf(out).keys if entry.key.startswith("npti.base.")]
    assert sum(len(entry.raw) for entry in recovery) < 250


def test_rows_are_reordered_in_chunks_to_the_same_bytes(make_tiny, tmp_path, monkeypatch):
    base = make_tiny("Q8_0", family="qwen2")
    bake(base, tmp_path / "a.gguf", rule_within(base))
    monkeypatch.setattr("npti_export.export.widen.CHUNK", 700)
    monkeypatch.setattr("npti_export.export.gguf._AHEAD_BYTES", 1)
    bake(base, tmp_path / "b.gguf", rule_within(base))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    strip(tmp_path / "b.gguf", tmp_path / "base.gguf", force=False)
    assert (tmp_path / "base.gguf").read_bytes() == base.read_bytes()


def test_qwen2_files_with_more_than_llama_holds(make_tiny, tmp_path):
    """An output bias, a key of llama's own, a rotation of part of a head."""
    base, path = make_tiny(family="qwen2").read_bytes(), tmp_path / "x.gguf"
    swaps = {
        r"no place for the tensor output_norm.bias\w*": (b"output_norm.weight", b"output_norm.bias__"),
        "has a key llama.context_lengt already": (b"qwen2.context_length", b"llama.context_lengt"),
        "rotates 8 of 16 dimensions": (
            b"qwen2.rope.dimension_count" + struct.pack("<II", 4, 16),
            b"qwen2.rope.dimension_count" + struct.pack("<II", 4, 8),
        ),
    }
    for message, (old, new) in swaps.items():
        old, new = (struct.pack("<Q", len(one)) + one if len(one) < 25 else one for one in (old, new))
        data = base.replace(old, new)
        padding = len(base) - len(data)  # a shorter key: the data section stays where it was
        if padding:
            start = read_gguf(make_tiny(family="qwen2")).data_start
            data = data[: start - padding] + bytes(padding) + data[start - padding :]
        path.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            check_base(read_gguf(path))
