"""The experts of a mixture in a GGUF: sizes, and a sum over their down projections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.errors import ArchitectureError, GGUFError
from npti_export.gguf.blocks import decode
from npti_export.gguf.reader import GGUFFile, layer_count
from npti_export.gguf.weights import read_rows

Floats = npt.NDArray[np.float32]
_GATE, _UP, _DOWN = (f"blk.{{}}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
_OTHER_KINDS = ("ffn_gate", "ffn_up", "ffn_gate_shexp", "ffn_up_shexp")


@dataclass(frozen=True)
class Experts:
    """Every layer's MLP.

    Attributes:
        count: experts of a layer.
        rows: neurons of an expert.
        used: experts that a token is sent to.
    """

    count: int
    rows: int
    used: int

    @property
    def width(self) -> int:
        """Neurons of a layer, numbered one expert after the other."""
        return self.count * self.rows


def experts_of(header: GGUFFile) -> Experts:
    """The sizes of a mixture's experts, read from their tensors.

    Raises:
        ArchitectureError: layers of several kinds: dense ones, or experts that every token is sent to.
        GGUFError: shapes that do not fit each other.
    """
    count, used = (header.require_int(f"{header.architecture}.expert_{key}count") for key in ("", "used_"))
    hidden = header.require_int(f"{header.architecture}.embedding_length")
    rows = 0
    for layer in range(layer_count(header)):
        for other in _OTHER_KINDS:
            if f"blk.{layer}.{other}.weight" in header.by_name:
                raise ArchitectureError(
                    f"{header.path}: layer {layer} has an MLP that every token passes (blk.{layer}.{other}), not only "
                    "experts, which is not supported yet; take a model of one kind"
                )
        down = header.require_tensor(_DOWN.format(layer))
        rows = rows or down.shape[0]
        tensors = {_GATE: (hidden, rows, count), _UP: (hidden, rows, count), _DOWN: (rows, hidden, count)}
        for name, shape in tensors.items():
            tensor = header.require_tensor(name.format(layer))
            if tensor.shape != shape:
                raise GGUFError(f"{header.path}: {tensor.name} is {tensor.shape}, not {shape}; the file is damaged")
    if not 0 < used <= count:
        raise GGUFError(f"{header.path}: sends a token to {used} of {count} experts; the file is damaged")
    return Experts(count, rows, used)


def through_down(header: GGUFFile, layer: int, values: Floats) -> Floats:
    """What ``values`` ``[experts, rows]`` at the inputs of a layer's down projections add up to, ``[hidden]``."""
    tensor = header.require_tensor(_DOWN.format(layer))
    hidden = tensor.shape[1]
    result = np.zeros(hidden, np.float32)
    for expert in np.flatnonzero(values.any(1)).tolist():
        encoded = read_rows(header, tensor, expert * hidden, (expert + 1) * hidden)
        result += decode(encoded, tensor.type_id) @ values[expert]
    return result
