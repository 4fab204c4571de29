"""Apply a rule to a model in transformers, around the activation module, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npti_export.rule import SteeringRule

if TYPE_CHECKING:
    import torch


@contextmanager
def steered(activations: Sequence[torch.nn.Module], rule: SteeringRule) -> Iterator[None]:
    """Within the block, each activation module returns ``where(clamp, min(a, 0), a) + shift``.

    Args:
        activations: one module a layer, whose output is the gate activation ``[…, width]``.
        rule: of the same sizes.

    The shift is added in float32 and the result rounded once to the activation's dtype.
    """
    with ExitStack() as stack:
        for module, shift, clamp in zip(activations, rule.shift, rule.clamp, strict=True):
            if not (shift.any() or clamp.any()):
                continue
            stack.callback(module.register_forward_hook(_Rule(shift, clamp)).remove)
        yield


class _Rule:
    """A forward hook with one layer's vectors, kept on the device where it is used."""

    def __init__(self, shift: npt.NDArray[np.float32], clamp: npt.NDArray[np.bool_]) -> None:
        import torch

        # min(a, limit): 0 for clamped neurons, no limit for the others
        self.limit = torch.from_numpy(np.where(clamp, np.float32(0), np.float32(np.inf)))
        self.shift = torch.from_numpy(shift)

    def __call__(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self.limit.device != output.device:
            self.limit, self.shift = self.limit.to(output.device), self.shift.to(output.device)
        return (output.float().minimum(self.limit) + self.shift).to(output.dtype)
