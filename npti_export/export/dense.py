"""Widen the tensors of a gated MLP in torch: for checkpoints, and for models in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from npti_export.compiler.program import LayerProgram
from npti_export.export import widen

_ROWS = 256  # of a down projection that are float64 at once


def wide_rows(weight: torch.Tensor, source: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A gate or up projection ``[width, hidden]`` with row ``source[u]`` times ``factors[u]`` appended for each unit.

    The factors of a compiled program are powers of two for gates; where they are not (an up row), the product is
    computed in float32 and rounded once.
    """
    added = weight[source.to(weight.device)].float() * factors.to(weight.device)[:, None]
    return torch.cat([weight, added.to(weight.dtype)])


def wide_columns(weight: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A down projection ``[hidden, width]`` with its columns ``source`` appended."""
    return torch.cat([weight, weight[:, source.to(weight.device)]], dim=1)


def gate_bias(width: int, layer: LayerProgram, dtype: torch.dtype) -> torch.Tensor:
    """The gate bias ``[width + units]`` of a widened layer."""
    return torch.from_numpy(widen.gate_bias(width, layer)).to(dtype)


def down_bias(hidden: int, layer: LayerProgram, dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The down bias ``[hidden]`` of a widened layer; ``read`` gives the down projection, ``[hidden, width]``."""
    total = torch.zeros(hidden, dtype=torch.float64)
    if layer.down_bias is not None:
        total += torch.from_numpy(layer.down_bias)
    if layer.constant is not None:
        constant, weight = torch.from_numpy(layer.constant).double(), read()
        starts = range(0, hidden, _ROWS)
        total += torch.cat([weight[start : start + _ROWS].cpu().double() @ constant for start in starts])
    return total.to(dtype)


def widened(name: str, tensor: torch.Tensor, layer: LayerProgram) -> torch.Tensor:
    """One MLP weight, told by the end of its name: ``{gate,up,down}_proj.weight``."""
    source = torch.from_numpy(layer.source)
    own = layer.dense
    up = np.zeros((0, tensor.shape[1]), np.float32) if own is None else own.up
    if name.endswith("gate_proj.weight"):
        return _joined(wide_rows(tensor, source, torch.from_numpy(layer.gate_scale)), np.zeros_like(up), 0)
    if name.endswith("up_proj.weight"):
        return _joined(wide_rows(tensor, source, torch.from_numpy(layer.up_scale)), up, 0)
    if name.endswith("down_proj.weight"):
        return _joined(wide_columns(tensor, source), np.zeros((len(tensor), 0)) if own is None else own.down, 1)
    raise ValueError(name)


def _joined(weight: torch.Tensor, more: npt.NDArray[np.floating], axis: int) -> torch.Tensor:
    """Rows or columns of dense units behind those of a weight, rounded to its dtype."""
    return torch.cat([weight, torch.from_numpy(more).to(weight)], dim=axis) if more.size else weight
