"""Likelihoods of many answers at once in llama.cpp, against the logits of each sequence alone."""

import numpy as np
import pytest

from npti_export.errors import ModelError
from npti_export.models import gguf_source
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp import likelihood
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.likelihood import log_normalisers, plan
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

CLOSE = 5e-3  # nats, of likelihoods that differ by nats: SiLU tables, keys and sums of attention are float16


def opened(path, **settings):
    return LlamaCppRuntime(path, Settings(threads=1, **settings), source=gguf_source(path))


def plain(runtime, exchange):
    """The definition, in float64."""
    logits = runtime.logits(exchange.tokens).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    first = len(exchange.prompt) - 1
    return float(np.mean([logs[first + at, token] for at, token in enumerate(exchange.response)]))


def family(seed=0, personas=3, questions=4, options=3):
    """Prompts that share beginnings, with options that share some too, in a mixed order."""
    rng = np.random.default_rng(seed)
    some = lambda low, high: tuple(int(one) for one in rng.integers(5, 300, rng.integers(low, high)))  # noqa: E731
    asked = [some(5, 20) for _ in range(questions)]
    exchanges = []
    for persona in [some(20, 60) for _ in range(personas)]:
        for question in asked:
            start = some(1, 3)
            exchanges += [Exchange(persona + question, start + some(1, 15)) for _ in range(options)]
    rng.shuffle(exchanges)
    return exchanges


EXCHANGES = [
    *family(),
    Exchange((7,), (9,)),  # nothing shared, as short as can be
    Exchange((7, 9, 11), (13, 15, 17)),
    Exchange((7, 9, 11, 13), (15, 17)),  # a prompt that goes into another's answer
    Exchange((7, 9, 11, 13, 15, 17), (19,)),
    Exchange((7, 9, 11), (13, 15, 17)),  # twice the same
    Exchange(tuple(range(20, 120)), tuple(range(30, 130))),  # longer than a small batch
    Exchange(tuple(range(20, 110)), tuple(range(10, 15))),
]


@pytest.fixture(scope="module")
def expected(tiny):
    with opened(tiny) as runtime:
        return [plain(runtime, exchange) for exchange in EXCHANGES]


@pytest.mark.parametrize("settings", [{}, {"batch": 64}, {"batch": 32, "context": 256}, {"context": 512}])
def test_they_are_those_of_each_sequence_alone(tiny, expected, settings):
    assert np.std(expected) > 100 * CLOSE
    with opened(tiny, **settings) as runtime:
        found = runtime.log_likelihoods(EXCHANGES)
        assert found == pytest.approx(expected, abs=CLOSE)
        assert np.mean(np.abs(np.subtract(found, expected))) < CLOSE / 5
        backwards = runtime.log_likelihoods(EXCHANGES[::-1])[::-1]
    assert backwards == pytest.approx(found, abs=1e-9)  # the order in which they come changes nothing


def test_they_are_those_of_transformers(tiny, tiny_runtime, expected):
    assert tiny_runtime.log_likelihoods(EXCHANGES) == pytest.approx(expected, abs=CLOSE)


def test_what_begins_alike_is_computed_once():
    exchanges = family(personas=2, questions=5, options=4)
    (load,) = plan(exchanges, 10_000, 0)
    nodes = {one.tokens[:end] for one in exchanges for end in range(1, len(one.tokens))}
    assert load.rows == len(nodes) < 0.5 * sum(len(one.tokens) for one in exchanges)
    assert sorted(load.members) == list(range(len(exchanges)))


def test_loads_keep_what_the_next_one_shares():
    persona = tuple(range(100))
    exchanges = [Exchange((*persona, 200 + number), tuple(range(40))) for number in range(12)]
    loads = plan(exchanges, 256, 0)
    assert [load.kept[0] for load in loads] == [0] + [100] * (len(loads) - 1)
    assert sum(load.rows for load in loads) == 100 + 12 * 40
    assert all(load.cells <= 356 for load in loads)
    assert all(load.cells <= 256 for load in plan(exchanges, 256, 256))
    answers = plan([Exchange((1, 2, 3), (number, 4)) for number in range(5, 900)], 4096, 0)
    assert max(len(load.members) for load in answers) == 255
    # the probabilities of an answer's first token come from its prompt's last, so that one is computed again
    assert [load.kept[0] for load in answers] == [0, 2, 2, 2]


def test_logits_in_small_pieces(tiny, expected, monkeypatch):
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 1)  # each wanted row by itself
    with opened(tiny) as runtime:
        found = runtime.log_likelihoods(EXCHANGES[:6])
    assert found == pytest.approx(expected[:6], abs=CLOSE)


def test_normalisers_against_float64(monkeypatch):
    logits = (np.random.default_rng(1).normal(size=(37, 5000)) * 8 + 300).astype(np.float32)
    want = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    assert np.abs(log_normalisers(logits) - want).max() < 5e-5  # float32 at 300 has steps of 3e-5
    monkeypatch.setattr(likelihood, "_SOFTMAX_BYTES", 1)
    assert np.abs(log_normalisers(logits) - want).max() < 5e-5


def test_refused(tiny):
    with opened(tiny, context=256) as runtime:
        assert runtime.log_likelihoods([]) == []
        for faulty in (Exchange((), (1,)), Exchange((1,), ())):
            with pytest.raises(ModelError, match="no prompt or no response"):
                runtime.log_likelihoods([faulty])
        with pytest.raises(ModelError, match="--context 256 is too small"):
            runtime.log_likelihoods([Exchange((1,) * 200, (2,) * 200)])
