"""Repetition and variety of a text, counted by hand."""

import pytest

from npti_export.evaluate.fluency import distinct, reading, repetition, words


@pytest.mark.parametrize(
    ("text", "repeated", "varied"),
    [
        ("", 0, 1),
        ("...!", 0, 1),
        ("one", 0, 1),
        ("one two", 0, 1),
        ("one two three", 0, 1),
        ("no no", 0, 1),
        ("no no no", 0, 1 / 2),
        ("no no no no", 1 / 2, 1 / 3),
        ("I like tea. I like tea, I LIKE TEA!", 4 / 7, 3 / 8),
        ("a b c d a b c", 1 / 5, 4 / 6),
        ("the cat sat on the mat", 0, 1),
    ],
)
def test_figures(text, repeated, varied):
    assert repetition(text) == pytest.approx(repeated)
    assert distinct(text) == pytest.approx(varied)
    found = reading(text, 7)
    assert (found.repetition, found.distinct, found.length) == (repetition(text), distinct(text), 7)


def test_words():
    assert words("Don’t stop — it's 3.5_km, Ärzte!") == ["don't", "stop", "it's", "3", "5", "km", "ärzte"]
    assert words("我喜欢 tea") == ["我", "喜", "欢", "tea"]
    assert repetition("我喜欢我喜欢") == pytest.approx(1 / 4)
    assert words("ok'") == ["ok"]
