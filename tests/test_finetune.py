"""The fine-tuning baseline on a tiny random model: it learns what it should, and leaves nothing behind."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_mixtures import save_tiny
from tolerances import LOGITS_FLOAT32

from npti_export.bench import load_bench
from npti_export.errors import BenchError, EvaluationError
from npti_export.evaluate import finetune
from npti_export.evaluate.finetune import FineTuneSettings, fine_tuned, low_rank, plain_exchanges, train
from npti_export.identify.collect import contrast_prompts
from npti_export.models import resolve_model
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.transformers import TransformersRuntime

END = 2  # the tiny model's end-of-turn token
RECIPE = load_recipe("npti", ["identify.max_new_tokens=12", "identify.batch_size=4"])
SETTINGS = FineTuneSettings(rank=4, epochs=6, learning_rate=5e-3, batch=4)


class Told(Silent):
    def __init__(self):
        self.stages, self.steps, self.notes = [], 0, []

    def start(self, stage, total):
        self.stages.append((stage, total))

    def advance(self, steps, tokens=0):
        self.steps += steps

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def runtime(tiny_runtime):
    """A copy, for a test that fails may leave something behind."""
    return tiny_runtime.converted("float32")


@pytest.fixture(scope="module")
def bench():
    return load_bench("extraversion")


@pytest.fixture(scope="module")
def exchanges(runtime):
    """Answers and questions of different lengths; each answer has a beginning of its own, all have one end."""
    prompts = [runtime.encode(chat(None, "Do you like to " + "really " * n + "dance?")) for n in range(6)]
    return [Exchange(prompt, (40 + n, *range(80, 83 + n), END)) for n, prompt in enumerate(prompts)]


def state(runtime):
    """All that a block might change: weights and what they are called, modules and their attributes, flags."""
    model = runtime.model
    return (
        {name: one.clone() for name, one in model.state_dict().items()},
        [(name, module, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, one, one.requires_grad, one.grad) for name, one in model.named_parameters()],
        (len([hook for module in model.modules() for hook in module._forward_hooks]), model.config.to_dict()),
    )


def assert_same_state(before, runtime):
    weights, modules, parameters, others = state(runtime)
    assert list(weights) == list(before[0])
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert [(name, *rest) for name, _, *rest in modules] == [(name, *rest) for name, _, *rest in before[1]]
    assert all(now[1] is then[1] for now, then in zip(modules, before[1], strict=True))
    assert all(now[1] is then[1] for now, then in zip(parameters, before[2], strict=True))
    assert [(name, *rest) for name, _, *rest in parameters] == [(name, *rest) for name, _, *rest in before[2]]
    assert others == before[3]


def plain_loss(runtime, exchanges):
    """Mean negative log-likelihood of all response tokens together, token by token in float64."""
    losses = []
    for exchange in exchanges:
        logits = runtime.logits(exchange.tokens).astype(np.float64)
        for position, token in enumerate(exchange.response, len(exchange.prompt) - 1):
            losses.append(np.log(np.exp(logits[position]).sum()) - logits[position, token])
    return np.mean(losses)


def test_it_learns_within_the_block_and_nothing_is_left_after_it(runtime, exchanges):
    before, logits, loss = state(runtime), runtime.logits(exchanges[0].tokens), plain_loss(runtime, exchanges)
    prompts, told = [exchange.prompt for exchange in exchanges], Told()
    answers = runtime.generate(prompts, max_new_tokens=8, repetition_penalty=1.0)
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    with fine_tuned(runtime, exchanges, SETTINGS, told) as tuned:
        assert plain_loss(tuned, exchanges) < 0.5 * loss
        assert tuned.generate(prompts, max_new_tokens=8, repetition_penalty=1.0) != answers
        assert not np.array_equal(tuned.logits(exchanges[0].tokens), logits)
    assert_same_state(before, runtime)
    assert torch.equal(torch.get_rng_state(), generator)
    assert np.array_equal(runtime.logits(exchanges[0].tokens), logits)
    assert runtime.generate(prompts, max_new_tokens=8, repetition_penalty=1.0) == answers
    assert (told.stages, told.steps) == ([("fine-tune", 12)], 12)
    assert len(told.notes) == 1
    assert "6 answers" in told.notes[0]


def test_restored_after_an_exception_in_the_block_and_in_training(runtime, exchanges, monkeypatch):
    before = state(runtime)
    with pytest.raises(RuntimeError, match="of the caller"), fine_tuned(runtime, exchanges, SETTINGS, Silent()):
        raise RuntimeError("of the caller")
    assert_same_state(before, runtime)
    told, real = Told(), finetune._backward
    monkeypatch.setattr(finetune, "_backward", lambda *given: real(*given) if told.steps < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError), fine_tuned(runtime, exchanges, SETTINGS, told):
        pytest.fail("a half-trained model was given out")
    assert told.steps == 3
    assert_same_state(before, runtime)


def test_a_loss_that_is_not_finite_is_an_error(runtime, exchanges):
    broken = copy.copy(runtime)
    broken.model = copy.deepcopy(runtime.model)
    broken.model.model.norm.weight.data[3] = float("inf")
    with (
        pytest.raises(EvaluationError, match=r"the loss is (nan|inf) at step 1 of 12"),
        low_rank(broken, SETTINGS) as weights,
    ):
        train(broken, weights, exchanges, SETTINGS, Silent())


def test_only_response_tokens_count(runtime, exchanges):
    one_step = replace(SETTINGS, epochs=1, batch=len(exchanges))
    with low_rank(runtime, one_step) as weights:
        losses = train(runtime, weights, exchanges, one_step, Silent())
    assert losses == [pytest.approx(plain_loss(runtime, exchanges), abs=LOGITS_FLOAT32)]
    without_ends = [Exchange(exchange.prompt, exchange.response[:-1]) for exchange in exchanges]
    assert abs(losses[0] - plain_loss(runtime, without_ends)) > 10 * LOGITS_FLOAT32
    by_answer = np.mean([plain_loss(runtime, [exchange]) for exchange in exchanges])
    assert abs(losses[0] - by_answer) > 10 * LOGITS_FLOAT32


@pytest.mark.parametrize(
    ("model_type", "scale"), [("granite", {"logits_scaling": 4.0}), ("gemma2", {"final_logit_softcapping": 2.0})]
)
def test_what_a_family_does_to_its_logits_counts(runtime, exchanges, tmp_path, model_type, scale):
    save_tiny(tmp_path / "scaled", model_type, runtime.tokenizer, **scale)
    scaled = TransformersRuntime(resolve_model(str(tmp_path / "scaled")), device="cpu", dtype="float32")
    one_step = replace(SETTINGS, epochs=1, batch=len(exchanges))
    with low_rank(scaled, one_step) as weights:
        losses = train(scaled, weights, exchanges, one_step, Silent())
    assert losses == [pytest.approx(plain_loss(scaled, exchanges), abs=LOGITS_FLOAT32)]


@pytest.mark.parametrize("limit", ["_TOKENS_PER_PASS", "_LOGITS_PER_PASS"])
def test_a_step_in_several_passes_is_the_same_step(runtime, exchanges, monkeypatch, limit):
    def gradients():
        with low_rank(runtime, SETTINGS) as weights:
            generator = torch.Generator().manual_seed(1)
            for weight in weights:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.05
            loss = finetune._backward(runtime, exchanges)
            return loss, torch.cat([weight.grad.flatten() for weight in weights])

    whole_loss, whole = gradients()
    monkeypatch.setattr(finetune, limit, 1)
    assert len(list(finetune._passes(exchanges, 1000))) == len(exchanges)
    loss, summed = gradients()
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert whole.norm() > 1e-3
    assert (summed - whole).norm() < 1e-4 * whole.norm()


def test_gradient_against_finite_differences(runtime, exchanges):
    """Of the loss as the plain reference computes it, along the gradient."""
    with low_rank(runtime, SETTINGS) as weights:
        generator = torch.Generator().manual_seed(2)
        for weight in weights:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        finetune._backward(runtime, exchanges)
        gradients = [weight.grad.clone() for weight in weights]
        norm = float(torch.cat([one.flatten() for one in gradients]).norm())
        losses = []
        for step in (0.02, -0.04):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.data += step / norm * gradient
            losses.append(plain_loss(runtime, exchanges))
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(norm, rel=0.02)


def trained(runtime, exchanges, settings):
    with low_rank(runtime, settings) as weights:
        losses = train(runtime, weights, exchanges, settings, Silent())
        return losses, [weight.detach().clone() for weight in weights]


def test_a_seed_gives_the_same_weights(runtime, exchanges):
    losses, weights = trained(runtime, exchanges, SETTINGS)
    torch.manual_seed(12345)  # must not matter
    again_losses, again = trained(runtime, exchanges, SETTINGS)
    assert losses == again_losses
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))
    assert len(weights) == 3 * 7 * 2  # layers; q, k, v, o, gate, up, down; A and B
    other_losses, other = trained(runtime, exchanges, replace(SETTINGS, seed=1))
    assert losses != other_losses
    assert not any(torch.equal(one, two) for one, two in zip(weights, other, strict=True))


def test_bfloat16_model_has_float32_lora_and_learns(runtime, exchanges):
    halved = runtime.converted("bfloat16")
    before = state(halved)
    with low_rank(halved, SETTINGS) as weights:
        assert {weight.dtype for weight in weights} == {torch.float32}
        losses = train(halved, weights, exchanges, SETTINGS, Silent())
        assert {weight.dtype for weight in weights} == {torch.float32}
    assert losses[0] == pytest.approx(trained(runtime, exchanges, SETTINGS)[0][0], abs=0.05)
    assert losses[-1] < 0.7 * losses[0]
    assert_same_state(before, halved)
    with pytest.raises(EvaluationError, match="float16 overflows"), low_rank(runtime.converted("float16"), SETTINGS):
        pass


def test_data_are_persona_answers_after_plain_questions(runtime, bench):
    found = plain_exchanges(runtime, bench, "-", RECIPE, 6)
    questions = bench.search(6, RECIPE.identify.seed)
    assert [exchange.prompt for exchange in found] == [runtime.encode(chat(None, one.text)) for one in questions]
    personas = contrast_prompts(runtime, bench, questions, "-", RECIPE)
    expected = [
        runtime.generate([prompt], max_new_tokens=12, repetition_penalty=RECIPE.identify.repetition_penalty)[0].response
        for prompt in personas
    ]
    assert [exchange.response for exchange in found] == expected
    short = plain_exchanges(runtime, bench, "-", RECIPE, 2, max_new_tokens=3)
    assert [exchange.response for exchange in short] == [response[:3] for response in expected[:2]]
    assert plain_exchanges(runtime, bench, "+", RECIPE, 6) != found


def test_what_cannot_be_trained_is_refused(runtime, exchanges, bench):
    before = state(runtime)
    for wrong, said in [
        ([], "no answers to train on"),
        ([exchanges[0], Exchange(exchanges[1].prompt, ())], "answer 2 of 2 has an empty response"),
        ([Exchange((), (5, END))], "answer 1 of 1 has an empty prompt"),
    ]:
        with pytest.raises(EvaluationError, match=said), fine_tuned(runtime, wrong, SETTINGS, Silent()):
            pytest.fail("trained on nothing")
    with pytest.raises(EvaluationError, match="0 questions"):
        plain_exchanges(runtime, bench, "+", RECIPE, 0)
    with pytest.raises(BenchError, match="search questions asked for"):
        plain_exchanges(runtime, bench, "+", RECIPE, 10**6)
    with (
        low_rank(runtime, SETTINGS),
        pytest.raises(EvaluationError, match="has a PEFT adapter already"),
        fine_tuned(runtime, exchanges, SETTINGS, Silent()),
    ):
        pytest.fail("trained two at once")
    assert_same_state(before, runtime)


@pytest.mark.parametrize("field", ["questions", "rank", "alpha", "epochs", "batch", "learning_rate"])
def test_settings_out_of_range(field):
    with pytest.raises(EvaluationError, match=f"{field} = 0 must be"):
        FineTuneSettings(**{field: 0})
    if field == "learning_rate":
        for wild in (float("nan"), 1e38):
            with pytest.raises(EvaluationError, match="must be above 0 and at most 1"):
                FineTuneSettings(learning_rate=wild)


def test_models_without_linear_modules(runtime, tmp_path):
    save_tiny(tmp_path / "mixture", "mixtral", runtime.tokenizer)
    mixture = TransformersRuntime(resolve_model(str(tmp_path / "mixture")), device="cpu", dtype="float32")
    with pytest.raises(EvaluationError, match="experts of a mixture"), low_rank(mixture, SETTINGS):
        pass
    bare = copy.copy(runtime)
    bare.model = copy.deepcopy(runtime.model)
    bare.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(EvaluationError, match="no linear modules"), low_rank(bare, SETTINGS):
        pass
