"""What is written is read back the same, whatever it is: recipes, notations, rules, profiles, benches, GGUF headers."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from npti_export.append_only import AppendOnly
from npti_export.bench import load_bench
from npti_export.bench.imports import How, import_source
from npti_export.bench.published_layout import export_layout
from npti_export.checked import load_checked, save_checked
from npti_export.compiler.kinds import ProgramKind, parse_program
from npti_export.dial.index import parse_mix
from npti_export.errors import NptiError
from npti_export.gguf.reader import read_gguf
from npti_export.gguf.writer import NewTensor, encode_header, encode_value, lay_out
from npti_export.models import ModelShape
from npti_export.profile import NeuronProfile, read_profile, write_profile
from npti_export.profile_io import load_profile, save_profile
from npti_export.recipe import load_recipe, recipe_from_json
from npti_export.rule import SteeringRule
from npti_export.rule_io import decode_rule, encode_rule
from npti_export.traits import FACETS, TraitSpec, is_own_name, parse_recorded, parse_trait
from npti_export.tuning.recipe_file import _toml, write_recipe
from npti_export.tuning.space import Space

quick = functools.partial(
    settings, max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
POSITIVE = st.floats(1e-6, 100, exclude_min=True)
WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(str.strip)
SPECS = st.builds(TraitSpec, st.sampled_from(sorted(FACETS)), st.sampled_from("+-"), st.floats(1e-300, 1e300))
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9))


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- notations


@quick(max_examples=200)
@given(SPECS)
def test_poles(spec):
    assert parse_trait(str(spec)) == spec
    assert parse_recorded(str(spec)) == spec


@quick()
@given(st.from_regex(r"[a-z][a-z0-9]{0,9}([_-][a-z0-9]{1,9})?", fullmatch=True), st.sampled_from("+-"), POSITIVE)
def test_recorded_poles(name, sign, strength):
    assume(is_own_name(name))
    spec = TraitSpec(name, sign, strength)
    assert parse_recorded(str(spec)) == spec
    assert parse_trait(str(spec), known=[name]) == spec


@quick()
@given(st.lists(SPECS, max_size=5))
def test_mixes(specs):
    assert parse_mix(",".join(map(str, specs))) == tuple(specs)


PROGRAMS = st.one_of(
    st.sampled_from([ProgramKind("exact"), ProgramKind("bias")]),
    st.builds(ProgramKind, st.just("lowrank"), st.integers(1, 10**9).map(float)),
    st.builds(ProgramKind, st.just("budget"), st.floats(0, 1000)),
    st.builds(ProgramKind, st.just("kl"), st.floats(1e-300, 1e300)),
)


@quick(max_examples=200)
@given(PROGRAMS)
def test_programs(kind):
    assert parse_program(str(kind)) == kind


# --- recipes

NUMBERS = {
    "rule.gamma": POSITIVE, "rule.slope": st.floats(1e-9, 1e300), "rule.center": st.floats(0, 1),
    "rule.percentile": st.floats(0.001, 0.999), "rule.matched": st.floats(0, 100), "rule.constant": st.floats(0, 100),
    "rule.effect_size": st.floats(0, 1e300), "rule.magnitude": st.floats(0, 0.999), "select.threshold": st.floats(0, 1),
    "select.at_least": st.integers(0, 10**12), "identify.questions": st.integers(0, 10**6),
    "identify.repetition_penalty": st.floats(0.001, 10), "compile.clamp_units": st.floats(2, 5),
    "compile.program": PROGRAMS.map(str),
}  # fmt: skip
OVERRIDES = st.lists(
    st.sampled_from(sorted(NUMBERS)).flatmap(lambda key: st.tuples(st.just(key), NUMBERS[key])), max_size=6
)


def overridden(pairs):
    """A recipe with them, where they go together."""
    try:
        return load_recipe("npti", [f"{key}={value}" for key, value in pairs])
    except NptiError:
        assume(False)


@quick()
@given(OVERRIDES)
def test_recipes(pairs):
    recipe = overridden(pairs)
    assert recipe_from_json(recipe.to_json()) == recipe
    for key, value in dict(pairs).items():
        section, _, name = key.partition(".")
        assert getattr(getattr(recipe, section), name) == value
        assert load_recipe("npti", [f"{key}={_toml(value)}"]) == load_recipe("npti", [f"{key}={value}"])


@quick(max_examples=15)
@given(OVERRIDES, st.data())
def test_tuned_recipes(place, pairs, data):
    recipe = overridden(pairs)
    space = Space(4, 400)
    draw = type("Draw", (), {
        "suggest_categorical": lambda _, name, choices: data.draw(st.sampled_from(choices)),
        "suggest_float": lambda _, name, low, high, log=False: data.draw(st.floats(low, high)),
        "suggest_int": lambda _, name, low, high, log=False: data.draw(st.integers(low, high)),
    })()  # fmt: skip
    point = space.suggest(draw)
    assert space.point(space.parameters(point)) == point
    path = place / "tuned.toml"
    about = {"fingerprint": "0" * 64, "model": data.draw(WORDS), "comments": [data.draw(WORDS)], "force": True}
    plain = load_recipe("npti")
    path.unlink(missing_ok=True)
    for pole in ("openness+", "calm-"):
        write_recipe(path, "npti", plain, recipe, pole, space.section(point), **about)
    read = load_recipe(str(path))
    assert read.poles["openness+"] == read.poles["calm-"] == space.section(point)
    assert read.identify == recipe.identify


# --- rules, profiles, what is kept


@st.composite
def rules(draw):
    shape = draw(SHAPES)
    shift, constant = (draw(arrays.arrays(np.float32, shape, elements=st.floats(-99, 99, width=32))) for _ in range(2))
    return SteeringRule(shift, draw(arrays.arrays(np.bool_, shape)), constant if draw(st.booleans()) else None)


@quick()
@given(rules())
def test_rules(rule):
    back = decode_rule(encode_rule(rule), "it")
    assert np.array_equal(back.shift, rule.shift)
    assert np.array_equal(back.clamp, rule.clamp)
    assert back.constant is None or np.array_equal(back.constant, rule.constant)
    assert bool(back.constants) == bool(rule.constants)


@st.composite
def profiles(draw):
    shape = draw(SHAPES)

    def matrix(low, high):
        return draw(arrays.arrays(np.float32, shape, elements=st.floats(low, high, width=32)))

    names = ("mean_plus", "mean_minus", "deviation", "matched_plus", "matched_minus")
    more = {name: matrix(-9, 9) for name in names if draw(st.booleans())}
    origin = draw(st.dictionaries(WORDS, st.integers() | WORDS | st.none(), max_size=3))
    parts = [matrix(0, 1), matrix(0, 1), matrix(0, 9), matrix(0, 9)]
    return NeuronProfile(draw(st.sampled_from(sorted(FACETS))), *parts, draw(st.none() | WORDS), origin, **more)


@quick()
@given(profiles())
def test_profiles(place, profile):
    write_profile(profile, place / "p.safetensors", force=True)
    back = read_profile(place / "p.safetensors")
    for field in dataclasses.fields(NeuronProfile):
        one, other = getattr(profile, field.name), getattr(back, field.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@quick(max_examples=25)
@given(profiles())
def test_published_profiles(place, profile):
    """What the two files name: the neurons of each pole, as they are."""
    shape = profile.delta.shape
    assume((profile.delta > 0.1).any() and (profile.delta < -0.1).any())
    path = place / f"{profile.trait.capitalize()}_dict.json"
    save_profile(profile, path, force=True)
    back = load_profile(path, ModelShape(*shape, 1))
    for sign, named in (("+", profile.delta >= 0.1), ("-", profile.delta <= -0.1)):
        own = "p_plus" if sign == "+" else "p_minus"
        assert np.array_equal(getattr(back, own)[named], getattr(profile, own)[named])
        assert np.array_equal(back.a95(sign)[named], profile.a95(sign)[named])
    assert np.allclose(back.delta[abs(profile.delta) > 0.1], profile.delta[abs(profile.delta) > 0.1], atol=1e-6)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@quick()
@given(
    st.dictionaries(st.from_regex(r"[a-z.]{1,8}", fullmatch=True), arrays.arrays(
        st.sampled_from([np.float32, np.int64, np.uint8]), arrays.array_shapes(min_side=0, max_side=3)
    ), max_size=3),
    st.dictionaries(WORDS, JSON, max_size=3),
)  # fmt: skip
def test_kept_arrays(place, tensors, record):
    save_checked(place / "k.safetensors", tensors, record)
    found, said = load_checked(place / "k.safetensors")
    assert said == record
    assert {name: (one.dtype, one.shape, one.tobytes()) for name, one in found.items()} == {
        name: (one.dtype, one.shape, one.tobytes()) for name, one in tensors.items()
    }


@quick()
@given(st.lists(st.dictionaries(WORDS, JSON, min_size=1, max_size=3), max_size=4), st.integers(1, 40))
def test_journals(place, values, cut):
    """Every line comes back, also those before one that a crash tore."""
    path = place / "j.jsonl"
    path.unlink(missing_ok=True)
    kept = AppendOnly(path)
    for value in values:
        kept.append(value)
    kept.close()
    data = path.read_bytes()
    torn = data + (data.split(b"\n")[0][:cut] if data else b"")
    path.write_bytes(torn)
    kept = AppendOnly(path)
    kept.close()
    assert [json.loads(body) for _, body in kept.lines()] == values


# --- benches


@quick(max_examples=20)
@given(st.lists(WORDS, min_size=4, max_size=8, unique_by=lambda text: " ".join(text.split()).casefold()))
def test_benches(place, texts):
    """Through our own files, and out to the published layout and back."""
    half = len(texts) // 2
    folder, out, again = (place / name for name in ("openness", "layout", "again"))
    for old in (folder, out, again):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    people = [{"pole": "+-"[number % 2], "text": text} for number, text in enumerate(texts)]
    asked = [{"split": "search" if number < half else "test", "text": text} for number, text in enumerate(texts)]
    for name, items in (("personas.jsonl", people), ("questions.jsonl", asked)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in items), encoding="utf-8")
    bench = load_bench("openness", folder)
    assert [one.text for one in bench.pole("+")] == texts[::2]
    assert {one.text for one in bench.split("test")} == set(texts[half:])
    export_layout([bench], out, force=True)
    import_source(out, again, How(), skip_bad=False, force=True)
    back = load_bench("openness", again / "openness")
    for one, other in ((bench.pole, back.pole), (bench.split, back.split)):
        for part in ("+", "-") if one == bench.pole else ("search", "test"):
            assert [item.text for item in one(part)] == [item.text for item in other(part)]


# --- GGUF


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
NUMBER = st.integers(0, 2**64 - 1) | st.floats(allow_nan=False)
VALUES = NUMBER | WORDS | st.binary(max_size=40)


@quick()
@given(st.dictionaries(NAMES.map("x.{}".format), VALUES, max_size=5), st.lists(st.integers(1, 40), max_size=4))
def test_headers_of_ours(place, values, rows):
    """Written by us, read by us."""
    tensors = lay_out([NewTensor(f"t{at}", (count,), 0, 4 * count) for at, count in enumerate(rows)], 32)
    keys = [("general.architecture", encode_value("llama")), *((key, encode_value(one)) for key, one in values.items())]
    header = encode_header(3, keys, tensors, 32)
    path = place / "m.gguf"
    end = max((one.offset + one.nbytes for one in tensors), default=0)
    path.write_bytes(header + bytes(-(-end // 32) * 32))
    back = read_gguf(path)
    for key, value in values.items():
        assert (back.data(key) if isinstance(value, bytes) else back.by_key[key].value) == value
    assert [(one.name, one.shape, one.nbytes) for one in back.tensors] == [(t.name, t.shape, t.nbytes) for t in tensors]


LISTS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4) | st.lists(WORDS, min_size=1, max_size=3)
KINDS = {int: GGUFValueType.UINT64, float: GGUFValueType.FLOAT64}


@quick()
@given(st.dictionaries(NAMES.map("x.{}".format), NUMBER | WORDS | st.booleans() | LISTS, max_size=5))
def test_headers_of_gguf_py(place, values):
    """Written by gguf-py, read by us; and by ours again, byte for byte."""
    path = place / "g.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_key_value(key, value, KINDS.get(type(value)) or GGUFValueType.get_type(value))
    writer.add_tensor("t", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = read_gguf(path)
    for key, value in values.items():
        assert back.by_key[key].value == value
    again = encode_header(3, [(one.key, one.raw) for one in back.keys], [NewTensor("t", (3,), 0, 12)], 32)
    assert path.read_bytes().startswith(again)
