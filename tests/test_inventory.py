"""Self-report items: the shipped ones, and how a model's answers to them are read."""

import copy
import csv
import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from npti_export.bench import shipped_folder
from npti_export.bench.definition import read_definition
from npti_export.bench.making.ngrams import grams, overlap
from npti_export.bench.making.prompts import forbidden_words
from npti_export.bench.overlap import words
from npti_export.errors import EvaluationError
from npti_export.evaluate.inventory.answers import (
    LABELLINGS,
    SCALE,
    InventoryAnswers,
    answer_inventory,
    inventory_part,
    inventory_prompt,
    labelling,
)
from npti_export.evaluate.inventory.items import Item, read_inventory
from npti_export.evaluate.options import Options, find_options
from npti_export.runtimes.base import chat, shared_length
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import FACETS

ITEMS = (
    Item("calm", "+", "I sleep well."),
    Item("calm", "-", "A slow queue makes my blood boil."),
    Item("tidy", "-", "My desk is a heap."),
)


@pytest.fixture(scope="module")
def llama(tiny):
    with LlamaCppRuntime(tiny, Settings(threads=1)) as runtime:
        yield runtime


# The shipped items.


def test_shipped_counts_and_keys():
    items = read_inventory()
    assert len(items) == 120
    counts = Counter((item.trait, item.facet, item.keyed) for item in items)
    wanted = {
        (trait, facet.name, sign): 2
        for trait in FACETS
        for facet in read_definition(shipped_folder(trait)).facets
        for sign in "+-"
    }
    assert counts == wanted


def test_shipped_items_are_short_statements():
    for item in read_inventory():
        assert 4 <= len(item.text.split()) <= 14, item
        assert item.text.endswith("."), item
        assert item.text[0].isupper()
        assert item.text.isascii()
        assert item.text.count(".") == 1
        assert {"i", "me", "my"} & set(words(item.text)), item


def test_shipped_items_name_no_trait():
    definitions = [read_definition(shipped_folder(trait)) for trait in FACETS]
    named = {word for definition in definitions for word in forbidden_words(definition)}
    named |= {facet.name for definition in definitions for facet in definition.facets}
    assert len(named) > 40
    for item in read_inventory():
        assert not [word for word in named if re.search(rf"\b{word}\b", item.text, re.IGNORECASE)], item


def test_shipped_items_are_no_copies_of_each_other():
    found = [(item.text, grams(item.text)) for item in read_inventory()]
    for (one, first), (other, second) in combinations(found, 2):
        assert overlap(first, second) <= 0.25, (one, other)


# Inventories from elsewhere.


def test_inventories_from_elsewhere(tmp_path):
    table = tmp_path / "i.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["item", "domain", "key"], ["I hum.", "E", "1"], ["I hide, often.", "E", "-1"]])
    wanted = (Item("extraversion", "+", "I hum."), Item("extraversion", "-", "I hide, often."))
    assert read_inventory(table) == wanted
    folder = tmp_path / "out" / "extraversion"
    folder.mkdir(parents=True)
    lines = [json.dumps({"trait": one.trait, "keyed": one.keyed, "text": one.text}) for one in wanted]
    (folder / "inventory.jsonl").write_text("\n".join(lines))
    assert read_inventory(tmp_path / "out") == read_inventory(folder) == wanted


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("i.jsonl", '{"trait": "E", "keyed": "+", "text": "I hum."}\n{"trait": "E", "keyed": "0", "text": "I"}', ":2:"),
        ("i.jsonl", "", "no item"),
        ("i.csv", "item,key\nI hum.,1\n", "no column for 'trait'"),
        ("i.txt", "I hum.", "ending"),
        ("i.jsonl", None, "no such inventory"),
        ("", None, "has an inventory.jsonl"),
    ],
)
def test_inventories_that_are_none(name, text, why, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=why) as raised:
        read_inventory(tmp_path / name if name else tmp_path)
    assert str(tmp_path) in str(raised.value)


# Answers. A fake model speaks in words: one token each.


class Fake:
    """``prefer(prompt, label)`` is the logit of a label after a prompt."""

    def __init__(self, prefer, known=("1", "2", "3", "4", "5", "A", "B", "C", "D", "E")):
        self.words, self.prefer, self.known, self.prompts = {}, prefer, known, []

    def token(self, word):
        return self.words.setdefault(word, len(self.words))

    def encode(self, messages):
        tokens = []
        for message in messages:
            text = message["content"]
            whole = message["role"] != "assistant" or text in self.known
            tokens += [f"<{message['role']}>", *([text] if whole else [f"{text} begins", f"{text} ends"]), "<end>"]
        return tuple(self.token(word) for word in [*tokens, "<assistant>"])

    def last_logits(self, prompts):
        names = {number: word for word, number in self.words.items()}
        logits = np.full((len(prompts), 4000), -20, np.float32)
        for row, prompt in enumerate(prompts):
            text = " ".join(names[token] for token in prompt)
            self.prompts.append(text)
            for label in "12345ABCDE":
                logits[row, self.token(label)] = self.prefer(text, label)
        return logits


@pytest.mark.parametrize("liked", "12345")
def test_a_liked_label_says_nothing(liked):
    """Order bias goes away exactly: whatever label it always picks, the score is the middle of the scale."""
    found = answer_inventory(Fake(lambda _text, label: 9.0 if label == liked else 0.0), read_inventory())
    assert found.scores == pytest.approx(3, abs=1e-12)
    assert found.mass == pytest.approx(1, abs=1e-3)


def accurate(text, label):
    """Likes the label of "very accurate", wherever it stands."""
    return 12.0 if f"{label}. very accurate" in text else 0.0


def test_reverse_keyed_items_are_turned_round():
    found = answer_inventory(Fake(accurate), ITEMS)
    share = np.exp(12) / (np.exp(12) + 4)
    yes = 5 * share + (1 - share) / 4 * (1 + 2 + 3 + 4)
    assert found.scores == pytest.approx([yes, 6 - yes, 6 - yes])


def test_both_orders_are_asked_and_the_persona_is_said():
    fake = Fake(accurate)
    told = []
    answer_inventory(fake, ITEMS, system="You are a teapot.", progress=lambda *done: told.append(done))
    assert len(fake.prompts) == 6 == len(set(fake.prompts))
    assert told[-1] == (6, 6)
    assert all(prompt.startswith("<system> You are a teapot.") for prompt in fake.prompts)
    assert sum("1. very inaccurate" in prompt for prompt in fake.prompts) == 3
    assert sum("1. very accurate" in prompt for prompt in fake.prompts) == 3


def test_another_labelling_where_numbers_are_no_tokens():
    assert labelling(Fake(accurate))[0] == LABELLINGS[0]
    fake = Fake(accurate, known="ABCDE")
    assert labelling(fake)[0] == LABELLINGS[1]
    assert answer_inventory(fake, ITEMS).scores == pytest.approx([5, 1, 1], abs=1e-3)
    assert "A. very inaccurate" in fake.prompts[0]
    assert "its letter only" in fake.prompts[0]
    with pytest.raises(EvaluationError, match="neither 1 to 5 nor A to E are single tokens"):
        answer_inventory(Fake(accurate, known=()), ITEMS)


def test_logits_that_are_no_numbers():
    with pytest.raises(EvaluationError, match="not numbers"):
        answer_inventory(Fake(lambda *_: float("nan")), ITEMS)


def test_parts_are_paired_by_item():
    base = InventoryAnswers(np.array([2.0, 4.0, 3.0]), np.ones(3))
    steered = InventoryAnswers(np.array([2.5, 4.5, 1.0]), np.ones(3))
    part = inventory_part(base, steered, ITEMS, "mine")
    assert part.source == "mine"
    assert list(part.traits) == ["calm", "tidy"]
    calm = part.traits["calm"]
    assert (calm.base.mean, calm.steered.mean, calm.change.mean, calm.change.n) == (3.0, 3.5, 0.5, 2)
    # Both items changed by the same, so the paired interval is a point, where unpaired ones would overlap.
    assert (calm.change.low, calm.change.high) == (0.5, 0.5)
    assert calm.base.low < calm.base.high
    assert part.traits["tidy"].change.mean == -2


def test_scores_against_float64(tiny_runtime, llama):
    """A plain computation: whole prompts, one at a time, in double precision, with tokens that the tokenizer names."""
    import torch

    model = copy.deepcopy(tiny_runtime.model).double()
    tokenizer = tiny_runtime.tokenizer
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "12345"]
    rows, masses = [], []
    for order in (1, -1):
        for item in ITEMS:
            scale = "\n".join(f"{number}. {words}" for number, words in enumerate(SCALE[::order], 1))
            prompt = (
                f"How well does a statement describe you as you are? Choose one answer:\n{scale}\n\n"
                f'The statement: "{item.text}"\n\nReply with its number only.'
            )
            text = tokenizer.apply_chat_template(
                [{"role": "system", "content": "Be odd."}, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                shares = torch.softmax(model(ids).logits[0, -1], -1)[digits].numpy()
            rating = (shares / shares.sum()) @ (np.arange(1, 6) if order == 1 else np.arange(5, 0, -1))
            rows.append(rating if item.keyed == "+" else 6 - rating)
            masses.append(shares.sum())
    wanted, mass = np.reshape(rows, (2, 3)).mean(0), np.reshape(masses, (2, 3)).mean(0)
    assert np.abs(wanted - 3).max() > 1e-3
    in_torch = answer_inventory(tiny_runtime, ITEMS, system="Be odd.")
    np.testing.assert_allclose(in_torch.scores, wanted, atol=1e-5)
    np.testing.assert_allclose(in_torch.mass, mass, rtol=1e-4)
    in_llama = answer_inventory(llama, ITEMS, system="Be odd.")
    np.testing.assert_allclose(in_llama.scores, wanted, atol=2e-3)


# What both runtimes offer for it.


def prompts_of(runtime, count):
    texts = [
        "I hum.",
        "I hide, often and gladly, behind the curtain.",
        "Me?",
        *(f"I own {n} hats." for n in range(count)),
    ]
    return [runtime.encode(chat(None, inventory_prompt(text, LABELLINGS[0], SCALE))) for text in texts]


def test_last_logits_in_transformers(tiny_runtime):
    prompts = prompts_of(tiny_runtime, 3)
    found = tiny_runtime.last_logits(prompts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [tiny_runtime.logits(one)[-1] for one in prompts], atol=2e-4)


@pytest.mark.parametrize("limit", [0, 256])
def test_last_logits_in_llama_cpp(tiny, llama, limit):
    prompts = prompts_of(llama, 20)
    assert 60 < shared_length(prompts) < 256
    wanted = np.stack([llama.logits(one)[-1] for one in prompts])
    assert np.abs(wanted[0] - wanted[1]).max() > 0.5
    with LlamaCppRuntime(tiny, Settings(threads=1, context=limit)) as runtime:
        assert np.abs(runtime.last_logits(prompts) - wanted).max() < 0.05  # an F16 cache, other batches
        assert np.abs(runtime.last_logits(prompts[:1]) - wanted[:1]).max() < 0.05  # an F16 cache, other batches
        assert (
            np.abs(runtime.last_logits([prompts[3], prompts[3]]) - wanted[3]).max() < 0.05
        )  # an F16 cache, other batches


def test_shared_length():
    assert shared_length([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert shared_length([(1, 2)]) == 2
    assert shared_length([(1,), (2,)]) == 0
    assert shared_length([(3, 1), (3, 1), (3, 1, 5)]) == 2


def test_options_follow_the_template(llama, tiny_runtime):
    for runtime in (llama, tiny_runtime):
        plain = find_options(runtime, "12345")
        assert plain.lead == ()
        assert [runtime.decode([token]) for token in plain.tokens] == list("12345")
        led = find_options(runtime, "12345", '{"rating": ')
        assert runtime.decode(led.lead) == '{"rating": '
        assert find_options(runtime, ["one hundred", "two hundred"]) is None
        shared = find_options(runtime, ["AB", "AC"])  # what both begin with leads to them
        assert runtime.decode(shared.lead) == "A"
        assert [runtime.decode([token]) for token in shared.tokens] == ["B", "C"]


class Thinker(Fake):
    """A template that puts an empty train of thought before finished answers."""

    def encode(self, messages):
        last = messages[-1]
        if last["role"] != "assistant":
            return super().encode(messages)
        asked = super().encode(messages[:-1])
        return (*asked, *map(self.token, ["<think>", "</think>", last["content"], "<end>", "<assistant>"]))


def test_options_after_an_empty_thought():
    fake = Thinker(accurate)
    found = find_options(fake, "12345")
    assert found == Options((fake.token("<think>"), fake.token("</think>")), tuple(map(fake.token, "12345")))
    answer_inventory(fake, ITEMS)
    assert all(prompt.endswith("<assistant> <think> </think>") for prompt in fake.prompts)
