"""Does the written file do what the rule says? Measured in the runtime that will run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npti_export.architectures import FFN_DOWN, FFN_GATE, FFN_UP
from npti_export.gguf.blocks import is_float
from npti_export.gguf.reader import GGUFFile
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp import LlamaCppRuntime
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered

Logits = npt.NDArray[np.float32]
_ROWS = 64  # positions compared at once: bounds the float64 copies of a large vocabulary


@dataclass(frozen=True)
class Fidelity:
    """Distances between next-token distributions, over all positions of the held-out sequences.

    Attributes:
        kl_rule_artifact: mean KL(rule in float32 torch ‖ steered file in llama.cpp), nats.
        kl_rule_base: mean KL(rule ‖ unsteered model), both in torch: how far the model moved.
        kl_rule_base_file: mean KL(rule ‖ base file in llama.cpp): what a file that does nothing would score.
        kl_runtime_floor: mean KL(unsteered model in torch ‖ base file in llama.cpp): noise that is not ours.
        top1: share of positions where rule and file agree on the likeliest token.
        max_logit_diff: largest absolute difference of a logit between rule and file.
        positions: number of positions compared.
    """

    kl_rule_artifact: float
    kl_rule_base: float
    kl_rule_base_file: float
    kl_runtime_floor: float
    top1: float
    max_logit_diff: float
    positions: int

    def limit(self, base: GGUFFile, recipe: Recipe) -> float:
        """The largest acceptable ``kl_rule_artifact`` for a base file."""
        stems = (FFN_GATE, FFN_UP, FFN_DOWN)
        layers = base.require_int(f"{base.architecture}.block_count")
        weights = [base.require_tensor(f"{stem.format(layer)}.weight") for stem in stems for layer in range(layers)]
        settings = recipe.verify
        exact = all(is_float(tensor.type_id) for tensor in weights)
        limit = settings.kl_limit_float if exact else settings.kl_limit_quantised
        return max(limit, settings.kl_limit_floor_ratio * self.kl_runtime_floor)

    def fault(self, base: GGUFFile, recipe: Recipe) -> str | None:
        """Why the file must not be delivered, or None. A measure that is not a number is a fault, too."""
        limit = self.limit(base, recipe)
        if not self.kl_runtime_floor <= recipe.verify.kl_floor_cap:
            return (
                f"unsteered, {base.path.name} in llama.cpp is already KL {self.kl_runtime_floor:.2g} away from the "
                f"model in torch (at most {recipe.verify.kl_floor_cap:g} is believable): it is not the same model"
            )
        if not self.kl_rule_artifact <= limit:
            return (
                f"it does not do what the rule says: KL {self.kl_rule_artifact:.2g} is over the limit {limit:.2g} "
                f"(runtime noise {self.kl_runtime_floor:.2g})"
            )
        if not self.kl_rule_artifact <= 0.5 * self.kl_rule_base_file:
            return (
                f"nothing proves that it does anything: it is KL {self.kl_rule_artifact:.2g} away from the rule, the "
                f"unsteered file {self.kl_rule_base_file:.2g}; raise gamma or select more neurons"
            )
        return None


def measure(
    runtime: TransformersRuntime,
    rule: SteeringRule,
    artifact: Path,
    base: Path,
    prompts: Sequence[tuple[int, ...]],
    recipe: Recipe,
    progress: Progress,
) -> Fidelity:
    """Compare rule, base and file on held-out prompts and the steered answers to them.

    Args:
        runtime: the unsteered model in float32.
        rule: what the file should do.
        artifact: the steered GGUF.
        base: the unsteered GGUF.
        prompts: token ids.
        recipe: its ``verify`` section.
        progress: told of each sequence.
    """
    progress.start("verify", 4 * len(prompts))
    with steered(runtime.activations, rule):
        exchanges = runtime.generate(
            prompts,
            max_new_tokens=recipe.verify.answer_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
    sequences = [exchange.tokens for exchange in exchanges]
    context = max(map(len, sequences)) + 1
    sums: dict[str, float] = dict.fromkeys(("rule_artifact", "rule_base", "rule_base_file", "floor", "agree"), 0.0)
    worst = 0.0
    with ExitStack() as stack:
        steered_file = stack.enter_context(LlamaCppRuntime(artifact, context=context))
        base_file = stack.enter_context(LlamaCppRuntime(base, context=context))
        for tokens in sequences:
            with steered(runtime.activations, rule):
                want = runtime.logits(tokens)
            plain = runtime.logits(tokens)
            got = steered_file.logits(tokens)
            floor = base_file.logits(tokens)
            sums["rule_artifact"] += kl_divergence(want, got).sum()
            sums["rule_base"] += kl_divergence(want, plain).sum()
            sums["rule_base_file"] += kl_divergence(want, floor).sum()
            sums["floor"] += kl_divergence(plain, floor).sum()
            sums["agree"] += float((want.argmax(-1) == got.argmax(-1)).sum())
            worst = max(worst, float(np.abs(want - got).max()))
            progress.advance(4, 4 * len(tokens))
    count = sum(map(len, sequences))
    kl = {name: float(sums[name]) / count for name in ("rule_artifact", "rule_base", "rule_base_file", "floor")}
    return Fidelity(
        kl_rule_artifact=kl["rule_artifact"],
        kl_rule_base=kl["rule_base"],
        kl_rule_base_file=kl["rule_base_file"],
        kl_runtime_floor=kl["floor"],
        top1=sums["agree"] / count,
        max_logit_diff=worst,
        positions=count,
    )


def kl_divergence(p: Logits, q: Logits) -> npt.NDArray[np.float64]:
    """KL(softmax(p) ‖ softmax(q)) of each row, in nats, computed in float64: ``[rows]``."""
    parts = [
        (np.exp(left) * (left - right)).sum(-1) for left, right in zip(_log_softmax(p), _log_softmax(q), strict=True)
    ]
    return np.concatenate(parts)


def _log_softmax(logits: Logits) -> Iterator[npt.NDArray[np.float64]]:
    for start in range(0, len(logits), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        yield rows - np.log(np.exp(rows).sum(-1, keepdims=True))
