import pytest
from hypothesis import given
from hypothesis import strategies as st

from npti_export.errors import TraitError
from npti_export.traits import EVERYDAY, FACETS, TraitSpec, parse_trait, parse_trait_name


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("agreeableness+", TraitSpec("agreeableness", "+")),
        ("Openness-", TraitSpec("openness", "-")),
        ("neuroticism-:0.5", TraitSpec("neuroticism", "-", 0.5)),
        ("neuroticism−", TraitSpec("neuroticism", "-")),  # a typographic minus, as pasted from a text
        ("calm", TraitSpec("neuroticism", "-")),
        ("introversion:1.5", TraitSpec("extraversion", "-", 1.5)),
    ],
)
def test_notation(text, spec):
    assert parse_trait(text) == spec


def test_every_everyday_name_means_a_pole():
    for name, pole in EVERYDAY.items():
        assert parse_trait(name).pole == pole
    assert set(EVERYDAY.values()) == {trait + sign for trait in FACETS for sign in "+-"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agreablness+", "did you mean 'agreeableness+'"),
        ("clam", "did you mean 'calm'"),
        ("openness", "openness+ or openness-"),
        ("calm+", "already means neuroticism-"),
        ("openness+:0", "above 0"),
        ("openness+:nan", "above 0"),
        ("openness+:inf", "above 0"),
        ("openness+:-1", "above 0"),
        ("openness+:", "above 0"),
        ("", "not of the form"),
        ("xyzzy+", "lists what there is"),
    ],
)
def test_bad_notation(text, says):
    with pytest.raises(TraitError, match="trait ") as error:
        parse_trait(text)
    assert says in str(error.value)


@given(st.text(max_size=40))
def test_anything_parses_or_is_refused_politely(text):
    try:
        spec = parse_trait(text)
    except TraitError as error:
        assert str(error)
    else:
        assert spec.trait in FACETS
        assert spec.strength > 0


def test_whole_trait_names():
    assert parse_trait_name("Extraversion") == "extraversion"
    assert parse_trait_name("calm") == "neuroticism"
    with pytest.raises(TraitError, match="did you mean"):
        parse_trait_name("extravertion")


def test_six_facets_each():
    assert {len(facets) for facets in FACETS.values()} == {6}
