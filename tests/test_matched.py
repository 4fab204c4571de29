"""The constant that moves the residual stream as personas do, against plain passes in float64."""

import dataclasses

import numpy as np
import pytest
from reference import ReferenceLlama
from tolerances import GATE_LLAMACPP

from npti_export.bench import load_bench
from npti_export.errors import ArchitectureError, ProfileError
from npti_export.identify.matched import match, through
from npti_export.identify.profiles import Place, profile_for
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.traits import TraitSpec

FEW = ["identify.matched_questions=3", "identify.max_new_tokens=6"]


@pytest.fixture(scope="module")
def runtimes(make_tiny):
    path = make_tiny()
    source = gguf_source(path)
    with LlamaCppRuntime(path, Settings(threads=1), sequences=2, source=source) as llama:
        yield path, source, llama, TransformersRuntime(source, dtype="float32")


def streams(path, exchange, added=None):
    """Stream behind each layer at the tokens from which the response is predicted, ``[layers, tokens, hidden]``."""
    reference, found, layer = ReferenceLlama(path), [], iter(range(99))
    linear = reference.linear

    def moved(x, name):
        y = linear(x, name)
        if added is not None and name.endswith("ffn_down"):
            y = y + added[next(layer)]
        return y

    reference.linear = moved
    reference.logits(exchange.tokens, behind=found)
    return np.array([one[len(exchange.prompt) - 1 : -1] for one in found])


@pytest.mark.parametrize("moved", [False, True])
def test_means_of_the_stream(runtimes, moved):
    path, source, llama, torch_runtime = runtimes
    exchanges = [
        Exchange(llama.encode(chat(None, text)), tuple(range(40, 40 + length)))
        for text, length in (("Why?", 5), ("What do you do when it rains?", 2), ("Hm", 1))
    ]
    shape = (source.shape.layers, source.shape.hidden)
    added = np.random.default_rng(1).normal(size=shape) if moved else None
    want = np.concatenate([streams(path, one, added) for one in exchanges], axis=1).mean(1)
    for runtime in (llama, torch_runtime):
        np.testing.assert_allclose(runtime.stream_means(exchanges, added), want, atol=GATE_LLAMACPP)
    assert np.abs(want).max() > 100 * GATE_LLAMACPP


def test_weights_of_the_down_projections(runtimes):
    path, _, llama, torch_runtime = runtimes
    want = ReferenceLlama(path).tensors["blk.1.ffn_down.weight"]
    for runtime in (llama, torch_runtime):
        np.testing.assert_allclose(runtime.down_weight(1), want, rtol=1e-6)
    np.testing.assert_allclose(want @ through(llama.down_weight(1), np.arange(64.0)), np.arange(64.0), atol=1e-6)


def test_following_takes_what_layers_make_of_it_into_account(runtimes):
    """One group at a time, against the plainest way: layer by layer, each pass with those before it in place."""
    path, source, llama, torch_runtime = runtimes
    exchanges = [Exchange(llama.encode(chat(None, text)), (41, 42, 43)) for text in ("Why?", "What is that?")]
    wanted = np.random.default_rng(4).normal(size=(source.shape.layers, source.shape.hidden))

    def mean(added):
        return np.concatenate([streams(path, one, added) for one in exchanges], axis=1).mean(1)

    base, added = mean(None), np.zeros_like(wanted)
    for layer in range(len(wanted)):
        added[layer] = wanted[layer] - (mean(added) - base)[layer]
    for runtime in (llama, torch_runtime):
        np.testing.assert_allclose(runtime.stream_follows(exchanges, wanted), added, atol=2 * GATE_LLAMACPP)
    apart = np.diff(wanted, axis=0, prepend=0)  # nobody listening to what the layers make of it
    assert np.abs(apart - added).max() > 100 * GATE_LLAMACPP


def test_an_answer_longer_than_a_batch_is_followed_piece_by_piece(runtimes):
    """Where each piece has a mean of its own to be moved, with the ones before it moved as they were."""
    path, source, _, _ = runtimes
    wanted = np.random.default_rng(5).normal(size=(source.shape.layers, source.shape.hidden))
    with LlamaCppRuntime(path, Settings(threads=1, batch=8), source=source) as llama:
        prompt = llama.encode(chat(None, "Why?"))
        exchange = Exchange(prompt, tuple(range(40, 72)))
        found = llama.stream_follows([exchange], wanted)
    fed, first = len(exchange.tokens) - 1, len(prompt) - 1
    pieces = [range(max(start, first), min(start + 8, fed)) for start in range(0, fed, 8) if start + 8 > first]
    assert len(pieces) > 3
    added = np.zeros((len(wanted), fed + 1, source.shape.hidden))
    plain, before = streams(path, exchange), pieces[0][0] // 8 * 8
    assert before > 0  # pieces that hold the prompt only
    for _ in wanted:
        added[:, before:] = 0
        for piece in pieces:
            rows = [at - first for at in piece]
            for layer in range(len(wanted)):
                moved = streams(path, exchange, added)[layer, rows].mean(0)
                start, end = piece[0] // 8 * 8, piece[-1] + 1
                added[layer, start:end] = wanted[layer] - (moved - plain[layer, rows].mean(0))
        want = added[:, first:fed].mean(1)
        added[:, :before] = want[:, None]
    np.testing.assert_allclose(found, want, atol=2 * GATE_LLAMACPP)


def test_a_small_batch_moves_the_whole_prompt_too(runtimes):
    """What is counted is in one piece of eight, the prompt before it in others: the same as all of it in one."""
    path, source, whole, _ = runtimes
    wanted = np.random.default_rng(6).normal(size=(source.shape.layers, source.shape.hidden))
    texts = (f"Why{' so' * count}?" for count in range(8))
    prompt = next(one for one in (whole.encode(chat(None, text)) for text in texts) if (len(one) - 1) % 8 < 6)
    assert len(prompt) > 16
    exchange = Exchange(prompt, (41, 42, 43))
    with LlamaCppRuntime(path, Settings(threads=1, batch=8), source=source) as small:
        found = small.stream_follows([exchange], wanted)
        assert np.abs(small.stream_follows([exchange, exchange], wanted) - found).max() < 2 * GATE_LLAMACPP
    np.testing.assert_allclose(found, whole.stream_follows([exchange], wanted), atol=2 * GATE_LLAMACPP)


def test_the_steered_stream_is_where_personas_take_it(runtimes):
    """Measured afresh: plain questions with the constant in place, against personas of both poles on the same words."""
    path, source, llama, torch_runtime = runtimes
    bench, recipe = load_bench("extraversion"), load_recipe("matched", FEW)
    ours = match(llama, bench, "+", recipe, Silent())
    answers = [
        one.response
        for one in llama.generate(prompts(llama, bench, recipe, "+"), max_new_tokens=6, repetition_penalty=1.1)
    ]
    means = {}
    for name in ("+", "-", None):
        exchanges = [Exchange(*pair) for pair in zip(prompts(llama, bench, recipe, name), answers, strict=True)]
        means[name] = np.concatenate([streams(path, one) for one in exchanges], axis=1).mean(1)
    plain = [Exchange(*pair) for pair in zip(prompts(llama, bench, recipe, None), answers, strict=True)]
    weights = [ReferenceLlama(path).tensors[f"blk.{layer}.ffn_down.weight"] for layer in range(source.shape.layers)]
    added = np.stack([w @ c.astype(np.float64) for w, c in zip(weights, ours.constant, strict=True)])
    moved = np.concatenate([streams(path, one, added) for one in plain], axis=1).mean(1) - means[None]
    wanted = means["+"] - means["-"]
    np.testing.assert_allclose(ours.wanted, wanted, atol=2 * GATE_LLAMACPP)
    gap = np.linalg.norm(moved - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert gap.max() < ours.left + 0.01 < 0.15
    theirs = match(torch_runtime, bench, "+", recipe, Silent())
    np.testing.assert_allclose(theirs.wanted, ours.wanted, atol=2 * GATE_LLAMACPP)


def prompts(runtime, bench, recipe, sign):
    from npti_export.identify.collect import contrast_prompts

    questions = bench.search(3, recipe.identify.seed)
    if sign is not None:
        return contrast_prompts(runtime, bench, questions, sign, recipe)
    return [runtime.encode(chat(None, question.text)) for question in questions]


def test_a_stream_that_does_not_follow_is_an_error(runtimes, monkeypatch):
    _, _, llama, _ = runtimes
    monkeypatch.setattr(llama, "stream_follows", lambda _exchanges, wanted: np.zeros_like(wanted))
    with pytest.raises(ProfileError, match=r"does not follow.*100%.*rule.matched = 0"):
        match(llama, load_bench("extraversion"), "+", load_recipe("matched", FEW), Silent())


def test_profiles_hold_what_the_recipe_asks_for(runtimes, tmp_path):
    _, source, llama, _ = runtimes
    bench, recipe, loads = load_bench("extraversion"), load_recipe("matched", FEW), []

    def load():
        loads.append(1)
        return llama

    place = Place(load, source, "ggml", "cpu", tmp_path)
    profile = profile_for(place, bench, ["-"], recipe, Silent())
    assert profile.matched_plus is None
    assert profile.origin["questions"] == 0
    rule = build_rule(profile, TraitSpec("extraversion", "-", 0.5), recipe)
    np.testing.assert_allclose(rule.constant, 0.5 * profile.matched_minus, rtol=1e-6)
    assert rule.shifted == rule.clamped == 0
    again = profile_for(place, bench, ["-"], recipe, Silent())
    np.testing.assert_array_equal(again.matched_minus, profile.matched_minus)
    assert len(loads) == 1
    (kept,) = (tmp_path / "matched").iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])  # cut short
    once_more = profile_for(place, bench, ["-"], recipe, Silent())
    np.testing.assert_array_equal(once_more.matched_minus, profile.matched_minus)
    assert len(loads) == 2
    with pytest.raises(ProfileError, match=r"does not hold the constant that rule.matched multiplies"):
        build_rule(profile, TraitSpec("extraversion", "+"), recipe)
    mixture = dataclasses.replace(source, architecture=type("Mixture", (), {"mixture": True}))
    with pytest.raises(ArchitectureError, match="a mixture of experts has many"):
        profile_for(dataclasses.replace(place, source=mixture), bench, ["+"], recipe, Silent())
