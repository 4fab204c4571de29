"""The measure itself, and the score of trait expression."""

import numpy as np
import pytest
from reference import ReferenceLlama, kl
from test_bake import bake, rule_for

from npti_export.bench import load_bench
from npti_export.endings.gguf import GGUFEnding
from npti_export.evaluate.contrast import score
from npti_export.evaluate.prompts import scoring_prompts
from npti_export.gguf.reader import read_gguf
from npti_export.identify.collect import answer, plain_prompts
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import opener
from npti_export.steer import steered
from npti_export.verify import Fidelity, kl_divergence, measure


def test_kl_against_the_plainest_sum():
    rng = np.random.default_rng(0)
    p, q = (rng.normal(size=(130, 50)).astype(np.float32) * 5 for _ in range(2))
    assert kl_divergence(p, q).mean() == pytest.approx(kl(p, q), rel=1e-9)
    assert kl_divergence(p, p + 7).max() < 1e-9  # a constant changes no distribution
    assert kl_divergence(p, q).min() > 0.1


def test_measured_fidelity_against_float64(tiny, tiny_runtime, tmp_path):
    rule, recipe = rule_for(tiny), load_recipe("npti", ["verify.answer_tokens=6"])
    bake(tiny, tmp_path / "s.gguf", rule)
    prompts = [tiny_runtime.encode(chat(None, text)) for text in ("Hello", "What is it?")]
    found = measure(tiny_runtime, rule, opener(tmp_path / "s.gguf"), opener(tiny), prompts, recipe, Silent())
    with steered(tiny_runtime.activations, rule):
        sequences = [e.tokens for e in tiny_runtime.generate(prompts, max_new_tokens=6, repetition_penalty=1.1)]
    reference = ReferenceLlama(tiny)
    want = [reference.logits(tokens, rule.shift, rule.clamp) for tokens in sequences]
    base = [reference.logits(tokens) for tokens in sequences]
    assert found.positions == sum(map(len, sequences))
    assert found.kl_rule_base == pytest.approx(kl(np.concatenate(want), np.concatenate(base)), rel=1e-3)
    assert found.kl_rule_artifact < 1e-4
    assert found.kl_runtime_floor < 1e-4


def test_an_inert_file_does_not_pass(tiny, tiny_runtime, tmp_path):
    """The base itself, offered as the steered file."""
    rule, recipe = rule_for(tiny), load_recipe("npti", ["verify.answer_tokens=6"])
    prompts = [tiny_runtime.encode(chat(None, "Hello"))]
    found = measure(tiny_runtime, rule, opener(tiny), opener(tiny), prompts, recipe, Silent())
    assert found.kl_rule_artifact > 100 * found.limit(recipe, exact=True)
    assert found.kl_rule_artifact == found.kl_rule_base_file
    assert found.fault(recipe, exact=True, base="tiny") is not None


def fidelity(artifact=1e-5, base_file=0.3, floor=1e-6):
    return Fidelity(artifact, 0.3, base_file, floor, 1.0, 0.0, 10)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (fidelity(), None),
        (fidelity(artifact=2e-4), "does not do what the rule says"),
        (fidelity(artifact=float("nan")), "does not do what the rule says"),
        (fidelity(floor=0.2, artifact=0.01), "not the same model"),
        (fidelity(floor=float("nan")), "not the same model"),
        (fidelity(artifact=5e-5, base_file=6e-5), "nothing proves that it does anything"),
        (fidelity(base_file=float("nan")), "nothing proves that it does anything"),
    ],
)
def test_what_is_refused(found, says):
    fault = found.fault(load_recipe("npti"), exact=True, base="tiny")
    assert fault is None if says is None else says in fault


def test_limits(make_tiny):
    recipe = load_recipe("npti")
    quiet, noisy = fidelity(floor=1e-6), fidelity(floor=0.004)
    assert quiet.limit(recipe, exact=True) == 1e-4
    assert quiet.limit(recipe, exact=False) == 5e-3
    assert noisy.limit(recipe, exact=False) == 8e-3
    for kind, exact in (("F32", True), ("F16", True), ("Q4_1", False)):
        path = make_tiny(kind)
        assert GGUFEnding(read_gguf(path), recipe).exact(path) is exact


def test_contrast_is_a_difference_of_likelihoods(tiny_runtime):
    recipe, bench = load_recipe("npti"), load_bench("openness")
    questions = bench.test(3)
    answers = answer(tiny_runtime, plain_prompts(tiny_runtime, questions, recipe), recipe, 5)
    (found,) = score(tiny_runtime, bench, questions, [answers], recipe, personas=1)
    for index, (question, response) in enumerate(zip(questions, answers, strict=True)):
        means = {}
        for sign in "+-":
            prompt = scoring_prompts(tiny_runtime, bench, questions, sign, recipe, turn=0)[index]
            logits = tiny_runtime.logits(prompt + response).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            means[sign] = np.mean([log_p[len(prompt) - 1 + i, token] for i, token in enumerate(response)])
            assert question.text in tiny_runtime.decode(prompt)
        assert found.contrast[index] == pytest.approx(means["+"] - means["-"], abs=1e-4)
