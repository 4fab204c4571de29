"""Selection, profiles and the rule against the plainest Python."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tolerances import FLOAT32

from npti_export.errors import OutputError, ProfileError, RecipeError
from npti_export.identify.select import pole_neurons, qualifying, rank
from npti_export.inspection import inspect_file
from npti_export.models import ModelShape, gguf_source
from npti_export.profile import FIELDS, NeuronProfile
from npti_export.profile_io import load_profile, save_profile
from npti_export.published import published_rows
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule, compose
from npti_export.traits import TraitSpec, parse_trait

SHARED = Path(__file__).parents[2] / "shared" / "data" / "npti" / "neuron_results"
LLAMA_3_8B = ModelShape(32, 14336, 4096)


def make_profile(layers=3, width=20, seed=0, trait="extraversion"):
    rng = np.random.default_rng(seed)
    arrays = [rng.uniform(0, 1, (layers, width)).astype(np.float32) for _ in range(2)]
    a95 = [rng.uniform(0.1, 2, (layers, width)).astype(np.float32) for _ in range(2)]
    return NeuronProfile(trait, *arrays, *a95, "f" * 64, {"model": "made up"})


def plain_selection(profile, sign, threshold, at_least, at_most):
    """Sort all neurons in a list and walk down it."""
    towards = 1 if sign == "+" else -1
    scored = []
    for layer in range(profile.p_plus.shape[0]):
        for neuron in range(profile.p_plus.shape[1]):
            delta = float(profile.p_plus[layer, neuron]) - float(profile.p_minus[layer, neuron])
            scored.append((-towards * delta, layer, neuron))
    scored.sort()
    chosen = []
    for place, (minus, layer, neuron) in enumerate(scored):
        if -minus > 0 and (-minus >= threshold or place < at_least):
            chosen.append((layer, neuron))
    return chosen[:at_most]


@pytest.mark.parametrize("sign", ["+", "-"])
@pytest.mark.parametrize(
    ("threshold", "at_least", "at_most"), [(0.1, 0, None), (0.5, 0, None), (0.9, 12, None), (0.1, 5, 9)]
)
def test_selection(sign, threshold, at_least, at_most):
    profile = make_profile()
    found = list(
        zip(*(part.tolist() for part in pole_neurons(profile, sign, threshold, at_least, at_most)), strict=True)
    )
    assert found == plain_selection(profile, sign, threshold, at_least, at_most)
    assert 0 < len(found) < profile.p_plus.size


@given(
    st.lists(st.sampled_from([-0.5, -0.0, 0.0, 1e-9, 0.1 - 1e-8, 0.1, 0.2, 0.3]) | st.floats(-1, 1), max_size=40),
    st.sampled_from([0.0, 0.1, 0.2, 1.0]),
    st.integers(0, 50),
    st.none() | st.integers(1, 50),
)
@settings(max_examples=500, deadline=None)
def test_ranks_are_those_of_a_stable_sort(strength, threshold, at_least, at_most):
    """Ties, zeros, and more asked for than there are."""
    order = sorted(range(len(strength)), key=lambda place: -strength[place])
    count = max(sum(one >= threshold - 1e-7 for one in strength), at_least)
    want = [place for place in order[:count] if strength[place] > 0][:at_most]
    asked = np.array(strength, np.float64), threshold, at_least, at_most
    assert rank(*asked).tolist() == want
    assert np.flatnonzero(qualifying(*asked)).tolist() == sorted(want)


def test_a_delta_of_exactly_the_threshold_is_in():
    p_plus, p_minus = np.array([[0.3, 0.3]], np.float32), np.array([[0.2, 0.21]], np.float32)
    profile = NeuronProfile("openness", p_plus, p_minus, p_plus, p_minus, None)
    assert pole_neurons(profile, "+", 0.1, 0, None)[1].tolist() == [0]


def test_nothing_selected_is_an_error():
    profile = make_profile()
    with pytest.raises(ProfileError, match=r"no neuron of extraversion\+ has"):
        pole_neurons(profile, "+", 1.0, 0, None)
    even = NeuronProfile("openness", *[np.full((1, 3), 0.5, np.float32)] * 4, None)
    with pytest.raises(ProfileError):
        pole_neurons(even, "+", 0.1, 3, None)  # at_least never takes a delta of zero


@pytest.mark.parametrize("text", ["extraversion+", "extraversion-", "extraversion-:0.5"])
def test_rule_neuron_by_neuron(text):
    profile, spec = make_profile(), parse_trait(text)
    rule = build_rule(profile, spec, load_recipe("npti", ["rule.gamma=1.3"]))
    for layer in range(3):
        for neuron in range(20):
            delta = float(profile.p_plus[layer, neuron]) - float(profile.p_minus[layer, neuron])
            if spec.sign == "-":
                delta = -delta
            a95 = float((profile.a95_plus if spec.sign == "+" else profile.a95_minus)[layer, neuron])
            shift = 1.3 * spec.strength * a95 / (1 + math.exp(-10 * (abs(delta) - 0.15))) if delta >= 0.1 else 0.0
            assert rule.shift[layer, neuron] == pytest.approx(shift, rel=FLOAT32 * 10, abs=FLOAT32)
            assert rule.clamp[layer, neuron] == (delta <= -0.1)
    assert rule.shifted > 5
    assert rule.clamped > 5


def test_ablations_and_composition():
    profile, spec = make_profile(), TraitSpec("extraversion", "+")
    whole = build_rule(profile, spec, load_recipe("npti"))
    shift = build_rule(profile, spec, load_recipe("npti", ["rule.clamp=false"]))
    clamp = build_rule(profile, spec, load_recipe("npti", ["rule.shift=false"]))
    assert (shift.clamped, clamp.shifted) == (0, 0)
    both = compose([shift, clamp])
    np.testing.assert_array_equal(both.shift, whole.shift)
    np.testing.assert_array_equal(both.clamp, whole.clamp)
    np.testing.assert_array_equal(compose([whole, whole]).shift, 2 * whole.shift)
    np.testing.assert_array_equal(compose([whole, whole]).clamp, whole.clamp)
    with pytest.raises(ProfileError, match="changes no neuron"):
        build_rule(profile, spec, load_recipe("npti", ["rule.last_layer=0.01"]))
    with pytest.raises(RecipeError, match="all off"):
        load_recipe("npti", ["rule.clamp=false", "rule.shift=false"])


def test_profiles_round_trip(tmp_path):
    profile = make_profile()
    save_profile(profile, tmp_path / "p.safetensors", force=False)
    read = load_profile(tmp_path / "p.safetensors", ModelShape(3, 20, 8), "extraversion")
    for field in ("p_plus", "p_minus", "a95_plus", "a95_minus"):
        np.testing.assert_array_equal(getattr(read, field), getattr(profile, field))
    assert (read.trait, read.fingerprint, read.origin) == (profile.trait, profile.fingerprint, profile.origin)
    with pytest.raises(ProfileError, match="not of openness"):
        load_profile(tmp_path / "p.safetensors", ModelShape(3, 20, 8), "openness")


def test_a_bare_name_holds_a_profile_too(tmp_path):
    save_profile(make_profile(), tmp_path / "profile", force=False)
    assert inspect_file(tmp_path / "profile")["trait"] == "extraversion"
    np.testing.assert_array_equal(load_profile(tmp_path / "profile", ModelShape(3, 20, 8)).delta, make_profile().delta)


def test_published_format_round_trip_gives_the_same_rule(tmp_path):
    profile = make_profile()
    plus, minus = save_profile(profile, tmp_path / "Extraversion_dict.json", force=False)
    assert (plus.name, minus.name) == ("Extraversion_dict.json", "Extraversion_reversed_dict.json")
    for name in (plus, minus):
        read = load_profile(name, ModelShape(3, 20, 8), "extraversion")
        for sign in "+-":
            spec = TraitSpec("extraversion", sign)
            want, got = build_rule(profile, spec, load_recipe("npti")), build_rule(read, spec, load_recipe("npti"))
            np.testing.assert_allclose(got.shift, want.shift, rtol=1e-5)
            np.testing.assert_array_equal(got.clamp, want.clamp)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("{}", "holds no neurons"),
        ('{"0": [[0, 1, 0.5, 0.9]]}', "not [layer, neuron, delta, p, a95]"),
        ('{"0": [[0, "x", 0.5, 0.9, 1.0]]}', "not [layer, neuron, delta, p, a95]"),
        ('{"0": 3}', "not [layer, neuron, delta, p, a95]"),
        ('{"1": [[0, 1, 0.5, 0.9, 1.0]]}', "another layer"),
        ('{"0": [[0, -1, 0.5, 0.9, 1.0]]}', "negative"),
        ('{"0": [[0, Infinity, 0.5, 0.9, 1.0]]}', "has an entry that is not"),
        ('{"0": [[0, 1.5, 0.5, 0.9, 1.0]]}', "make no sense"),
        ('{"0": [[0, 1, -Infinity, 0.9, 1.0]]}', "make no sense"),
        ('{"0": []}', "holds no neurons"),
        ('{"0": [[0, 20, 0.5, 0.9, 1.0]]}', "neuron 20 of layer 0, but the model has 3 layers of 20 neurons"),
    ],
)
def test_bad_published_files(tmp_path, content, says):
    for name in ("Openness.json", "Openness_reversed.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ProfileError) as error:
        load_profile(tmp_path / "Openness.json", ModelShape(3, 20, 8))
    assert says in str(error.value)


def test_half_a_published_pair(tmp_path):
    (tmp_path / "Openness_dict.json").write_text('{"0": [[0, 1, 0.5, 0.9, 1.0]]}')
    with pytest.raises(ProfileError, match=r"Openness_reversed_dict.json: missing"):
        load_profile(tmp_path / "Openness_dict.json", ModelShape(3, 20, 8))


def test_the_published_pair_is_written_whole_or_not_at_all(tmp_path):
    one_sided = NeuronProfile("openness", *[np.full((1, 3), p, np.float32) for p in (0.9, 0.1, 1, 1)], None)
    with pytest.raises(ProfileError, match="no neuron of openness-"):
        save_profile(one_sided, tmp_path / "Openness_dict.json", force=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "Extraversion_reversed_dict.json").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        save_profile(make_profile(), tmp_path / "Extraversion_dict.json", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["Extraversion_reversed_dict.json"]
    with pytest.raises(ProfileError, match="after extraversion"):
        save_profile(one_sided, tmp_path / "Extraversion_dict.json", force=True)


def test_damaged_and_foreign_profiles(tmp_path, tiny):
    path = tmp_path / "p.safetensors"
    profile = make_profile()
    save_profile(profile, path, force=False)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ProfileError, match="not a neuron profile, or damaged"):
        load_profile(path, ModelShape(3, 20, 8))
    with pytest.raises(ProfileError, match="no such profile"):
        load_profile(tmp_path / "none.safetensors", ModelShape(3, 20, 8))
    with pytest.raises(ProfileError, match="3 layers of 20 neurons, but tiny F32 has 3 layers of 96 neurons"):
        profile.check_model(gguf_source(tiny))
    other = make_profile(width=96)
    with pytest.raises(ProfileError, match="another model"):
        other.check_model(gguf_source(tiny))
    other.check_model(gguf_source(tiny), any_model=True)
    broken = NeuronProfile("openness", *[np.full((1, 2), np.nan, np.float32)] * 4, None)
    with pytest.raises(ProfileError, match="p_plus holds what is not finite"):
        save_profile(broken, tmp_path / "nan.safetensors", force=False)
    assert not (tmp_path / "nan.safetensors").exists()
    described = json.dumps({"trait": "openness", "fingerprint": None, "origin": {}})
    tensors = {name: getattr(broken, name) for name in FIELDS}
    (tmp_path / "nan.safetensors").write_bytes(save(tensors, metadata={"npti.profile": described}))
    with pytest.raises(ProfileError, match="not finite"):
        load_profile(tmp_path / "nan.safetensors", ModelShape(1, 2, 8))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published neuron files are not on this machine")
def test_the_published_files_of_llama_3_8b():
    profile = load_profile(SHARED / "Agreeableness_dict.json", LLAMA_3_8B)
    rows = published_rows(SHARED / "Agreeableness_dict.json", LLAMA_3_8B)
    assert profile.trait == "agreeableness"
    assert 10_000 < len(rows) < 30_000
    recipe = load_recipe("npti")
    rule = build_rule(profile, TraitSpec("agreeableness", "+"), recipe)
    opposite = published_rows(SHARED / "Agreeableness_reversed_dict.json", LLAMA_3_8B)
    assert rule.shifted == len(rows)
    assert rule.clamped == len(opposite)
    layer, neuron, delta, _, a95 = rows[0]
    assert rule.shift[layer, neuron] == pytest.approx(1.4 * a95 / (1 + math.exp(-10 * (delta - 0.15))), rel=1e-5)


def test_an_equivalent_of_the_published_files_written_here(tmp_path):
    plus = {"1": [[1, 4, 0.75, 0.8, 0.37], [1, 2, 0.2, 0.9, 0.0]], "2": [[2, 0, 0.1, 0.5, -math.inf]]}
    minus = {"0": [[0, 7, 0.8, 0.83, 0.74]]}
    (tmp_path / "Openness_dict.json").write_text(json.dumps(plus))
    (tmp_path / "Openness_reversed_dict.json").write_text(json.dumps(minus))
    rule = build_rule(
        load_profile(tmp_path / "Openness_reversed_dict.json", ModelShape(3, 8, 4)),
        parse_trait("openness+"),
        load_recipe("npti"),
    )
    assert rule.shifted == 1  # a95 of zero or less shifts nothing
    assert rule.shift[1, 4] == pytest.approx(1.4 * 0.37 / (1 + math.exp(-10 * (0.75 - 0.15))), rel=1e-5)
    assert np.argwhere(rule.clamp).tolist() == [[0, 7]]
