"""Methods other than the paper's: constants from what the down projections read, and settings for single poles."""

import numpy as np
import pytest

from npti_export.errors import ProfileError, RecipeError
from npti_export.profile import NeuronProfile, profile_from_stats, read_profile, write_profile
from npti_export.recipe import load_recipe, recipe_from_json
from npti_export.rule import build_rule
from npti_export.stats import ActivationStats
from npti_export.traits import TraitSpec

LAYERS, WIDTH = 4, 50


@pytest.fixture
def profile():
    rng = np.random.default_rng(3)
    p_plus, p_minus = rng.random((2, LAYERS, WIDTH)).astype(np.float32)
    means = rng.normal(size=(2, LAYERS, WIDTH)).astype(np.float32)
    deviation = (0.2 + rng.random((LAYERS, WIDTH)) * 3).astype(np.float32)
    return NeuronProfile("openness", p_plus, p_minus, p_plus, p_minus, None, {}, *means, deviation)


def rule(profile, recipe, pole="+", *overrides, strength=1.0):
    return build_rule(profile, TraitSpec("openness", pole, strength), load_recipe(recipe, overrides))


def test_dpn_le_takes_the_neurons_that_tell_the_poles_apart(profile):
    made = rule(profile, "dpn-le", "-", "rule.magnitude=0.9", "rule.gamma=1.5", strength=2.0)
    sizes = sorted(
        abs(float(a) - float(b)) for a, b in zip(profile.mean_plus.flat, profile.mean_minus.flat, strict=True)
    )
    place = 0.9 * (len(sizes) - 1)  # the quantile, interpolated between its neighbours
    limit = sizes[int(place)] + (place - int(place)) * (sizes[int(place) + 1] - sizes[int(place)])
    expected = np.zeros((LAYERS, WIDTH))
    for layer in range(LAYERS):
        for neuron in range(WIDTH):
            gap = float(profile.mean_minus[layer, neuron]) - float(profile.mean_plus[layer, neuron])
            if abs(gap) > limit and abs(gap) / float(profile.deviation[layer, neuron]) >= 0.8:
                expected[layer, neuron] = 1.5 * 2.0 * gap
    assert 0 < np.count_nonzero(expected) < 0.1 * expected.size
    np.testing.assert_allclose(made.constant, expected, rtol=1e-6)
    assert made.shifted == made.clamped == 0


def test_a_mean_shift_is_the_difference_of_the_means(profile):
    made = rule(profile, "mean-shift", "+", "rule.first_layer=0.25", "rule.last_layer=0.75")
    expected = 2 * (profile.mean_plus.astype(np.float64) - profile.mean_minus)
    expected[[0, 3]] = 0
    np.testing.assert_allclose(made.constant, expected, rtol=1e-6)


def test_constants_go_with_shifts_and_clamps(profile):
    both = rule(profile, "npti", "+", "rule.constant=0.5")
    alone = rule(profile, "npti", "+")
    np.testing.assert_array_equal(both.shift, alone.shift)
    np.testing.assert_array_equal(both.clamp, alone.clamp)
    difference = profile.mean_plus.astype(np.float64) - profile.mean_minus
    np.testing.assert_allclose(both.constant, 1.4 * 0.5 * difference, rtol=1e-6)
    half = rule(profile, "npti", "+", "rule.last_layer=0.5")
    np.testing.assert_array_equal(half.shift[:2], alone.shift[:2])
    assert not half.shift[2:].any()
    assert not half.clamp[2:].any()


def test_what_selects_nothing_or_lacks_the_means_is_refused(profile):
    with pytest.raises(ProfileError, match=r"changes no neuron.*rule.effect_size"):
        rule(profile, "dpn-le", "+", "rule.effect_size=1000")
    published = NeuronProfile("openness", *[profile.p_plus] * 4, None)
    with pytest.raises(ProfileError, match="does not hold what the down projections read"):
        rule(published, "dpn-le")
    with pytest.raises(RecipeError, match="first_layer"):
        load_recipe("npti", ["rule.first_layer=0.5", "rule.last_layer=0.5"])


def test_settings_for_one_pole(profile, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'extends = "npti"\nname = "r"\n[poles."openness+".rule]\ngamma = 0.5\n[poles."openness-"]\n'
        "select = { at_least = 7, at_most = 7, threshold = 1.0 }\nrule = { clamp = false }\n"
    )
    plain = rule(profile, "npti")
    np.testing.assert_allclose(rule(profile, str(path)).shift, plain.shift * np.float32(0.5 / 1.4), rtol=1e-6)
    low = rule(profile, str(path), "-")
    assert (low.shifted, low.clamped) == (7, 0)
    forced = rule(profile, str(path), "+", "rule.gamma=1.4")  # the command line is asked last
    np.testing.assert_array_equal(forced.shift, plain.shift)
    recipe = load_recipe(str(path))
    assert recipe_from_json(recipe.to_json()) == recipe
    path.write_text('extends = "npti"\nname = "r"\n[poles."openness+".rule]\ngama = 0.5\n')
    with pytest.raises(RecipeError, match="gama"):
        load_recipe(str(path))


def test_moments_of_all_tokens_survive_files(tmp_path):
    rng = np.random.default_rng(5)
    values = rng.normal(1, 2, (2, 30, LAYERS, WIDTH)).astype(np.float32)  # pole, token
    stats = []
    for pole in values:
        parts = []
        for some in (pole[:11], pole[11:]):
            active, histogram = np.ones((LAYERS, WIDTH), np.int64), ActivationStats.empty(LAYERS, WIDTH).histogram
            product = np.stack([some.sum(0, dtype=np.float64), np.square(some, dtype=np.float64).sum(0)])
            largest = np.ones((LAYERS, WIDTH), np.float32)
            parts.append(ActivationStats(len(some), active, histogram, largest, product=product))
        stats.append(ActivationStats.empty(LAYERS, WIDTH) + parts[0] + parts[1])
    source = type("Source", (), {"name": "made up", "fingerprint": "f" * 64})
    profile = profile_from_stats("openness", *stats, source, 0.95, {})
    write_profile(profile, tmp_path / "p.safetensors", force=False)
    read = read_profile(tmp_path / "p.safetensors")
    exact = values.astype(np.float64)
    np.testing.assert_allclose(read.mean_plus, exact[0].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read.mean_minus, exact[1].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read.deviation, np.sqrt(exact.var(1).mean(0)), rtol=1e-5)
