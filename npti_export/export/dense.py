"""Widen the tensors of a gated MLP in torch: for checkpoints, and for models in memory."""

from __future__ import annotations

import torch

from npti_export.compiler.program import OFF_BIAS, LayerProgram


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
    bias = torch.zeros(width + layer.units, dtype=torch.float32)
    bias[torch.from_numpy(layer.off)] = float(OFF_BIAS)
    bias[width:] = torch.from_numpy(layer.gate_bias)
    return bias.to(dtype)


def widened(name: str, tensor: torch.Tensor, layer: LayerProgram) -> torch.Tensor:
    """One MLP weight, told by the end of its name: ``{gate,up,down}_proj.weight``."""
    source = torch.from_numpy(layer.source)
    if name.endswith("gate_proj.weight"):
        return wide_rows(tensor, source, torch.from_numpy(layer.gate_scale))
    if name.endswith("up_proj.weight"):
        return wide_rows(tensor, source, torch.from_numpy(layer.up_scale))
    if name.endswith("down_proj.weight"):
        return wide_columns(tensor, source)
    raise ValueError(name)
