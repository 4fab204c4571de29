"""The constant part of a rule: what it adds to the residual stream on average, whatever the token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.gguf.experts import through_down
from npti_export.gguf.mlp import FileMLP
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.residual import residual_scale
from npti_export.gguf.shards import read_model
from npti_export.gguf.weights import read_vector
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.experts import ExpertPass
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

Floats = npt.NDArray[np.float32]
_EPSILON = 1e-6  # where a file does not say


def mean_effect(runtime: LlamaCppRuntime, rule: SteeringRule, exchanges: Sequence[Exchange]) -> Floats:
    """Mean change of each layer's contribution to the residual stream over response tokens, ``[layers, hidden]``.

    The model runs steered (the MLPs computed in numpy by the rule, or experts steered where they compute), and each
    layer is asked what it would have contributed without the rule on the same input.

    Args:
        runtime: the unsteered file, opened with its source.
        rule: what is averaged.
        exchanges: prompts and answers of the unsteered model.

    Raises:
        ModelError: no response token.
    """
    source = runtime.source
    assert source is not None
    assert source.family is not None
    header = read_model(source.path)
    count = sum(len(exchange.response) for exchange in exchanges)
    if not count:
        raise ModelError(f"{source.name}: answered every question with nothing; there is nothing to average over")
    if source.family.mixture:
        return (_effect_of_experts(runtime, header, rule, exchanges) / count).astype(np.float32)
    mlp, norms = FileMLP(header, source.family), [_post_norm(header, layer) for layer in range(source.shape.layers)]
    sums = np.zeros((source.shape.layers, source.shape.hidden))
    for exchange in exchanges:
        counted = np.arange(len(exchange.tokens)) >= len(exchange.prompt)
        seen = dict.fromkeys(range(source.shape.layers), 0)

        def see(
            layer: int, x: Floats, y: Floats, counted: npt.NDArray[np.bool_] = counted, seen: dict[int, int] = seen
        ) -> bool:
            rows = counted[seen[layer] : seen[layer] + len(x)]
            seen[layer] += len(x)
            y[:] = mlp(layer, x, rule)
            if rows.any():
                change = _contribution(header, norms[layer], y[rows])
                change -= _contribution(header, norms[layer], mlp(layer, x[rows]))
                sums[layer] += change.sum(0)
            return True

        runtime.run([exchange.tokens], see)
    return (sums / count).astype(np.float32)


def _effect_of_experts(
    runtime: LlamaCppRuntime, header: GGUFFile, rule: SteeringRule, exchanges: Sequence[Exchange]
) -> npt.NDArray[np.float64]:
    """The sum over response tokens, ``[layers, hidden]``: down projections are linear, so each is applied once."""
    source = runtime.source
    assert source is not None
    shape = source.shape
    sums = np.zeros((shape.layers, shape.experts, shape.width // shape.experts))
    for exchange in exchanges:
        counted = np.arange(len(exchange.tokens)) >= len(exchange.prompt)
        seen = [0] * shape.layers

        def see(
            layer: int, parts: ExpertPass, counted: npt.NDArray[np.bool_] = counted, seen: list[int] = seen
        ) -> bool:
            change = parts.change(rule, layer, source.activation)
            rows = counted[seen[layer] : seen[layer] + len(change)]
            seen[layer] += len(change)
            np.add.at(sums[layer], parts.experts[rows], parts.weights[rows][..., None] * change[rows])
            parts.product[:] += change
            return True

        runtime.run_experts([exchange.tokens], see)
    scale = np.float32(header.get(f"{header.architecture}.residual_scale", 1.0))
    return np.stack([scale * through_down(header, layer, one.astype(np.float32)) for layer, one in enumerate(sums)])


def as_directions(effect: Floats) -> Floats:
    """``[layers - 1, hidden]`` of a control vector, which has none for the first layer: the second one's takes both."""
    directions = effect[1:].copy()
    directions[0] += effect[0]
    return directions


def _post_norm(header: GGUFFile, layer: int) -> Floats | None:
    """Weight of the norm of an MLP's output, in families that have one."""
    tensor = header.by_name.get(f"blk.{layer}.post_ffw_norm.weight")
    return None if tensor is None else read_vector(header, tensor)


def _contribution(header: GGUFFile, norm: Floats | None, y: Floats) -> Floats:
    """What an MLP's output ``[rows, hidden]`` adds to the residual stream, after the family's norm or scale."""
    architecture = header.architecture
    if norm is not None:
        epsilon = float(header.get(f"{architecture}.attention.layer_norm_rms_epsilon", _EPSILON))
        y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + epsilon) * norm
    return y * np.float32(residual_scale(header))
