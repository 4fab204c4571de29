"""What ``bench build`` reads from answers, what it rejects, and what it takes for a near-duplicate."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from openai_stub import ADJECTIVES, NOUNS, VERBS

from npti_export import bench
from npti_export.bench.definition import read_definition
from npti_export.bench.making import filters as rules
from npti_export.bench.making.filters import Candidate, filters, first_fault
from npti_export.bench.making.ngrams import grams, overlap
from npti_export.bench.making.parse import read_items, read_verdicts
from npti_export.bench.making.plan import PERSONS, Plan
from npti_export.bench.making.prompts import generator_messages
from npti_export.bench.making.store import Store
from npti_export.bench.making.topics import TOPICS, read_topics
from npti_export.bench.overlap import LIMIT
from npti_export.errors import BenchError

DATA = Path(bench.__file__).parent / "data"
GOOD = "Your neighbour has left a parcel with you and does not come back for two weeks. What do you do with it?"


def definition(trait="extraversion"):
    return read_definition(DATA / trait)


def plan(search=0, test=0, **fields):
    return Plan("questions", definition(), (("search", search), ("test", test)), "stub", **fields)


def verdict(text, person="second", cut=False, **fields):
    found = first_fault(Candidate(text, person, cut), filters(plan(1, **fields)))
    return found and found[0]


@pytest.mark.parametrize(
    ("person", "text"),
    [
        ("second", GOOD),
        ("second", "“I cannot come,” says your sister, and hangs up before you can ask why. What do you make of it?"),
        ("first", "My flatmate has asked me to lend him my car for a month. Would you do it in my place, and why?"),
        ("third", "Mira's train stops in a field, and the lights go out for an hour. What goes through her head?"),
        ("third", "A nurse finds a purse on the night bus and sits down again. What would you tell her to do?"),
        ("second", "Élodie, an old friend, asks whether you will sing at the wedding of her son. What do you answer?"),
    ],
)
def test_good_questions_pass(person, text):
    assert verdict(text, person) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("format", GOOD[:-1]),
        ("format", f"{GOOD} Why?"),
        ("format", f"**{GOOD}**"),
        ("format", f"Question 3: {GOOD}"),
        ("format", f"your {GOOD[5:]}"),
        ("format", GOOD.replace(" ", "\u200b ", 1)),
        ("format", GOOD.replace("parcel", "<b>parcel</b>")),
        ("format", GOOD.replace("parcel", "parcel (https://example.org)")),
        ("language", "Dein Nachbar hat ein Paket für dich angenommen und ist seit Wochen verreist. Was tust du?"),
        ("language", "Ton voisin a laissé un paquet chez toi et ne revient pas depuis des semaines. Que fais-tu?"),
        ("language", "Твой сосед оставил у тебя посылку и не возвращается уже две недели. Что ты делаешь?"),
        ("length", "What do you do with it?"),
        ("length", GOOD[:-1] + " and so on" * 25 + "?"),
        ("leakage", GOOD.replace("neighbour", "extraverted neighbour")),
        ("leakage", GOOD.replace("neighbour", "Outgoing neighbour")),
        ("person", "Mira's train stops in a field, and the lights go out for an hour. What goes through her head?"),
        ("person", "My neighbour has left a parcel with me and does not come back. What would you do with it?"),
    ],
)  # fmt: skip
def test_each_rule_rejects_what_it_is_for(rule, text):
    assert verdict(text) == rule


def test_rules_that_need_more_than_the_text():
    assert verdict(GOOD, cut=True) == "format"
    assert verdict(GOOD, "first") == "person"
    assert verdict(GOOD, "third") == "person"
    german = "Dein Nachbar hat ein Paket für dich angenommen und ist seit zwei Wochen verreist. Was tust du nun?"
    candidate = Candidate(german, "second")
    assert "language" not in [rule.name for rule in filters(plan(1, language="none"))]
    assert first_fault(candidate, filters(plan(1, language="none"))) == ("person", "does not address the reader")
    hyphenated = rules.without(("high strung",))
    assert hyphenated(Candidate("A High-Strung dog."))
    assert hyphenated(Candidate("A high tree, strung with lamps.")) is None


@pytest.mark.parametrize("trait", ["agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness"])
def test_the_shipped_bench_mostly_passes(trait):
    """The rules are not stricter than the bench that was made with care: it speaks in no ordered person."""
    checks = [rule for rule in filters(plan(1)) if rule.name in ("format", "language", "length")]
    lines = (DATA / trait / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["text"] for line in lines]
    faults = [fault for text in questions if (fault := first_fault(Candidate(text), tuple(checks)))]
    assert len(questions) >= 90
    assert len(faults) <= 0.1 * len(questions), faults[:5]


def test_personas():
    text = (
        "You are at ease with everybody you meet, and you say so. You like to be where many people are, and you talk."
    )
    checks = filters(Plan("personas", definition(), (("+", 1), ("-", 1)), "stub"))
    assert first_fault(Candidate(text), checks) is None
    for spoilt in (text[:-1], f"{text} Why?", text.replace("You", "They").replace("you", "they"), f"# {text}"):
        assert first_fault(Candidate(spoilt), checks)[0] == "format"
    assert first_fault(Candidate("You are kind to everybody in the house."), checks) is None
    assert first_fault(Candidate("You are kind."), checks)[0] == "length"


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("Sure!\n1. One?\n2. Two?\n\nDone", ["One?", "Two? Done"]),
        ("```\n1) One?\n   and more?\n**2.** Two?\n```", ["One? and more?", "Two?"]),
        ('["One?", 3, "Two?"]', ["One?", "Two?"]),
        ("One?\n\n  Two?  ", ["One?", "Two?"]),
        ('- "One?"\n- “Two?”', ["One?", "Two?"]),
        ('1. "One?" he asks. "Two?"', ['"One?" he asks. "Two?"']),
        ("", []),
        ("[" * 100_000, ["[" * 4001]),
        ("1. " + "x" * 10_000, ["x" * 4001]),
        ("\n".join(f"{n}. item" for n in range(1, 500)), ["item"] * 6),
    ],
)
def test_items_of_an_answer(answer, items):
    assert read_items(answer, 3) == items


def test_verdicts():
    said = {"verdicts": [{"question": 1, "differ": True}, {"question": 2, "differ": False}]}
    assert read_verdicts(json.dumps(said), 3) == [True, False, None]
    assert read_verdicts(f"Well: {json.dumps(said)} So it is.", 2) == [True, False]
    said["verdicts"] += [{"question": 1, "differ": False}, {"question": 9, "differ": True}, {"question": "2"}, 7]
    assert read_verdicts(json.dumps(said), 2) == [None, False]
    for broken in ("", "{", "{}", '{"verdicts": 3}', '{"verdicts": [{"question": true, "differ": 1}]}', "}{"):
        assert read_verdicts(broken, 2) == [None, None]


def sentence(rng):
    one, two = rng.choices(ADJECTIVES, k=2)
    a, b, c = rng.choices(NOUNS, k=3)
    return f"Your {one} {a} {rng.choice(VERBS)} the {two} {b} of a {c}. What do you say now?"


def plain_grams(text):
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(itertools.pairwise(itertools.pairwise(words)))


def test_overlap_is_that_of_word_trigrams():
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(40)]
    seen = set()
    for one, other in itertools.combinations(texts, 2):
        want = plain_grams(one) & plain_grams(other)
        shortest = min(len(plain_grams(one)), len(plain_grams(other)))
        assert overlap(grams(one), grams(other)) == len(want) / shortest
        seen.add(len(want))
    assert len(seen) > 2
    assert len(grams("a b c")) == len(grams("a b")) == len(grams("")) == 1
    assert overlap(grams("the cat sat"), grams("sat cat the")) == 0


def test_the_index_finds_what_comparing_all_pairs_finds(tmp_path):
    """Against the plain definition: a duplicate shares more than 0.4 of the shorter text's 3-grams with a kept one."""
    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(600)]
    texts += [rng.choice(texts).replace("of a", "of the", 1) for _ in range(300)]
    store, kept, twins = Store(tmp_path / "index.sqlite"), [], Counter()
    for number, text in enumerate(texts):
        mine = plain_grams(text)
        want = any(len(mine & other) / min(len(mine), len(other)) > LIMIT for other in kept)
        found = store.twin(grams(text))
        assert (found is not None) == want, text
        twins[want] += 1
        if not want:
            store.keep(0, "search", number, 0, text)
            kept.append(mine)
    assert min(twins.values()) > 100
    store.close()


def test_cells_are_balanced_and_every_split_has_them():
    made = plan(search=2520, test=300)
    cells = made.cells()
    assert len(cells) == 6 * 14 * 3
    assert len({(cell.facet, cell.topic, cell.person) for cell in cells}) == len(cells)
    for split, size in made.sizes:
        counts = [dict(cell.quotas)[split] for cell in cells]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 1
    few = plan(search=42).cells()
    for name, names in (("facet", 6), ("topic", 14), ("person", 3)):
        counts = Counter(getattr(cell, name) for cell in few)
        assert len(counts) == names
        assert max(counts.values()) - min(counts.values()) <= 1


def test_orders_are_the_plan_s_and_differ():
    made = plan(search=2520)
    owed = [(cell, cell.wanted) for cell in made.cells()]
    orders = list(made.round_orders(0, 0, owed))
    assert orders == list(plan(search=2520).round_orders(0, 0, owed))
    assert [order.number for order in orders] == list(range(len(orders)))
    assert len({order.seed for order in orders}) == len(orders)
    assert {order.seed for order in orders}.isdisjoint(one.seed for one in made.round_orders(1, 0, owed))
    assert {order.seed for order in orders}.isdisjoint(one.seed for one in plan(2520, seed=1).round_orders(0, 0, owed))
    asked = Counter()
    for order in orders:
        asked[order.cell.number] += order.ask
    assert all(asked[cell.number] >= wanted for cell, wanted in owed)
    prompts = {generator_messages(made, order)[-1]["content"] for order in orders}
    assert len(prompts) == len(orders)


def test_a_prompt_names_what_is_asked_and_not_what_is_forbidden_elsewhere():
    made = plan(search=10)
    for order in made.round_orders(0, 0, [(cell, cell.wanted) for cell in made.cells()]):
        text = generator_messages(made, order)[-1]["content"]
        facet = next(one for one in made.definition.facets if one.name == order.cell.facet)
        assert order.cell.topic in text
        assert facet.high[:20] in text
        assert facet.low[:20] in text
        assert order.cell.person in PERSONS
        told, forbidden = text.split("Never use these words: ")
        assert "extraverted" in forbidden.splitlines()[0]
        assert "extraverted" not in told


def test_plans_that_cannot_be():
    with pytest.raises(BenchError, match="ask for 1 to"):
        plan()
    with pytest.raises(BenchError, match="fewer topics"):
        plan(1, topics=tuple(map(str, range(10_000))))


def test_topics(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("# mine\nsailing\n\n  chess  \n", encoding="utf-8")
    assert read_topics(path) == ("sailing", "chess")
    assert len(TOPICS) == 14
    for text, complaint in (
        ("sailing\nsailing", ":2: 'sailing' is in line 1 already"),
        ("x" * 100, ":1: .* at most 80 letters"),
        ("a\x07b", ":1: "),
        ("#", "holds 0 topics"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BenchError, match=complaint):
            read_topics(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="not UTF-8"):
        read_topics(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_topics(tmp_path)
