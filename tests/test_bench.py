"""The shipped bench is what its README says, and a malformed one is named by file and line."""

import itertools
import json
import re
from collections import Counter

import pytest

from npti_export.bench import SPLITS, load_bench, pair_with_personas, scoring_personas
from npti_export.errors import BenchError
from npti_export.traits import FACETS

LABELS = re.compile(
    r"\b(open-?minded|openness|conscientious\w*|extra?v[eo]r\w*|introv\w*|agreeabl\w*|disagreeab\w*|neurotic\w*|personality)\b",
    re.IGNORECASE,
)


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def trigrams(text):
    tokens = words(text)
    return {tuple(tokens[start : start + 3]) for start in range(len(tokens) - 2)}


@pytest.mark.parametrize("trait", FACETS)
def test_enough_and_balanced(trait):
    bench = load_bench(trait)
    for sign in "+-":
        assert Counter(persona.facet for persona in bench.pole(sign)) == dict.fromkeys(FACETS[trait], 14)
    for split, count in (("search", 68), ("test", 15)):
        facets = Counter(question.facet for question in bench.questions if question.split == split)
        assert facets == dict.fromkeys(FACETS[trait], count)
    topics = Counter(question.topic for question in bench.questions)
    assert len(topics) == 14
    assert max(topics.values()) < 1.2 * min(topics.values())
    persons = Counter(question.person for question in bench.questions)
    assert min(persons.values()) > 0.25 * persons.total()


def test_traits_are_alike_in_length():
    benches = [load_bench(trait) for trait in FACETS]
    for texts in (
        [[one.text for one in bench.questions] for bench in benches],
        [[one.text for one in bench.pole(sign)] for bench in benches for sign in "+-"],
    ):
        means = [sum(len(words(text)) for text in some) / len(some) for some in texts]
        assert max(means) < 1.2 * min(means)


@pytest.mark.parametrize("trait", FACETS)
def test_no_question_names_a_trait(trait):
    for question in load_bench(trait).questions:
        assert not LABELS.search(question.text), question.text
        assert 15 <= len(words(question.text)) <= 50, question.text


def test_no_near_duplicates_within_or_between_traits():
    questions = [question for trait in FACETS for question in load_bench(trait).questions]
    grams = [trigrams(question.text) for question in questions]
    pairs = itertools.combinations(range(len(questions)), 2)
    close = [
        (questions[a].text, questions[b].text)
        for a, b in pairs
        if len(grams[a] & grams[b]) > 0.4 * min(len(grams[a]), len(grams[b]))
    ]
    assert len(questions) == 2490
    assert close == []


def test_personas_of_a_pole_differ():
    for trait in FACETS:
        for sign in "+-":
            texts = [persona.text for persona in load_bench(trait).pole(sign)]
            for one, two in itertools.combinations(map(trigrams, texts), 2):
                assert len(one & two) <= 0.4 * min(len(one), len(two))


def test_any_prefix_of_the_questions_is_balanced_over_facets():
    bench = load_bench("openness")
    for count in (6, 12, 25):
        counts = Counter(question.facet for question in bench.search(count))
        assert max(counts.values()) - min(counts.get(facet, 0) for facet in FACETS["openness"]) <= 1
    assert bench.search(12) == bench.search(24)[:12]
    assert bench.search(12, seed=1) != bench.search(12)
    assert not set(bench.search()) & set(bench.test())


def test_personas_are_used_evenly():
    bench = load_bench("openness")
    used = Counter(persona.text for persona in pair_with_personas(bench, "+", 156, seed=0))
    assert set(used.values()) == {2}


def test_personas_that_score_make_no_answer(tmp_path):
    for trait in FACETS:
        bench = load_bench(trait)
        for sign in "+-":
            scores = set(scoring_personas(bench, sign, 0))
            others = set(pair_with_personas(bench, sign, 200, seed=0))
            assert len(scores) == 6
            assert not scores & others
            assert scores | others == set(bench.pole(sign))
    # few of one's own: half of them score, and an only one does both
    few = "\n".join(json.dumps({"pole": sign, "facet": "trust", "text": f"You are {sign}."}) for sign in "+-")
    (tmp_path / "personas.jsonl").write_text(few)
    asked = [json.dumps({"split": split, "facet": "trust", "topic": "work", "text": "What?"}) for split in SPLITS]
    (tmp_path / "questions.jsonl").write_text("\n".join(asked))
    only = load_bench("agreeableness", tmp_path)
    assert [one.text for one in pair_with_personas(only, "-", 2, seed=0)] == ["You are -."] * 2
    seven = [{"pole": sign, "text": f"You are {sign}, number {at}."} for sign in "+-" for at in range(7)]
    (tmp_path / "personas.jsonl").write_text("\n".join(map(json.dumps, seven)))
    untagged = load_bench("agreeableness", tmp_path)
    assert len(scoring_personas(untagged, "-", 0)) == 3
    assert len(set(pair_with_personas(untagged, "-", 20, seed=0)) | set(scoring_personas(untagged, "-", 0))) == 7


def test_more_questions_than_there_are():
    with pytest.raises(BenchError, match="409 search questions asked for, the bench has 408"):
        load_bench("openness").search(409)


@pytest.mark.parametrize(
    ("personas", "questions", "says"),
    [
        ("", "ok", "personas.jsonl: is empty"),
        ("ok", "", "questions.jsonl: is empty"),
        ("ok", None, "questions.jsonl: cannot be read"),
        ("ok", "{", "questions.jsonl:1: not a JSON object"),
        ("ok", "[1]", "questions.jsonl:1: not a JSON object"),
        ('{"pole": "+", "facet": "trust"}', "ok", "personas.jsonl:1: has keys"),
        ('{"pole": "0", "facet": "trust", "text": "x"}', "ok", "'pole' is '0'"),
        ('{"pole": "+", "facet": "trust", "text": " "}', "ok", "'text' must be a non-empty string"),
        ('{"pole": "+", "facet": "trust", "text": "x"}', "ok", "no persona of pole '-'"),
    ],
)
def test_malformed_bench(tmp_path, personas, questions, says):
    good_personas = "\n".join(json.dumps({"pole": sign, "facet": "trust", "text": "You are."}) for sign in "+-")
    good_questions = "\n".join(
        json.dumps({"split": split, "facet": "trust", "topic": "work", "text": "What now?"})
        for split in ("search", "test")
    )
    (tmp_path / "personas.jsonl").write_text(good_personas if personas == "ok" else personas)
    if questions is not None:
        (tmp_path / "questions.jsonl").write_text(good_questions if questions == "ok" else questions)
    with pytest.raises(BenchError) as error:
        load_bench("agreeableness", tmp_path)
    assert says in str(error.value)
