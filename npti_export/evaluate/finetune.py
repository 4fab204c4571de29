"""The paper's fine-tuning row: a small LoRA trained on what the unsteered model answers as a persona.

The model answers search questions as somebody at the wanted pole; the LoRA learns to give these answers to the bare
questions. PEFT puts it into the model and takes it out again; the model's own weights are never written to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npti_export.bench import TraitBench
from npti_export.errors import EvaluationError
from npti_export.evaluate.prompts import prompts
from npti_export.identify.collect import answer
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.transformers import TransformersRuntime, batches
from npti_export.traits import Sign

if TYPE_CHECKING:
    import torch

_TOKENS_PER_PASS = 512  # forward and back, padding included, though a longer exchange goes in whole: bounds memory
_LOGITS_PER_PASS = 1 << 25  # float32 numbers, the same: 128 MiB, about three times that while they are differentiated
_LARGEST_NORM = 1.0  # of the gradient of all weights together; the usual value


@dataclass(frozen=True)
class FineTuneSettings:
    """Settings of the LoRA and of its training.

    Attributes:
        questions: search questions that the model answers for its training.
        rank: of each LoRA pair.
        alpha: times ``B A x / rank`` is what a pair adds.
        epochs: how often each answer is seen.
        learning_rate: AdamW's, at the first step; it falls evenly and would be 0 one step after the last.
        batch: answers a step.
        seed: of the LoRA's first weights and of the order of the answers.
    """

    questions: int = 48
    rank: int = 8
    alpha: int = 16
    epochs: int = 2
    learning_rate: float = 1e-3
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "rank", "alpha", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"fine-tuning: {name} = {getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate <= 1:
            raise EvaluationError(f"fine-tuning: learning_rate = {self.learning_rate} must be above 0 and at most 1")


def plain_exchanges(
    runtime: TransformersRuntime,
    bench: TraitBench,
    sign: Sign,
    recipe: Recipe,
    count: int,
    *,
    max_new_tokens: int | None = None,
) -> list[Exchange]:
    """The first ``count`` search questions, each with what the unsteered model answers as a persona of the pole.

    Args:
        runtime: the unsteered model.
        bench: personas and questions.
        sign: the pole.
        recipe: its ``prompt`` and ``identify`` sections.
        count: questions.
        max_new_tokens: longest answer; None takes the recipe's.

    Raises:
        BenchError: more questions than there are.
        EvaluationError: no question asked for.
    """
    if count < 1:
        raise EvaluationError(f"fine-tuning: {count} questions asked for, at least 1 is needed")
    questions = bench.search(count, recipe.identify.seed)
    as_persona = prompts(runtime, bench, questions, sign, recipe, "persona")
    answers = answer(runtime, as_persona, recipe, max_new_tokens or recipe.identify.max_new_tokens)
    plain = prompts(runtime, bench, questions, sign, recipe, "plain")
    return [Exchange(prompt, response) for prompt, response in zip(plain, answers, strict=True)]


@contextmanager
def fine_tuned(
    runtime: TransformersRuntime, exchanges_plain: Sequence[Exchange], settings: FineTuneSettings, progress: Progress
) -> Iterator[TransformersRuntime]:
    """The model with a LoRA trained on exchanges, for as long as the block lasts; after it the model is as before.

    It is the same runtime that is given back: what is to be asked of the unsteered model is asked before or after.

    Args:
        runtime: the unsteered model, in float32 or bfloat16.
        exchanges_plain: see :func:`plain_exchanges`.
        settings: of the LoRA and its training.
        progress: told of each step.

    Raises:
        EvaluationError: as :func:`low_rank` and :func:`train`.
    """
    _check(exchanges_plain)
    with low_rank(runtime, settings) as weights:
        losses = train(runtime, weights, exchanges_plain, settings, progress)
        progress.note(
            f"fine-tuned on {len(exchanges_plain)} answers: loss {losses[0]:.3f} at the first step, "
            f"{losses[-1]:.3f} at the last of {len(losses)}"
        )
        yield runtime


@contextmanager
def low_rank(runtime: TransformersRuntime, settings: FineTuneSettings) -> Iterator[list[torch.nn.Parameter]]:
    """The model with a LoRA beside each linear module of its layers, for as long as the block lasts.

    The LoRA (Hu et al. 2021, arXiv 2106.09685) is PEFT's: ``A`` random by the seed, ``B`` zero, so that it changes
    nothing before it is trained. Its weights are float32, whatever the model's are. The block is given them.

    Raises:
        EvaluationError: a mixture of experts, whose experts are no linear modules; a model that is in float16, that
            has no linear modules in its layers, or that has another PEFT adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    model = runtime.model
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_targets(runtime),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    trainable = {name: one.requires_grad for name, one in model.named_parameters()}
    # PEFT draws the first weights from torch's own generator on the CPU.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about saving, which never happens
        torch.default_generator.manual_seed(settings.seed)
        lora = get_peft_model(model, config)
    try:
        lora.eval()  # the model's own dropout would not be repeatable
        yield [one for one in lora.parameters() if one.requires_grad]
    finally:
        lora.unload()
        for name, one in model.named_parameters():
            one.requires_grad_(trainable[name])


def train(
    runtime: TransformersRuntime,
    weights: Sequence[torch.nn.Parameter],
    exchanges: Sequence[Exchange],
    settings: FineTuneSettings,
    progress: Progress,
) -> list[float]:
    """Train weights that :func:`low_rank` gave to make each response follow its prompt.

    The loss is the mean negative log-likelihood of the response tokens, over all of a step's exchanges; prompts do not
    count, an end-of-turn token does. AdamW, no weight decay, gradients clipped to norm 1.

    The same model, exchanges and settings give bitwise the same weights on a CPU with the same number of threads and
    the same libraries. Another number of threads or another device rounds otherwise, and on GPUs attention's gradients
    are summed in an order that may change from run to run.

    Returns:
        The loss of each step in nats per token, before the step.

    Raises:
        EvaluationError: no exchanges, an empty prompt or response, or a loss that is not finite.
    """
    import torch

    _check(exchanges)
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * math.ceil(len(exchanges) / settings.batch)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses: list[float] = []
    progress.start("fine-tune", steps)
    for _ in range(settings.epochs):
        places = torch.randperm(len(exchanges), generator=order).tolist()
        for start in range(0, len(places), settings.batch):
            batch = [exchanges[place] for place in places[start : start + settings.batch]]
            optimizer.zero_grad()
            losses.append(_backward(runtime, batch))
            if not math.isfinite(losses[-1]):
                raise EvaluationError(
                    f"{runtime.source.name}: fine-tuning: the loss is {losses[-1]} at step {len(losses)} of {steps}; "
                    f"a learning_rate below {settings.learning_rate} may mend it"
                )
            torch.nn.utils.clip_grad_norm_(weights, _LARGEST_NORM)
            optimizer.step()
            schedule.step()
            progress.advance(1, sum(len(exchange.tokens) for exchange in batch))
    optimizer.zero_grad()
    return losses


def _check(exchanges: Sequence[Exchange]) -> None:
    if not exchanges:
        raise EvaluationError("fine-tuning: there are no answers to train on")
    for place, exchange in enumerate(exchanges, 1):
        if not exchange.prompt or not exchange.response:
            empty = "response" if exchange.prompt else "prompt"
            raise EvaluationError(f"fine-tuning: answer {place} of {len(exchanges)} has an empty {empty}; leave it out")


def _targets(runtime: TransformersRuntime) -> list[str]:
    """Names of the linear modules in the model's layers: all of attention and MLP, and not the output head."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = runtime.source.name
    if runtime.source.architecture.mixture:
        raise EvaluationError(
            f"{name}: fine-tuning needs the MLP's projections as linear modules, which the experts of a mixture are "
            "not; leave this baseline out"
        )
    if runtime.dtype == torch.float16:
        raise EvaluationError(f"{name}: fine-tuning in float16 overflows; load the model in float32 or bfloat16")
    if any(isinstance(module, BaseTunerLayer) for module in runtime.model.modules()):
        raise EvaluationError(f"{name}: fine-tuning: the model has a PEFT adapter already; unload it first")
    linear = {
        id(module) for layer in runtime.layers for module in layer.modules() if isinstance(module, torch.nn.Linear)
    }
    if not linear:
        raise EvaluationError(
            f"{name}: fine-tuning: no linear modules in the model's layers, there is nothing to train"
        )
    return [path for path, module in runtime.model.named_modules() if id(module) in linear]


def _backward(runtime: TransformersRuntime, batch: Sequence[Exchange]) -> float:
    """Add the gradient of the batch's mean loss to the weights' own; the loss."""
    total = sum(len(exchange.response) for exchange in batch)
    loss = 0.0
    vocabulary = int(runtime.model.config.get_text_config().vocab_size)
    for part in _passes(sorted(batch, key=lambda exchange: len(exchange.tokens)), vocabulary):
        loss += _backward_pass(runtime, part, total)
    return loss


def _passes(exchanges: Sequence[Exchange], vocabulary: int) -> Iterator[list[Exchange]]:
    """Exchanges from short to long, as many at once as fit in the limits of a pass, padding included."""
    return batches(exchanges, _TOKENS_PER_PASS, max(1, _LOGITS_PER_PASS // vocabulary))


def _backward_pass(runtime: TransformersRuntime, part: Sequence[Exchange], total: int) -> float:
    import torch

    length = max(len(exchange.tokens) for exchange in part)
    ids = torch.zeros(len(part), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, exchange in enumerate(part):
        ids[row, : len(exchange.tokens)] = torch.tensor(exchange.tokens)
        mask[row, : len(exchange.tokens)] = 1
        counted[row, len(exchange.prompt) : len(exchange.tokens)] = True
    first = min(len(exchange.prompt) for exchange in part)
    ids, mask, counted = (one.to(runtime.device) for one in (ids, mask, counted))
    with torch.enable_grad():
        logits = runtime.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - first + 1
        ).logits[:, :-1]
        wanted = ids.masked_fill(~counted, -100)[:, first:]  # -100: not counted
        loss = (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum") / total
        )
        torch.autograd.backward(loss)
    return float(loss.detach())
