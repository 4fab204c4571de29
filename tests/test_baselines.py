"""Running any rule on one model, and what a steered model is compared with."""

import numpy as np
import pytest
import torch
from plain_rule import logits, plain_rule
from reference import ReferenceLlama, kl
from test_constants import ConstantLlama, constant_rule
from tolerances import KL_TINY_FLOAT, KL_TWO_ENGINES, LOGITS_FLOAT32, LOGITS_LLAMACPP

from npti_export.errors import ArchitectureError, ProfileError
from npti_export.evaluate.baselines import level, method_rule, null_rule, off_level, scaled
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.capability.tasks import neutral_passages
from npti_export.evaluate.engine import LlamaEngine, TorchEngine
from npti_export.models import gguf_source
from npti_export.profile import NeuronProfile
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec

TOKENS = (1, 300, 45, 77, 512, 900, 31, 8, 650, 222, 19, 404, 3, 1000, 99, 250)
RECIPE = load_recipe("npti", ["identify.batch_size=4", "compile.clamp_units=5"])


@pytest.fixture(scope="module")
def rule():
    return constant_rule([96, 96, 96])


@pytest.fixture(scope="module")
def llama_engine(tiny):
    source = gguf_source(tiny)
    with LlamaCppRuntime(tiny, Settings(threads=1), sequences=4, source=source) as base:
        yield LlamaEngine(source, base, tiny, Settings(threads=1), RECIPE)


@pytest.fixture(scope="module")
def torch_engine(tiny_runtime):
    return TorchEngine(tiny_runtime.converted("float32"))


@pytest.fixture(scope="module", params=["llama.cpp", "transformers"])
def engine(request, llama_engine, torch_engine):
    return llama_engine if request.param == "llama.cpp" else torch_engine


def test_a_rule_runs_as_the_reference_says_and_leaves_no_trace(tiny, engine, rule):
    base = engine.base.logits(TOKENS)
    want = ConstantLlama(tiny, rule.constant).logits(TOKENS, rule.shift, rule.clamp)
    prompts = [engine.base.encode([{"role": "user", "content": text}]) for text in ("Why?", "And then?", "Who?")]
    answers = engine.base.generate(prompts, max_new_tokens=8, repetition_penalty=1.1)
    with engine.steered(rule) as runtime:
        assert kl(want, runtime.logits(TOKENS)) < KL_TINY_FLOAT
        assert runtime.generate(prompts, max_new_tokens=8, repetition_penalty=1.1) != answers
    assert kl(want, base) > 100 * KL_TINY_FLOAT
    np.testing.assert_array_equal(engine.base.logits(TOKENS), base)
    assert engine.base.generate(prompts, max_new_tokens=8, repetition_penalty=1.1) == answers
    np.testing.assert_allclose(ReferenceLlama(tiny).logits(TOKENS), base, atol=LOGITS_LLAMACPP)


def test_each_part_of_a_rule_by_itself(tiny, engine, rule):
    nothing = np.zeros_like(rule.shift)
    parts = {
        "shifts": SteeringRule(rule.shift, np.zeros_like(rule.clamp)),
        "clamps": SteeringRule(nothing, rule.clamp),
        "constants": SteeringRule(nothing, np.zeros_like(rule.clamp), rule.constant),
    }
    base = ReferenceLlama(tiny).logits(TOKENS)
    for name, part in parts.items():
        constant = nothing if part.constant is None else part.constant
        want = ConstantLlama(tiny, constant).logits(TOKENS, part.shift, part.clamp)
        with engine.steered(part) as runtime:
            error = kl(want, runtime.logits(TOKENS))
        assert error < KL_TINY_FLOAT < 0.1 * kl(want, base), name


def test_in_torch_it_is_the_plain_rule(torch_engine, rule):
    runtime = torch_engine.base
    with plain_rule(runtime.model, rule):
        want = logits(runtime.model, torch.tensor([TOKENS]))[0].numpy()
    with torch_engine.steered(rule) as steered:
        np.testing.assert_allclose(steered.logits(TOKENS), want, atol=LOGITS_FLOAT32)


def test_a_rule_is_taken_out_again_after_an_error(engine, rule):
    base = engine.base.logits(TOKENS)
    with pytest.raises(RuntimeError, match="of the caller"), engine.steered(rule):
        raise RuntimeError("of the caller")
    np.testing.assert_array_equal(engine.base.logits(TOKENS), base)


def test_a_family_that_nothing_is_baked_into_is_said_at_once(make_tiny):
    path = make_tiny(family="gemma")
    with pytest.raises(ArchitectureError):
        LlamaEngine(gguf_source(path), None, path, Settings(threads=1), RECIPE)


@pytest.fixture
def neutral(engine):
    text = NeutralText(engine.base, neutral_passages()[:2])
    text.keep()
    return text


class Tried:
    """A rule at any strength, and what was asked for."""

    def __init__(self, rule):
        self.rule, self.strengths = rule, []

    def __call__(self, strength):
        self.strengths.append(strength)
        return scaled(self.rule, strength)


def test_a_method_is_brought_to_the_wanted_damage(engine, neutral, rule):
    constants = SteeringRule(np.zeros_like(rule.shift), np.zeros_like(rule.clamp), rule.constant)
    with engine.steered(constants) as runtime:
        own = float(neutral.kl(runtime).mean())
    for share in (0.1, 3.0):
        tried = Tried(constants)
        found = level(engine, tried, neutral, share * own)
        assert found.damage == pytest.approx(share * own, rel=0.1)
        assert (found.strength < 1) == (share < 1)
        np.testing.assert_array_equal(found.rule.constant, constants.constant * np.float32(found.strength))
        assert found.strength in tried.strengths
        assert len(tried.strengths) <= 8
        with engine.steered(found.rule) as runtime:  # measured afresh
            assert float(neutral.kl(runtime).mean()) == pytest.approx(found.damage, rel=KL_TWO_ENGINES)


def test_the_search_stays_within_its_bounds(torch_engine, rule):
    neutral = NeutralText(torch_engine.base, neutral_passages()[:1])
    neutral.keep()
    weak = scaled(SteeringRule(rule.shift, np.zeros_like(rule.clamp)), 1e-3)
    tried = Tried(weak)
    found = level(torch_engine, tried, neutral, 1.0)
    assert max(tried.strengths) <= 32
    assert found.strength == max(tried.strengths) > 16
    tried = Tried(scaled(rule, 50))
    found = level(torch_engine, tried, neutral, 1e-7)
    assert min(tried.strengths) >= 1 / 32
    assert found.strength == min(tried.strengths) < 1 / 16


def test_clamps_alone_have_no_strength(torch_engine, rule):
    neutral = NeutralText(torch_engine.base, neutral_passages()[:1])
    neutral.keep()
    clamps = SteeringRule(np.zeros_like(rule.shift), rule.clamp)
    with torch_engine.steered(clamps) as runtime:
        own = float(neutral.kl(runtime).mean())
    for wanted in (own / 5, own * 5):
        found = level(torch_engine, lambda at: scaled(clamps, at), neutral, wanted)
        assert found.damage == pytest.approx(own)
        np.testing.assert_array_equal(found.rule.clamp, clamps.clamp)


def test_a_rule_that_does_nothing_has_a_level_all_the_same(torch_engine, rule):
    """Its distance is 0 or a rounding below it, which has no logarithm."""
    neutral = NeutralText(torch_engine.base, neutral_passages()[:1])
    neutral.keep()
    nothing = scaled(SteeringRule(rule.shift, np.zeros_like(rule.clamp)), 0)
    found = level(torch_engine, lambda at: nothing, neutral, 1e-6)
    assert 0 < found.damage < 1e-6
    assert found.rule is nothing


def test_random_neurons_are_as_many_in_each_layer_and_get_the_same_numbers(rule):
    null = null_rule(rule, 3)
    for layer in range(len(rule.shift)):
        np.testing.assert_array_equal(np.sort(null.shift[layer]), np.sort(rule.shift[layer]))
        assert null.clamp[layer].sum() == rule.clamp[layer].sum()
        np.testing.assert_array_equal(np.sort(np.abs(null.constant[layer])), np.sort(np.abs(rule.constant[layer])))
        both = lambda one: np.sort(one.shift[layer][one.clamp[layer]])  # noqa: B023, E731
        np.testing.assert_array_equal(both(null), both(rule))
    moved = (null.shift != rule.shift) | (null.clamp != rule.clamp)
    assert moved[:2].any(axis=1).all()
    assert (null.constant != rule.constant).any(axis=1).all()
    again, other = null_rule(rule, 3), null_rule(rule, 4)
    np.testing.assert_array_equal(again.constant, null.constant)
    assert (other.shift != null.shift).any()
    without = null_rule(SteeringRule(rule.shift, rule.clamp), 3)
    assert without.constant is None
    with pytest.raises(ProfileError, match="does nothing"):
        null_rule(scaled(SteeringRule(rule.shift, np.zeros_like(rule.clamp)), 0), 0)


def test_random_signs_of_constants_are_as_often_minus_as_plus(rule):
    constant = np.ones((2, 4000), np.float32)
    found = null_rule(SteeringRule(np.zeros_like(constant), np.zeros(constant.shape, bool), constant), 0)
    assert abs(found.constant.mean()) < 0.05  # four standard errors
    np.testing.assert_array_equal(np.abs(found.constant), constant)


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_dpn_le_with_and_without_its_limit_on_the_effect_size(spread):
    rng = np.random.default_rng(2)
    shape = (3, 400)
    rates, means = rng.random((4, *shape)).astype(np.float32), rng.normal(size=(2, *shape)).astype(np.float32)
    deviation = np.full(shape, spread, np.float32)
    profile = NeuronProfile("openness", *rates, None, {}, *means, deviation)
    pole = TraitSpec("openness", "-", 0.5)
    difference = means[1].astype(np.float64) - means[0]
    kept = np.abs(difference) >= np.sort(np.abs(difference), axis=None)[-6]  # half a percent of 1,200
    found = method_rule("dpn-le-any", profile, pole)
    np.testing.assert_allclose(found.constant, np.where(kept, difference, 0), rtol=1e-6)
    if spread == 1:  # all of them are above 0.8 standard deviations
        np.testing.assert_array_equal(method_rule("dpn-le", profile, pole).constant, found.constant)
    else:
        with pytest.raises(ProfileError):
            method_rule("dpn-le", profile, pole)
    without = NeuronProfile("openness", *rates, None, {})
    with pytest.raises(ProfileError, match="does not hold"):
        method_rule("dpn-le", without, TraitSpec("openness", "-"))


@pytest.mark.parametrize(
    ("damage", "told"), [(0.086, ""), (0.114, ""), (0.053, "at 0.53 times"), (0.17, "at 1.7 times")]
)
def test_a_missed_damage_is_told(damage, told):
    assert off_level(damage, 0.1).startswith(told)
    assert bool(off_level(damage, 0.1)) == bool(told)
