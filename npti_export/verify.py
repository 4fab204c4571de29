"""Does the written file do what the rule says? Measured in the runtime that will run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime

Logits = npt.NDArray[np.float32]
LogitsOf = Callable[[Sequence[int]], Logits]
Opener = Callable[[], AbstractContextManager[LogitsOf]]  # gives logits while it is open
_HALF = 0.5  # a layer must be nearer to the rule than to the unsteered layer
_ROWS = 64  # positions compared at once: bounds the float64 copies of a large vocabulary


@dataclass(frozen=True)
class Fidelity:
    """Distances between next-token distributions, over all positions of the held-out sequences.

    Attributes:
        kl_rule_artifact: mean KL(rule in float32 torch ‖ artifact in its own runtime), nats.
        kl_rule_base: mean KL(rule ‖ unsteered model), both in torch: how far the model moved.
        kl_rule_base_file: mean KL(rule ‖ unsteered model in that runtime): the score of an artifact that does nothing.
        kl_runtime_floor: mean KL(unsteered model in torch ‖ the same in that runtime): noise that is not ours.
        top1: share of positions where rule and artifact agree on the likeliest token.
        max_logit_diff: largest absolute difference of a logit between rule and artifact.
        positions: number of positions compared.
    """

    kl_rule_artifact: float
    kl_rule_base: float
    kl_rule_base_file: float
    kl_runtime_floor: float
    top1: float
    max_logit_diff: float
    positions: int

    def limit(self, recipe: Recipe, *, exact: bool | None, share: float = 1.0) -> float:
        """The largest acceptable ``kl_rule_artifact``.

        Args:
            recipe: its ``verify`` section.
            exact: whether the artifact's format rounds nothing that we add; None for one that only approximates the
                rule, and is acceptable if it is nearer to it than the unsteered file is.
            share: of the unsteered file's distance that such a one may be away.
        """
        if exact is None:
            return share * self.kl_rule_base_file
        settings = recipe.verify
        limit = settings.kl_limit_float if exact else settings.kl_limit_quantised
        return max(limit, settings.kl_limit_floor_ratio * self.kl_runtime_floor)

    def fault(self, recipe: Recipe, *, exact: bool | None, base: str, share: float = 1.0) -> str | None:
        """Why the artifact must not be delivered, or None. A measure that is not a number is a fault, too.

        Args:
            recipe: its ``verify`` section.
            exact: see :meth:`limit`.
            base: name of the unsteered file, for the message.
            share: see :meth:`limit`.
        """
        limit = self.limit(recipe, exact=exact, share=share)
        if not self.kl_runtime_floor <= recipe.verify.kl_floor_cap:
            return (
                f"unsteered, {base} in its runtime is already KL {self.kl_runtime_floor:.2g} away from the "
                f"model in torch (at most {recipe.verify.kl_floor_cap:g} is believable): it is not the same model"
            )
        if not self.kl_rule_artifact <= limit:
            return (
                f"it does not do what the rule says: KL {self.kl_rule_artifact:.2g} is over the limit {limit:.2g} "
                f"(runtime noise {self.kl_runtime_floor:.2g})"
            )
        if exact is not None and not self.kl_rule_artifact <= 0.5 * self.kl_rule_base_file:
            return (
                f"nothing proves that it does anything: it is KL {self.kl_rule_artifact:.2g} away from the rule, the "
                f"unsteered file {self.kl_rule_base_file:.2g}; raise gamma or select more neurons"
            )
        return None


@dataclass(frozen=True)
class LayerErrors:
    """Each layer of an artifact by itself, on the inputs that it had: ratios of Euclidean sizes, root mean squares over
    tokens.

    Attributes:
        error: of its MLP's output against what the rule says, by what the rule says.
        moved: what the rule changes, by what the rule says.
        floor: the same error of the unsteered file: the runtime's arithmetic.
    """

    error: tuple[float, ...]
    moved: tuple[float, ...]
    floor: tuple[float, ...]

    def fault(self) -> str | None:
        """Why the artifact must not be delivered, or None: a layer whose change is not the rule's."""
        for layer, (error, moved, floor) in enumerate(zip(self.error, self.moved, self.floor, strict=True)):
            if not error <= 2 * floor + _HALF * moved:
                return (
                    f"layer {layer} does not do what the rule says: its output is off by {error:.2g} of its size, "
                    f"where the rule changes {moved:.2g} and the runtime's own noise is {floor:.2g}"
                )
        return None


def measure(
    runtime: TransformersRuntime,
    rule: SteeringRule,
    artifact: Opener,
    base: Opener | None,
    prompts: Sequence[tuple[int, ...]],
    recipe: Recipe,
    progress: Progress,
) -> Fidelity:
    """Compare rule, base and artifact on held-out prompts and the steered answers to them.

    Args:
        runtime: the unsteered model in float32.
        rule: what the artifact should do.
        artifact: opens what was made of the rule.
        base: opens the unsteered model in the same runtime; None where that is torch itself.
        prompts: token ids.
        recipe: its ``verify`` section.
        progress: told of each sequence.
    """
    from npti_export.steer import steered

    progress.start("verify", 4 * len(prompts))
    with steered(runtime.activations, rule, runtime.down_projections):
        exchanges = runtime.generate(
            prompts,
            max_new_tokens=recipe.verify.answer_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
    sequences = [exchange.tokens for exchange in exchanges]
    tally = Tally()
    with ExitStack() as stack:
        steered_logits = stack.enter_context(artifact())
        base_logits = None if base is None else stack.enter_context(base())
        for tokens in sequences:
            with steered(runtime.activations, rule, runtime.down_projections):
                want = runtime.logits(tokens)
            plain = runtime.logits(tokens)
            got = steered_logits(tokens)
            floor = plain if base_logits is None else base_logits(tokens)
            tally.add(want, plain, got, floor)
            progress.advance(4, 4 * len(tokens))
    return tally.result()


@dataclass
class Tally:
    """Sums up distances over positions."""

    positions: int = 0
    worst: float = 0.0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("artifact", "base", "base_file", "floor", "agree"), 0.0)
    )

    def add(self, want: Logits, plain: Logits, got: Logits, floor: Logits) -> None:
        """Logits ``[positions, vocabulary]`` of rule, unsteered model, artifact, and unsteered model in its runtime."""
        for rule, base, artifact, file in zip(*map(_log_softmax, (want, plain, got, floor)), strict=True):
            likely = np.exp(rule)
            self.sums["artifact"] += float((likely * (rule - artifact)).sum())
            self.sums["base"] += float((likely * (rule - base)).sum())
            self.sums["base_file"] += float((likely * (rule - file)).sum())
            self.sums["floor"] += float((np.exp(base) * (base - file)).sum())
        self.sums["agree"] += float((want.argmax(-1) == got.argmax(-1)).sum())
        self.worst = max(self.worst, float(np.abs(want - got).max()))
        self.positions += len(want)

    def result(self) -> Fidelity:
        """Their means."""
        mean = {name: value / self.positions for name, value in self.sums.items()}
        return Fidelity(
            kl_rule_artifact=mean["artifact"],
            kl_rule_base=mean["base"],
            kl_rule_base_file=mean["base_file"],
            kl_runtime_floor=mean["floor"],
            top1=mean["agree"],
            max_logit_diff=self.worst,
            positions=self.positions,
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
