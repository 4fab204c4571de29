"""What a model card states is taken as it stands; one that would become gigabytes says no more than it has."""

import pytest

from npti_export.front_matter import stated
from npti_export.models import _card_license


def card(folder, text):
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("front", "says"),
    [
        ("license: mit", "mit"),
        ("\n---\r\nlanguage:\r\n- en\r\nlicense: apache-2.0\r\n---\r\n# x", "apache-2.0"),
        ("language: {a: [b, {c: license}], license: no}\nlicense: 'llama3.2'", "llama3.2"),
        ("base: license\nlicense: other", "other"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit\ntags: [x]", "mit"),
        ("license: 2", "2"),
        ("? [a, b]\n: c\n? license\n: mit", "mit"),
        ("a: &here x\nb: *here\nlicense: mit", "mit"),
        ("license: mit\nbroken: [", "mit"),
        ("license:", None),
        ("license: ~\na: b", None),
        ("license: null", None),
        ("license: {name: mit}", None),
        ("license: [[mit]]", None),
        ("license: [" + "mit, " * 9 + "]", None),
        ("license: " + "x" * 300, None),
        ('license: "a\\nb"', None),
        ("model: {license: mit}", None),
        ("- license: mit", None),
        ("just text", None),
        ("license: *nothing", None),
        ("", None),
        ("'license: mit", None),
        ("\x00", None),
    ],
)
def test_a_license(tmp_path, front, says):
    assert _card_license(card(tmp_path, front if "---" in front else f"---\n{front}\n---\n# Model\n")) == says


def test_cards_without_front_matter(tmp_path):
    assert _card_license(tmp_path) is None
    for text in ("license: mit\n", "# A\n---\nlicense: mit\n---\n", "---\nlicense: mit\n", ""):
        assert _card_license(card(tmp_path, text)) is None
    (tmp_path / "README.md").write_bytes(b"---\nname: \xff\xfe\nlicense: mit\n---\n")
    assert _card_license(tmp_path) == "mit"


def test_aliases_of_aliases_stay_what_they_are(tmp_path):
    """354 bytes of which a loader makes a list of 10^10 texts."""
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 11)]
    bomb = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *levels])
    assert _card_license(card(tmp_path, f"---\n{bomb}\nlicense: *a10\n---\n")) is None
    assert _card_license(card(tmp_path, f"---\n{bomb}\nlicense: [*a10]\n---\n")) is None
    assert _card_license(card(tmp_path, f"---\n{bomb}\nlicense: mit\n---\n")) == "mit"
    assert stated(tmp_path / "README.md", "a10") == []


@pytest.mark.parametrize("text", ["[" * 90_000, "- " * 50_000, "{a: " * 20_000, "&a " * 30_000, "? " * 50_000])
def test_nested_without_end(tmp_path, text):
    assert _card_license(card(tmp_path, f"---\nx:\n {text}\nlicense: mit\n---\n")) is None


def test_a_card_larger_than_one_can_be(tmp_path):
    filling = "x: y\n" * 10_000
    assert _card_license(card(tmp_path, f"---\nlicense: mit\n---\n{filling * 9}")) == "mit"
    assert _card_license(card(tmp_path, f"---\nlicense: mit\n{filling * 9}---\n")) is None
