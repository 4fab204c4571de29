"""Constants at the input of a down projection, for whoever stands around the activation module of the same MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from npti_export.positions import ResponsePositions
    from npti_export.steer import Share

DOWN = "down_proj"  # in the MLP of every family of the table


class HasShares(Protocol):
    """A wrapper around an activation module."""

    positions: ResponsePositions | None

    def active_shares(self) -> Sequence[Share]:
        """The parts that steer now; none where they are switched off."""


class DownInput:
    """A forward pre-hook of ``mlp.down_proj`` that adds the constants of a wrapper's shares, in float32, rounded once.

    An object, not a closure, so that a deep copy of the model holds the copies of wrapper and MLP.

    Args:
        mlp: whose down projection it is.
        wrapper: around the activation module in it.
    """

    def __init__(self, mlp: torch.nn.Module, wrapper: HasShares) -> None:
        self._mlp, self._wrapper = mlp, wrapper
        self._held: torch.nn.Module | None = None
        self.place()

    def place(self) -> None:
        """Be where the projection is called: another tuner may have wrapped it meanwhile."""
        found = self._mlp._modules[DOWN]
        if found is self._held:
            return
        self.remove()
        assert found is not None
        self._handle, self._held = found.register_forward_pre_hook(self), found

    def remove(self) -> None:
        """The projection is as before."""
        if self._held is not None:
            self._handle.remove()
            self._held = None

    def __call__(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The inputs with the constants added; None leaves them alone."""
        shares = self._wrapper.active_shares()
        steered = add_constants(inputs[0], shares, self._wrapper.positions)
        return None if steered is inputs[0] else (steered, *inputs[1:])


def add_constants(x: torch.Tensor, shares: Sequence[Share], positions: ResponsePositions | None) -> torch.Tensor:
    """``x`` ``[…, width]`` and the constants of the shares, each times its strength; ``x`` itself where there is none.

    Args:
        x: ``[…, width]``, or ``[batch, length, width]`` where positions matter.
        shares: those that are active, or also some of strength 0.
        positions: which positions hold response tokens; needed where a share is for these only.
    """
    active = [share for share in shares if share.constant is not None and share.strength]
    everywhere = [share for share in active if share.where == "all"]
    if len(everywhere) < len(active):
        response = False if positions is None else positions.of(x)
        if isinstance(response, torch.Tensor):
            return torch.where(response[..., None], _plus(x, active), _plus(x, everywhere))
        return _plus(x, active if response else everywhere)
    return _plus(x, active)


def _plus(x: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    if not shares:
        return x
    total = x.float()
    for share in shares:
        if share.constant is not None:
            total = total + share.constant.to(x.device) * share.strength
    return total.to(x.dtype)
