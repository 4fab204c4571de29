"""The shipped test sets, files like them, and what they say of a model."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import random_rule
from reference import ReferenceLlama
from test_bake import bake
from tolerances import KL_OF_FLOAT32_ROWS

from npti_export.bench import load_bench
from npti_export.errors import EvaluationError
from npti_export.evaluate.capability.answers import Answers, answer_tasks, prompts_of
from npti_export.evaluate.capability.neutral import NeutralText, kl_by_passage, kl_rows
from npti_export.evaluate.capability.part import base_skill, capability_part, compare_skill
from npti_export.evaluate.capability.tasks import (
    TaskSet,
    neutral_passages,
    read_passages,
    read_tasks,
    shipped_tasks,
)
from npti_export.evaluate.document import CapabilityPart
from npti_export.evaluate.fluency import words
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import FACETS


def opened(path):
    return LlamaCppRuntime(path, Settings(threads=1), sequences=4, listens=False)


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Base and steered model, open."""
    out = tmp_path_factory.mktemp("steered") / "s.gguf"
    bake(tiny, out, random_rule(3, 96))
    with opened(tiny) as base, opened(out) as steered:
        yield base, steered


def test_shipped_sets():
    sets = {task.name: task for task in shipped_tasks()}
    sizes = {name: (len(task.questions), len(task.examples)) for name, task in sets.items()}
    assert sizes == {"choice": (130, 3), "arithmetic": (84, 6), "recall": (64, 3)}
    for task in sets.values():
        texts = [question.text for question in (*task.questions, *task.examples)]
        assert len(set(texts)) == len(texts)
        places = Counter(question.right for question in task.questions)
        assert max(places.values()) - min(places.values()) <= 1
        assert {len(question.options) for question in task.questions} == {4}
    for question in sets["recall"].questions:
        assert question.answer.lower() in question.passage.lower()
    for question in (*sets["arithmetic"].questions, *sets["arithmetic"].examples):
        numbers = [int(option) for option in question.options]
        assert min(numbers) >= 0
        assert len(set(numbers)) == 4
        assert numbers[question.right] == int(question.answer)


def test_sums_are_right():
    sums = [one for one in shipped_tasks()[1].questions if one.question.startswith("What is")]
    assert len(sums) > 50
    for question in sums:
        text = question.question.removeprefix("What is ").rstrip("?")
        value = eval(text.replace("times", "*").replace("divided by", "/"))
        assert float(question.answer) == value


def test_neutral_texts_are_neutral():
    passages = neutral_passages()
    assert len(passages) == 42
    traits = set()
    for trait in FACETS:
        definition = load_bench(trait).definition
        traits |= {trait, *definition.facet_names}
    for passage in passages:
        found = words(passage.text)
        assert 60 <= len(found) <= 120
        assert not traits & set(found)


QUESTIONS = [
    {"question": "Q1", "options": ["a", "b c", "d"], "answer": "b c", "passage": "P", "topic": "t", "source": {"x": 1}},
    {"question": "Q2", "options": ["yes", "no"], "answer": "no"},
    {"question": "Q0", "options": ["yes", "no"], "answer": "no", "example": True},
]


def test_files_of_ones_own(tmp_path):
    lines = tmp_path / "mine.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in QUESTIONS) + "\n\n", encoding="utf-8")
    task = read_tasks(lines)
    assert (task.name, task.source) == ("mine", "mine.jsonl")
    assert [one.text for one in task.questions] == ["P\n\nQ1", "Q2"]
    assert [one.right for one in task.questions] == [1, 1]
    assert [one.text for one in task.examples] == ["Q0"]
    sheet = tmp_path / "mine.csv"
    sheet.write_text(
        "question,option1,option2,option3,answer,passage,topic,example\r\nQ1,a,b c,d,b c,P,t,\r\nQ2,yes,no,,no,,,\r\n"
        "Q0,yes,no,,no,,,true\r\n",
        encoding="utf-8-sig",
    )
    other = read_tasks(sheet)
    assert [one.model_copy(update={"source": None}) for one in task.questions] == list(other.questions)
    assert other.examples == task.examples
    texts = tmp_path / "texts.csv"
    texts.write_text('text,topic\none,\n"two, with\na new line",x\n', encoding="utf-8")
    assert [(one.text, one.topic) for one in read_passages(texts)] == [("one", None), ("two, with\na new line", "x")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "B"}, "'answer' 'B' is none of its 'options'"),
        ({"options": ["a"]}, "'options' Tuple should have at least 2 items"),
        ({"options": ["b c", "b c"]}, "two of its 'options' are the same"),
        ({"question": " "}, "a text is empty"),
        ({"question": "\ud800"}, "unable to parse raw data as a unicode string"),
        ({"question": None}, "'question' Input should be a valid string"),
        ({"more": 1}, "'more' Extra inputs are not permitted"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTIONS[1]) + "\n" + json.dumps(QUESTIONS[0] | change) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError) as error:
        read_tasks(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"{\n", ":1: not a JSON object"),
        ("a.jsonl", b"3\n", ":1: "),
        ("a.jsonl", b"[" * 100_000, ":1: not a JSON object"),
        ("a.jsonl", b"\xff", "not UTF-8"),
        ("a.csv", b"question,answer\nx,y,z\n", ":2: has more cells"),
        ("a.csv", b'question,answer\n"x,y\n', "not CSV"),
        ("a.csv", b"question,answer\nx,y\n", ":2: 'options' Field required"),
        ("a.jsonl", json.dumps(QUESTIONS[2]).encode(), "holds examples only"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError) as error:
        read_tasks(tmp_path / name)
    assert name in str(error.value)
    assert said in str(error.value)


def small(count=6):
    full = shipped_tasks()
    return [TaskSet(one.name, one.source, one.questions[:count], one.examples[:2]) for one in full]


def test_answers_are_the_likeliest_options(pair):
    base, _ = pair
    tasks = small()
    found = answer_tasks(base, tasks)
    for task, answers in zip(tasks, found, strict=True):
        for at, (question, prompt) in enumerate(zip(task.questions, prompts_of(base, task), strict=True)):
            turns = [
                turn
                for one in task.examples
                for turn in ({"role": "user", "content": one.text}, {"role": "assistant", "content": one.answer})
            ]
            assert prompt == base.encode([*turns, *chat(None, question.text)])
            options = [Exchange(prompt, base.encode_text(option, begin=False)) for option in question.options]
            assert answers.likelihoods[at] == pytest.approx(
                [base.log_likelihoods([one])[0] for one in options], abs=5e-3
            )
        assert answers.right.tolist() == [question.right for question in task.questions]


def test_accuracy():
    answers = Answers(
        [np.array(one) for one in ([-1, -2, -3, -4], [-2, -1], [-3, -3], [-5, -4])], np.array([0, 0, 0, 1])
    )
    assert answers.correct.tolist() == [1, 0, 1, 1]
    assert answers.chance == pytest.approx((0.25 + 3 * 0.5) / 4)


def test_kl_against_float64(pair, tiny, monkeypatch):
    base, steered = pair
    passages = neutral_passages()[:3]
    exact = kl_by_passage(base, steered, passages)
    rule = random_rule(3, 96)
    reference = ReferenceLlama(tiny)
    for passage, found in zip(passages, exact, strict=True):
        tokens = base.encode_text(passage.text)
        p, q = (reference.logits(tokens, *parts) for parts in ((), (rule.shift, rule.clamp)))
        p, q = (one - np.logaddexp.reduce(one, axis=1, keepdims=True) for one in (p, q))
        assert found == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), rel=0.02)
    text = NeutralText(base, passages)
    first = text.kl(steered)
    assert first == pytest.approx(exact, abs=2e-5)  # the base kept in float16
    assert np.all(first > 1e-3)
    monkeypatch.setattr(base, "logits", None)  # not needed any more
    assert text.kl(steered).tolist() == first.tolist()
    part = NeutralText(pair[1], passages, kept_bytes=text._kept[0].nbytes)
    assert np.abs(part.kl(steered)).max() < 1e-5
    assert [one is None for one in part._kept] == [False, True, True]


def test_kl_of_rows():
    rng = np.random.default_rng(0)
    ours, others = rng.normal(size=(2, 4, 50)).astype(np.float32)
    p, q = (
        np.exp(one.astype(np.float64)) / np.exp(one.astype(np.float64)).sum(1, keepdims=True) for one in (ours, others)
    )
    want = (p * np.log(p / q)).sum(1)
    assert kl_rows(ours.astype(np.float64), others.astype(np.float64)) == pytest.approx(want, rel=1e-9)
    assert kl_rows(ours, others) == pytest.approx(want, abs=KL_OF_FLOAT32_ROWS)
    assert want.min() > 1000 * KL_OF_FLOAT32_ROWS
    assert kl_rows(ours, ours).tolist() == [0] * 4
    nearly = ours.astype(np.float64) + 1e-3 * rng.normal(size=ours.shape)
    far = nearly + 300  # logits have no zero of their own
    small = kl_rows(ours.astype(np.float64), nearly)
    assert kl_rows(ours, nearly.astype(np.float32)) == pytest.approx(small, abs=KL_OF_FLOAT32_ROWS)
    assert kl_rows(ours.astype(np.float64), far) == pytest.approx(small, rel=1e-6)


def test_the_part(pair):
    base, steered = pair
    tasks, passages = small(), neutral_passages()[:4]
    part = capability_part(base, steered, tasks, passages)
    assert CapabilityPart.model_validate(part.model_dump()) == part
    assert [task.name for task in part.tasks] == ["choice", "arithmetic", "recall"]
    assert part.kl_neutral.low > 0
    before, after = answer_tasks(base, tasks), answer_tasks(steered, tasks)
    for task, one, other in zip(part.tasks, before, after, strict=True):
        assert task.score.base.mean == pytest.approx(one.correct.mean())
        assert task.score.change.mean == pytest.approx((other.correct - one.correct).mean())
        assert task.score.change.n == 6
    known = base_skill(base, tasks, passages)
    same = compare_skill(known, base)
    assert same.kl_neutral.mean == pytest.approx(0, abs=1e-5)
    assert all(task.score.change.mean == 0 for task in same.tasks)


def test_other_vocabularies_are_refused(pair):
    with pytest.raises(EvaluationError, match="another model"):
        kl_by_passage(pair[0], _Cut(), neutral_passages()[:1])


class _Cut:
    """Logits of fewer tokens."""

    def logits(self, tokens):
        return np.zeros((len(tokens), 300), np.float32)


def test_plain_text_in_both_runtimes(pair, tiny_runtime):
    base, _ = pair
    for text in ("Hello there.", "two  spaces\n", "<|im_start|>user"):
        for begin in (True, False):
            assert base.encode_text(text, begin=begin) == tiny_runtime.encode_text(text, begin=begin)
    tasks = small(2)
    for ours, theirs in zip(answer_tasks(base, tasks), answer_tasks(tiny_runtime, tasks), strict=True):
        assert np.concatenate(ours.likelihoods) == pytest.approx(np.concatenate(theirs.likelihoods), abs=5e-3)
