"""The wrapper that an attachment puts around an activation module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from npti_export.down_input import DownInput
from npti_export.positions import ResponsePositions
from npti_export.routing import ExpertRouting
from npti_export.steer import LayerSteering, Share


class AttachedActivation(nn.Module):
    """Stands in the MLP where ``base`` stood, with the shares of all attachments.

    A module, not a forward hook: compiled models notice that a module was replaced, but not that one got a hook.

    Args:
        base: the activation module.
        positions: follows the model's passes, once an attachment steers the response only.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.shares: dict[Any, Share] = {}  # by attachment
        self.positions: ResponsePositions | None = None
        self.npti_routing: ExpertRouting | None = None  # in a mixture of experts
        self.steering = LayerSteering()
        self.down: DownInput | None = None  # once an attachment has a constant

    def active_shares(self) -> list[Share]:
        """See :class:`npti_export.down_input.HasShares`."""
        return list(self.shares.values())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``x`` is the gate projection's output ``[…, width]``."""
        a: torch.Tensor = self.base(x, *args, **kwargs)
        if self.npti_routing is not None:
            if not self.steers:
                return a
            rows = self.npti_routing.rows_of(a)
            return self.steering.of_expert(a, list(self.shares.values()), rows, self.positions)
        if self.down is not None and not torch.compiler.is_compiling():
            self.down.place()
        return self.steering(a, list(self.shares.values()), self.positions)

    @property
    def steers(self) -> bool:
        """Whether an attachment is at work here."""
        return any(share.strength for share in self.shares.values())
