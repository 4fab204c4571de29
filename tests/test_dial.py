"""Dials: the widened base computes what the model computes, and its LoRA files what rules say, at every scale."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rule
from gguf import GGUFReader
from gguf.quants import dequantize
from lora_runs import lora_logits
from reference import ReferenceLlama, kl
from test_bake import NARROW, TOKENS, WIDE, tiny_of
from test_bake_families import BIASES, rule_within
from tolerances import (
    KL_DIAL,
    KL_DIAL_SHIFTS,
    KL_SAME_MODEL,
    KL_TINY_FLOAT,
    KL_TINY_QUANTISED,
    KL_TINY_QUANTISED_OTHERS,
)

from npti_export.compiler.dial import compile_dial
from npti_export.dial.index import Adapter, Dial
from npti_export.errors import TraitError
from npti_export.export.dial import plan_dial, write_dial
from npti_export.export.gguf import check_base, strip
from npti_export.export.lora import encode_signs
from npti_export.files import sha256_file
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.rule import SteeringRule, compose
from npti_export.traits import parse_trait

POLES = ("extraversion+", "openness+", "neuroticism-")
FLOATS = ("F32", "F16", "BF16")


@dataclass
class Made:
    base: Path
    folder: Path
    rules: dict
    dial: Dial

    def run(self, *mix, without=None):
        """Logits of llama.cpp with the scales that a request would carry, adapters of one kind left out."""
        scales = self.dial.scales([parse_trait(pole) for pole in mix])
        pairs = zip(self.dial.adapters, scales, strict=True)
        chosen = {self.folder / one.file: scale for one, scale in pairs if one.kind != without}
        return lora_logits(self.folder / self.dial.base, chosen, TOKENS)


def make(base, folder, rules, units=5, mixed=3, layout="uniform"):
    header = read_gguf(base)
    check_base(header, layout)
    program = compile_dial(rules, units, mixed)
    adapters = tuple(map(Adapter.of, program.adapters))
    plan = plan_dial(header, program, [folder / one.file for one in adapters], {}, [sha256_file(base)], layout)
    write_dial(plan, folder / "base.gguf")
    assert sum(path.stat().st_size for path in folder.glob("*.gguf")) == plan.nbytes
    return Made(Path(base), folder, rules, Dial("base.gguf", adapters, mixed))


def overlapping_rules(layers, width):
    """Three poles; each two clamp three neurons in common, all of them two, and one shifts what another clamps."""
    rules = {}
    for place, pole in enumerate(POLES):
        own = random_rule(layers, width, seed=place)
        clamp, shift = own.clamp.copy(), own.shift.copy()
        clamp[: layers - 1, 0:2] = True
        for other in range(3):
            if other != place:
                first = 2 + 3 * (place + other - 1)
                clamp[: layers - 1, first : first + 3] = True
        shift[clamp] = 0
        shift[0, 2 + 3 * (2 - place)] = 1.0  # in common to the other two
        rules[pole] = SteeringRule(shift, clamp)
    return rules


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory):
    """A dial of three poles on a float32 model, as wide as vector instructions like it: bitwise needs the same sums."""
    return make(make_tiny(width=128), tmp_path_factory.mktemp("dial"), overlapping_rules(3, 128))


@pytest.fixture(scope="module")
def reference(made):
    return ReferenceLlama(made.base)


def check(made, reference, mix, limit=KL_DIAL):
    rules = [made.rules[spec.pole] for spec in map(parse_trait, mix)]
    strengths = [spec.strength for spec in map(parse_trait, mix)]
    shift = sum(rule.shift.astype(float) * strength for rule, strength in zip(rules, strengths, strict=True))
    clamp = np.any([rule.clamp for rule in rules], axis=0)
    want = reference.logits(TOKENS, shift, clamp)
    error, effect = kl(want, made.run(*mix)), kl(want, reference.logits(TOKENS))
    assert error < limit
    assert effect > max(0.03, 100 * error)
    return want, error


def test_all_at_zero_is_bitwise_the_model(made):
    plain = lora_logits(made.base, {}, TOKENS)
    np.testing.assert_array_equal(made.run(), plain)
    assert not np.array_equal(made.run(POLES[0]), plain)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1, 1.5])
@pytest.mark.parametrize("pole", POLES)
def test_a_pole_at_any_strength_is_the_rule_at_that_strength(made, reference, pole, strength):
    check(made, reference, [f"{pole}:{strength}"])


@pytest.mark.parametrize(
    "mix",
    [
        ("extraversion+", "openness+"),
        ("extraversion+:0.5", "neuroticism-:1.5"),
        ("openness+:0.25", "neuroticism-"),
        ("extraversion+:0.7", "openness+", "neuroticism-:0.4"),
    ],
    ids=" ".join,
)
def test_mixed_poles_are_the_composed_rule(made, reference, mix):
    want, error = check(made, reference, mix)
    assert kl(want, made.run(*mix, without="overlap")) > 20 * max(error, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_ragged_layers(make_tiny, tmp_path, family):
    """The adapters are for the architecture and the widths that the base then has."""
    base, rules = make_tiny(width=128, family=family), overlapping_rules(3, 128)
    made = make(base, tmp_path, rules, layout="ragged")
    header = read_gguf(tmp_path / "base.gguf")
    assert header.architecture == "deci"
    assert len(set(mlp_widths(header))) > 1
    plain = lora_logits(base, {}, TOKENS)
    if family == "llama":  # qwen2's rows are summed in another order
        np.testing.assert_array_equal(made.run(), plain)
    assert kl(made.run(), plain) < KL_SAME_MODEL
    check(made, ReferenceLlama(base), [POLES[0], f"{POLES[1]}:0.5"])


def test_shifts_alone_are_exact(make_tiny, tmp_path):
    base = make_tiny(width=128)
    rules = {pole: random_rule(3, 128, seed, per_layer=(9, 0)) for seed, pole in enumerate(POLES[:2])}
    made = make(base, tmp_path, rules)
    assert {one.kind for one in made.dial.adapters} == {"shift"}
    for mix in ([f"{POLES[0]}:1.5"], [f"{POLES[0]}:0.25", POLES[1]]):
        check(made, ReferenceLlama(base), mix, KL_DIAL_SHIFTS)


@pytest.mark.parametrize("kind", NARROW + WIDE)
def test_every_type(make_tiny, tmp_path, kind):
    """Bitwise the model at zero, the model's file back by strip, existing blocks kept; at 1 the rule."""
    base = make_tiny(kind, width=128) if kind in NARROW else tiny_of(make_tiny, kind)
    header = read_gguf(base)
    rule = random_rule(header.get("llama.block_count"), header.get("llama.feed_forward_length"))
    made = make(base, tmp_path, {POLES[0]: rule}, units=4)
    plain = lora_logits(base, {}, TOKENS)
    np.testing.assert_array_equal(made.run(), plain)
    reference = ReferenceLlama(base)
    want = reference.logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, made.run(POLES[0]))
    quantised = KL_TINY_QUANTISED.get(kind, KL_TINY_QUANTISED_OTHERS)
    assert error < (max(KL_TINY_FLOAT, 2 * kl(reference.logits(TOKENS), plain)) if kind in FLOATS else quantised)
    assert kl(want, plain) > 4 * error
    strip(tmp_path / "base.gguf", tmp_path / "stripped.gguf", force=False)
    assert (tmp_path / "stripped.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("family", ["granite", "minicpm", "mistral3", "deci", "qwen2"])
@pytest.mark.parametrize("biases", [(), BIASES], ids=["plain", "biases"])
def test_every_family_that_bakes(make_tiny, tmp_path, family, biases):
    if family in ("mistral3", "qwen2") and biases:
        pytest.skip("no such model")
    base = make_tiny(family=family, biases=biases, width=128)
    rules = {POLES[0]: rule_within(base), POLES[1]: rule_within(base, seed=1)}
    made = make(base, tmp_path, rules)
    check(made, ReferenceLlama(base), POLES[:2], KL_TINY_FLOAT)
    architecture = "llama" if family == "qwen2" else family
    for one in made.dial.adapters:
        assert GGUFReader(tmp_path / one.file).fields["general.architecture"].contents() == architecture


def test_layers_with_a_width_each(make_tiny, tmp_path):
    base = make_tiny(family="deci", width=(128, 0, 64, 32), layers=4)
    rule = rule_within(base)
    rule.shift[3], rule.clamp[3] = 0, False
    made = make(base, tmp_path, {POLES[0]: rule})
    check(made, ReferenceLlama(base), POLES[:1], KL_TINY_FLOAT)
    assert [tensor.name.split(".")[1] for tensor in GGUFReader(tmp_path / made.dial.adapters[0].file).tensors] == [
        *("0", "0"),
        *("2", "2"),
    ]


def test_types_may_differ_between_layers(make_tiny, tmp_path):
    kinds = {"blk.0.ffn_down.weight": "F16", "blk.1.ffn_down.weight": "Q6_K", "blk.2.ffn_down.weight": "F32"}
    base = make_tiny("Q5_1", hidden=256, width=512, layers=4, kinds=tuple(kinds.items()))
    rule = random_rule(4, 512)
    made = make(base, tmp_path, {POLES[0]: rule}, units=4)
    types = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / made.dial.adapters[0].file).tensors}
    assert [types[f"blk.{layer}.ffn_down.weight.lora_a"] for layer in range(3)] == ["F16", "Q4_0", "F32"]
    want = ReferenceLlama(base).logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, made.run(POLES[0]))
    assert error < KL_TINY_QUANTISED_OTHERS
    assert kl(want, lora_logits(base, {}, TOKENS)) > 4 * error


def test_units_are_shared_between_poles(made):
    """One a shifted neuron and five a clamped one, however many poles want them."""
    shifted, clamped = (
        np.any([getattr(one, name) != 0 for one in made.rules.values()], axis=0) for name in ("shift", "clamp")
    )
    most = int((shifted.sum(1) + 5 * clamped.sum(1)).max())
    width = GGUFReader(made.folder / "base.gguf").fields["llama.feed_forward_length"].contents()
    assert width == 128 + -(-most // 32) * 32
    rule = made.rules[POLES[0]]
    shift, clamp = (GGUFReader(made.folder / f"{POLES[0]}.{kind}.gguf").tensors for kind in ("shift", "clamp"))
    assert shift[0].shape.tolist() == [width, np.count_nonzero(rule.shift[0])]
    assert clamp[0].shape.tolist() == [width, rule.clamp[0].sum()]
    assert [one.name for one in shift[:2]] == ["blk.0.ffn_down.weight.lora_a", "blk.0.ffn_down.weight.lora_b"]


def test_an_adapter_says_what_llama_cpp_asks_for(made):
    fields = GGUFReader(made.folder / f"{POLES[0]}.shift.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert "adapter.lora.alpha" not in fields  # it would be divided by each tensor's rank


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0"])
def test_signs_are_exact(kind):
    from gguf import GGMLQuantizationType

    signs = np.random.default_rng(0).integers(-1, 2, (7, 96)).astype(np.int8)
    encoded = encode_signs(signs, kind)
    if kind in ("F32", "F16"):
        encoded = encoded.view(np.dtype(kind.replace("F", "f")[0] + str(int(kind[1:]) // 8)))
    np.testing.assert_array_equal(dequantize(encoded, GGMLQuantizationType[kind]), signs)


def test_scales_of_a_mix():
    names = ["extraversion+", "openness+", "neuroticism-"]
    adapters = [Adapter(kind, (name,), "") for name in names for kind in ("shift", "clamp")]
    adapters += [
        Adapter("overlap", tuple(names[at] for at in some), "") for some in ((0, 1), (0, 2), (1, 2), (0, 1, 2))
    ]
    dial = Dial("base.gguf", tuple(adapters), 3)
    specs = lambda *texts: [parse_trait(text) for text in texts]  # noqa: E731
    assert dial.scales(specs("openness+:0.3")) == [0, 0, 0.3, 1, 0, 0, 0, 0, 0, 0]
    assert dial.scales(specs("openness+:0.3", "calm")) == [0, 0, 0.3, 1, 1, 1, 0, 0, -1, 0]
    assert dial.scales(specs(*names)) == [1, 1, 1, 1, 1, 1, -1, -1, -1, 1]
    assert dial.request([]) == {"lora": [{"id": 0, "scale": 0.0}]}
    assert dial.request(specs("extraversion+:2")) == {"lora": [{"id": 0, "scale": 2.0}, {"id": 1, "scale": 1.0}]}
    fewer = Dial("base.gguf", tuple(adapters[:-1]), 2)
    with pytest.raises(TraitError, match="this dial mixes 2 such poles; make it again with --mix 3"):
        fewer.scales(specs(*names))
    apart = Dial("base.gguf", tuple(adapters[:-2]), 2)  # the last two clamp nothing in common, so the three do not
    assert apart.scales(specs(*names)) == [1, 1, 1, 1, 1, 1, -1, -1]
    with pytest.raises(TraitError, match="openness-: is not on this dial, which has extraversion"):
        dial.scales(specs("openness-"))
    with pytest.raises(TraitError, match="given twice"):
        dial.scales(specs("calm", "neuroticism-:2"))


def test_strengths_add_up_like_composed_rules(made):
    """What the reference computes is what the package composes."""
    rules = [made.rules[pole] for pole in POLES]
    both = compose(rules)
    np.testing.assert_array_equal(both.clamp, np.any([rule.clamp for rule in rules], axis=0))
    assert both.clamped < sum(rule.clamped for rule in rules)
