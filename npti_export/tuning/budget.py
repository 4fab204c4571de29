"""How much damage is allowed, and which trial that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npti_export.errors import EvaluationError


@dataclass(frozen=True)
class Budget:
    """What steering may cost.

    Attributes:
        max_kl: KL(unsteered ‖ steered) on neutral text, in nats a token.
        max_fluency_loss: of the answers' log-likelihood per token, as a share of the size of the unsteered ones'.

    Raises:
        EvaluationError: a limit that is negative, or none at all.
    """

    max_kl: float = 0.1
    max_fluency_loss: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("--max-kl", self.max_kl), ("--max-fluency-loss", self.max_fluency_loss)):
            if not 0 <= value < float("inf"):
                raise EvaluationError(f"{name} {value}: give a number that is not negative")

    def __str__(self) -> str:
        return f"the budget of KL {self.max_kl:g} and {self.max_fluency_loss:.0%} of fluency"

    def excess(self, damage: float, fluency: float, unsteered: float) -> tuple[float, float]:
        """How far each limit is exceeded; within it where not positive.

        Args:
            damage: KL on neutral text.
            fluency: log-likelihood per token.
            unsteered: that of the unsteered answers.
        """
        return damage - self.max_kl, (unsteered - self.max_fluency_loss * abs(unsteered)) - fluency

    def holds(self, damage: float, fluency: float, unsteered: float) -> bool:
        """Whether both limits are kept."""
        return max(self.excess(damage, fluency, unsteered)) <= 0


def pareto_front(gains: Sequence[float], damages: Sequence[float]) -> list[bool]:
    """For each trial whether no other gains as much at no more damage, and is better in one of the two."""
    return [
        not any(
            other >= gain and cost <= damage and (other > gain or cost < damage)
            for other, cost in zip(gains, damages, strict=True)
        )
        for gain, damage in zip(gains, damages, strict=True)
    ]


def largest_gain(gains: Sequence[float], damages: Sequence[float], within: Sequence[bool]) -> int | None:
    """The trial within the budget that gains most, then does least damage, then came first; None without any."""
    allowed = [index for index, kept in enumerate(within) if kept]
    return min(allowed, key=lambda index: (-gains[index], damages[index], index), default=None)
