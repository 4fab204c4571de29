"""A dial in llama.cpp's own server, over HTTP: every request has its own personality, without a restart."""

import pytest
from llama_server import started
from test_bake import bake
from test_dial import POLES, make, overlapping_rules

from npti_export.rule import compose
from npti_export.traits import parse_trait

QUESTION = "How was your day?"


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory):
    return make(make_tiny(width=128), tmp_path_factory.mktemp("served"), overlapping_rules(3, 128))


@pytest.fixture(scope="module")
def served(made):
    with started(made.folder / made.dial.base, [made.folder / one.file for one in made.dial.adapters]) as ask:
        yield ask


def asked(made, served, *mix):
    return served(QUESTION, **made.dial.request([parse_trait(pole) for pole in mix]))


def answer_of(path):
    with started(path) as ask:
        return ask(QUESTION)


def test_each_request_has_its_own_personality(made, served, tmp_path):
    """Zero is the plain server's answer, before and after steered ones; one and a mix are those of baked files."""
    plain = answer_of(made.base)
    rules = [made.rules[pole] for pole in POLES[:2]]
    for name, rule in (("one.gguf", rules[0]), ("two.gguf", compose(rules))):
        bake(made.base, tmp_path / name, rule)
    answers = {
        "zero": asked(made, served),
        "one": asked(made, served, POLES[0]),
        "half": asked(made, served, f"{POLES[0]}:0.5"),
        "again": asked(made, served),
        "two": asked(made, served, *POLES[:2]),
    }
    assert answers["zero"] == answers["again"] == plain
    assert answers["one"] == answer_of(tmp_path / "one.gguf")
    assert answers["two"] == answer_of(tmp_path / "two.gguf")
    assert len(set(answers.values())) == 4


def test_a_request_without_lora_goes_on_from_what_was_cached(made, served):
    """Why a request for no personality lists one at scale 0: see Dial.request; --no-cache-prompt helps, too."""
    plain = asked(made, served)
    asked(made, served, POLES[0])
    assert served(QUESTION) != plain
    assert served(QUESTION, lora=[], cache_prompt=False) == plain
    asked(made, served, POLES[0])
    assert asked(made, served) == plain
