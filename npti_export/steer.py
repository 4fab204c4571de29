"""Apply a rule to a model in transformers, around the activation module, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

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
    import torch

    with ExitStack() as stack:
        for module, shift, clamp in zip(activations, rule.shift, rule.clamp, strict=True):
            if not (shift.any() or clamp.any()):
                continue
            # min(a, limit): 0 for clamped neurons, no limit for the others
            limit = torch.from_numpy(np.where(clamp, np.float32(0), np.float32(np.inf)))
            add = torch.from_numpy(shift)

            def hook(
                _module: Any,
                _inputs: Any,
                output: torch.Tensor,
                limit: torch.Tensor = limit,
                add: torch.Tensor = add,
            ) -> torch.Tensor:
                limit, add = limit.to(output.device), add.to(output.device)
                return (torch.minimum(output.float(), limit) + add).to(output.dtype)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
