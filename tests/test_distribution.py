"""The histogram of a pole's neurons, against plain counting of the activations themselves."""

import numpy as np
import pytest

from npti_export.errors import ProfileError
from npti_export.evaluate.distribution import distribution, trait_neurons
from npti_export.profile import NeuronProfile
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.rule_io import Provenance, SavedRule
from npti_export.stats import EDGES, ActivationStats, ContrastStats, PairSpread

SHAPE, TOKENS = (3, 20), 400


def counted(values):
    """Statistics of activations ``[tokens, layers, width]``."""
    histogram = np.zeros((*SHAPE, len(EDGES) + 1), np.int32)
    for token in values:
        for place in np.ndindex(SHAPE):
            if token[place] > 0:
                histogram[place][np.searchsorted(EDGES, token[place], side="right")] += 1
    active = (values > 0).sum(0)
    return ActivationStats(len(values), active, histogram, values.max(0).astype(np.float32))


@pytest.fixture(scope="module")
def activations():
    rng = np.random.default_rng(0)
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    return silu(rng.normal(0.8, 1, (TOKENS, *SHAPE))), silu(rng.normal(-0.4, 1, (TOKENS, *SHAPE)))


@pytest.mark.parametrize("sign", "+-")
def test_against_plain_counting(activations, sign):
    plus, minus = activations
    neurons = np.random.default_rng(1).random(SHAPE) < 0.3
    stats = ContrastStats(counted(plus), counted(minus), PairSpread.empty(*SHAPE))
    found = distribution(stats, neurons, sign)
    sides = activations if sign == "+" else activations[::-1]
    for shares, values in zip((found.wanted, found.opposite), sides, strict=True):
        own = values[:, neurons].ravel()
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx((own <= 0).mean())
        inner = np.clip(own[own > 0], None, found.edges[-1] - 1e-9)
        want = np.histogram(inner, found.edges[1:])[0] / len(own)
        assert np.abs(np.cumsum(shares[1:]) - np.cumsum(want)).max() < 0.02  # a counted bin is 7% wide
        assert len(shares) == len(found.edges) - 1
    assert np.mean(sides[0][:, neurons] > 0) != pytest.approx(np.mean(sides[1][:, neurons] > 0), abs=0.2)
    assert np.diff(found.edges).min() > 0
    everything = np.concatenate([one[:, neurons].ravel() for one in activations])
    assert np.mean(everything < found.edges[-1] * 1.08) > 0.99
    assert found.edges[-1] < everything.max() * 1.08


def saved(rule, traits):
    about = Provenance(trait=traits, gamma=1.0, recipe="{}", model="m", model_type="llama", fingerprint=None)
    return SavedRule(rule, about)


def test_nothing_to_show(activations):
    stats = ContrastStats(counted(activations[0]), counted(activations[1]), PairSpread.empty(*SHAPE))
    assert distribution(stats, np.zeros(SHAPE, bool), "+") is None
    assert distribution(ContrastStats.empty(*SHAPE), np.ones(SHAPE, bool), "+") is None


def test_which_neurons_are_shown():
    rng = np.random.default_rng(5)
    plus, minus, *rest = rng.random((4, *SHAPE)).astype(np.float32)
    profile, recipe = NeuronProfile("openness", plus, minus, *rest, None), load_recipe("npti")
    shift = np.where(rng.random(SHAPE) < 0.2, 1.0, 0.0).astype(np.float32)
    clamp, constant = np.ones(SHAPE, bool), np.ones(SHAPE, np.float32)
    shifts, constants = SteeringRule(shift, clamp), SteeringRule(np.zeros_like(shift), np.zeros_like(clamp), constant)
    for traits in ("openness-", "openness-:0.5", "conventional"):
        found = trait_neurons(saved(shifts, traits), "openness-", profile, recipe)
        np.testing.assert_array_equal(found, shift > 0)
    own = minus - plus >= np.float32(0.1)
    for rule in (
        None,
        saved(constants, "openness-"),
        saved(shifts, "openness- extraversion+"),  # of two poles, whose neurons cannot be told apart
        saved(shifts, "openness+"),
    ):
        np.testing.assert_array_equal(trait_neurons(rule, "openness-", profile, recipe), own)
    np.testing.assert_array_equal(
        trait_neurons(saved(shifts, "openness-"), "openness+", profile, recipe), plus - minus >= np.float32(0.1)
    )
    with pytest.raises(ProfileError, match="no neuron"):
        trait_neurons(None, "openness+", NeuronProfile("openness", plus, plus, *rest, None), recipe)
