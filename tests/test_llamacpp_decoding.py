"""Greedy decoding of many prompts in llama.cpp, against a plain loop over the logits of whole sequences."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tolerances import LOGITS_LLAMACPP

from npti_export.errors import ModelError
from npti_export.models import gguf_source
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp import decoding
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.decoding import Beginnings, Decoder
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

LIMIT = 24
SYSTEM = "You are calm. " * 6
QUESTIONS = [
    "Hi",
    "Why?",
    "What do you do when it rains all day?",
    "Tell me about the sea and the boats on it, please.",
    "Name three birds, three trees, three towns, and say which you like best of all of them, and why that is so.",
    "a" * 90,
    "Run!",
]


def opened(path, sequences=1, **settings):
    return LlamaCppRuntime(path, Settings(threads=1, **settings), sequences=sequences, source=gguf_source(path))


@pytest.fixture(scope="module")
def plain(tiny):
    """One sequence at a time."""
    with opened(tiny) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def prompts(plain):
    return [plain.encode(chat(SYSTEM, question)) for question in QUESTIONS]


def greedy(runtime, prompt, steps, penalty):
    """No cache, no batch: the definition of greedy decoding with a repetition penalty, in float64."""
    tokens = list(prompt)
    for _ in range(steps):
        logits = runtime.logits(tokens)[-1].astype(np.float64)
        for token in set(tokens):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        tokens.append(int(logits.argmax()))
        if runtime.chat.is_end(tokens[-1]):
            break
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def answers(plain, prompts):
    return [greedy(plain, prompt, LIMIT, 1.1) for prompt in prompts]


@pytest.mark.parametrize("sequences", [1, 3, 7])
def test_answers_are_those_of_a_plain_loop(tiny, prompts, answers, sequences):
    with opened(tiny, sequences) as runtime:
        found = runtime.generate(prompts, max_new_tokens=LIMIT, repetition_penalty=1.1)
    assert [one.prompt for one in found] == prompts
    assert [one.response for one in found] == answers


def test_the_penalty_changes_the_answers(plain, prompts, answers):
    for penalty in (1.0, 3.0):
        found = plain.generate(prompts[:2], max_new_tokens=LIMIT, repetition_penalty=penalty)
        assert [one.response for one in found] == [greedy(plain, prompt, LIMIT, penalty) for prompt in prompts[:2]]
        assert [one.response for one in found] != answers[:2]


def test_answers_are_those_of_transformers(tiny_runtime, prompts, answers):
    found = tiny_runtime.generate(prompts[:4], max_new_tokens=LIMIT, repetition_penalty=1.1)
    assert [one.response for one in found] == answers[:4]


@pytest.mark.parametrize("share", ["none", "system", "all"])
def test_continuous_batching_and_shared_beginnings(plain, tiny, prompts, share):
    """Answers of very different length: a prompt takes the place of an answer that is finished."""
    limits = {}
    system = next(at for at, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert system > 20
    shared = {"none": None, "system": [system] * len(prompts), "all": [len(one) for one in prompts]}[share]
    want = [greedy(plain, prompt, 2 + 5 * index, 1.1) for index, prompt in enumerate(prompts)]
    with opened(tiny, 3) as runtime:
        beginnings = Beginnings()
        decoder = Decoder(
            runtime.context(1024, 3),
            lambda _token: False,
            beginnings,
            sequences=3,
            penalty=1.1,
            max_new_tokens=40,
            watch=lambda rows: limits.setdefault(len(rows), rows),
        )
        decoder._is_finished = lambda answer: len(answer.response) == 2 + 5 * answer.index
        found = decoder.run(prompts, shared)
    assert [one.response for one in found] == want
    assert set(limits) == {0, 1, 2, 3}
    total = sum(map(len, prompts))
    assert beginnings.savings.prompt_tokens == total
    # of a prompt that is shared in whole, all but the last token is computed by itself, and then the last
    assert beginnings.savings.computed == {"none": total, "system": total - 6 * system, "all": total}[share]


def test_a_prompt_longer_than_the_batch(tiny, plain, prompts, answers):
    with opened(tiny, 2, batch=32) as runtime:
        assert max(map(len, prompts)) > 64
        found = runtime.generate(prompts, max_new_tokens=LIMIT, repetition_penalty=1.1)
        assert [one.response for one in found] == answers
        logits = runtime.logits(prompts[4])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, plain.logits(prompts[4]), atol=LOGITS_LLAMACPP)
    assert np.ptp(logits) > 1


def test_a_given_context_is_kept_to(tiny, prompts, answers):
    """Prompts that are short first and long then: as many at once as fit, each time."""
    with opened(tiny, 7, context=512) as runtime:
        short, long = [0, 1, 6] * 3, [4, 5, 3, 2, 4, 5]
        for some in (short, long, short):
            found = runtime.generate([prompts[i] for i in some], max_new_tokens=LIMIT, repetition_penalty=1.1)
            assert [one.response for one in found] == [answers[i] for i in some]
            assert runtime._context.cells == 512
    with opened(tiny, 7, context=256) as runtime:
        with pytest.raises(ModelError, match=r"--context 256 is too small: .* take \d+ tokens"):
            runtime.generate(prompts[4:5], max_new_tokens=250, repetition_penalty=1.1)
        with pytest.raises(ModelError, match="--context 256 is too small"):
            runtime.logits([5] * 300)


def test_a_larger_context_left_from_other_work_changes_nothing(tiny, prompts, answers):
    with opened(tiny, 2) as runtime:
        runtime.run(prompts, lambda _layer, _x, _y: False)  # seven sequences at once
        found = runtime.generate(prompts, max_new_tokens=LIMIT, repetition_penalty=1.1)
    assert [one.response for one in found] == answers


def test_a_full_cache_is_said_to_be_full(tiny, prompts):
    with opened(tiny, 3) as runtime:
        decoder = Decoder(
            runtime.context(256, 3), lambda _t: False, Beginnings(), sequences=3, penalty=1.1, max_new_tokens=300
        )
        with pytest.raises(ModelError, match="the KV cache is full"):
            decoder.run(prompts)
        assert len(runtime.generate(prompts[:1], max_new_tokens=4, repetition_penalty=1.0)[0].response) == 4


def test_more_sequences_than_llama_cpp_has(tiny, prompts):
    with opened(tiny, 300) as runtime:
        found = runtime.generate([prompts[0][-4:]] * 300, max_new_tokens=2, repetition_penalty=1.0)
        assert len({one.response for one in found}) == 1
        assert runtime._context.sequences == 256
        with pytest.raises(ModelError, match=r"300 sequences at once are more than llama\.cpp's 256"):
            runtime.context(600, 300)


def test_beginnings_are_dropped_when_they_take_too_much(tiny, prompts, monkeypatch):
    with opened(tiny, 2) as runtime:
        context, beginnings = runtime.context(512, 2), Beginnings()
        heads = [prompt[:20] for prompt in (prompts[0], (*prompts[0][:5], *prompts[4]), prompts[4][5:])]
        beginnings.prepare(context, [*heads, heads[0], ()])
        sizes = {head: len(saved) for head, saved in beginnings._kept.items()}
        assert len(sizes) == 3
        assert beginnings.savings.computed == 60
        beginnings.load(context, heads[0], 1)  # used last
        monkeypatch.setattr(decoding, "_KEPT_BYTES", 2 * max(sizes.values()))
        beginnings.trim()
        assert list(beginnings._kept) == [heads[2], heads[0]]
        beginnings.prepare(context, heads)
        assert beginnings.savings.computed == 80
        with pytest.raises(KeyError):
            beginnings.load(context, heads[0][:7], 0)


def same(left, right):
    for one, other in zip(left[0], right[0], strict=True):
        assert one.tokens == other.tokens > 0
        for name in ("active", "histogram", "largest"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(left[1].active, right[1].active)
    np.testing.assert_array_equal(left[1].tokens, right[1].tokens)


def test_statistics_do_not_depend_on_what_was_asked_before(make_tiny, prompts):
    path = make_tiny("Q4_1")
    groups, shared = [0, 0, 1, 1, 0, 1, 1], [20] * 7
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.1}
    with opened(path, 3) as runtime:
        first = runtime.observe(prompts, groups, shared=shared, **settings)
        same(first, runtime.observe(prompts, groups, shared=shared, **settings))
    with opened(path, 3) as runtime:
        runtime.logits(prompts[4] * 5)
        runtime.run(prompts, lambda _layer, _x, _y: False)
        runtime.observe(prompts[::-1], groups, shared=shared, max_new_tokens=60, repetition_penalty=1.3)
        runtime.generate(prompts[2:4], **settings)
        same(first, runtime.observe(prompts, groups, shared=shared, **settings))


class OddError(Exception):
    pass


@pytest.mark.parametrize("error", [OddError, KeyboardInterrupt])
def test_what_is_raised_while_looking_comes_out(tiny, prompts, answers, error):
    seen = []

    def look(layer, _x, _y):
        seen.append(layer)
        if layer == 1:
            raise error("here")
        return False

    with opened(tiny, 7) as runtime:
        with pytest.raises(error, match="here"):
            runtime.run(prompts, look)
        assert seen == [0, 1]  # the rest of the pass is dropped
        found = runtime.generate(prompts, max_new_tokens=LIMIT, repetition_penalty=1.1)
        assert [one.response for one in found] == answers


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from npti_export.models import gguf_source
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
number = getattr(signal, sys.argv[2])
def stop(number, frame): raise KeyboardInterrupt
signal.signal(number, stop)
path = Path(sys.argv[1])
source = gguf_source(path)
prompts, groups = [[5 + i, 7, 9] for i in range(4)], [0, 1, 0, 1]
with LlamaCppRuntime(path, Settings(threads=1), sequences=4, source=source) as runtime:
    observe = lambda limit: runtime.observe(prompts, groups, max_new_tokens=limit, repetition_penalty=1.0)
    before = observe(4)[1].active.tolist()
    runtime.chat.is_end = lambda token: False
    for delay in (0.02, 0.1, 0.2, 0.31, 0.43):
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        timer.start()
        try:
            observe(4_000)
        except KeyboardInterrupt:
            print("interrupted")
        timer.join()
    assert observe(4)[1].active.tolist() == before
    print("well")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_llama_cpp_computes_interrupts_it(tiny, cli_environment, name):
    """Python runs handlers inside the callback then, and ctypes would print and forget what they raise."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny), name],
        env=cli_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["interrupted"] * 5 + ["well"]


def test_a_handler_that_raises_nothing_disturbs_nothing(tiny, prompts, answers):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))

    def look(layer, _x, _y):
        os.kill(os.getpid(), signal.SIGINT)
        return False

    try:
        with opened(tiny, 7) as runtime:
            want = runtime.logits(prompts[0])
            np.testing.assert_array_equal(runtime.run(prompts[:1], look), want)
        assert heard == [signal.SIGINT] * 3
        assert signal.getsignal(signal.SIGINT).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_decode_too(tiny, prompts, answers):
    from concurrent.futures import ThreadPoolExecutor

    def work():
        with opened(tiny, 2) as runtime:
            return runtime.generate(prompts[:2], max_new_tokens=LIMIT, repetition_penalty=1.1)

    with ThreadPoolExecutor(1) as pool:
        assert [one.response for one in pool.submit(work).result()] == answers[:2]
