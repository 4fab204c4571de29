"""The MLPs of a GGUF in plain float32 numpy, dequantised a piece at a time: what a file should compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from npti_export.activations import activate
from npti_export.architectures import FFN_DOWN, FFN_GATE, FFN_UP, GGUFFamily
from npti_export.compiler.neurons import LayerSample, Neurons, program_change
from npti_export.compiler.program import MLPProgram
from npti_export.gguf.blocks import decode
from npti_export.gguf.reader import GGUFFile, TensorInfo, mlp_widths
from npti_export.gguf.weights import read_rows, read_vector
from npti_export.rule import SteeringRule

Floats = npt.NDArray[np.float32]
_NEURONS = 4096  # computed at once; a multiple of every block, so that down columns can be cut there
_KEPT_BYTES = 512 << 20  # models whose MLPs are smaller in float32 are dequantised once


LayerMLP = Callable[[int, Floats], Floats]
"""An MLP of a model: the output ``[rows, hidden]`` of a layer for its input."""


class FileMLP:
    """``y = W_down · (a ⊙ (W_up x))`` of every layer, ``a`` steered by a rule or not.

    Memory is that of a few thousand neurons and of one encoded tensor, whatever the model's size.

    Args:
        header: of the unsteered file.
        family: its row in the table.
    """

    def __init__(self, header: GGUFFile, family: GGUFFamily) -> None:
        self._header, self._family = header, family
        weights = 3 * sum(mlp_widths(header)) * header.require_int(f"{header.architecture}.embedding_length")
        self._keeps = 4 * weights <= _KEPT_BYTES
        self._kept: dict[int, list[tuple[slice, Floats, Floats, Floats]]] = {}

    def __call__(self, layer: int, x: Floats, rule: SteeringRule | None = None) -> Floats:
        """The MLP's output ``[rows, hidden]`` for its input ``x`` ``[rows, hidden]``, its biases included.

        The rule is what the paper says, written out: ``a = where(clamp, min(a, 0), a) + shift``; then ``a ⊙ up`` gets
        its constant.
        """
        result = np.zeros_like(x)
        for neurons, gate_rows, up_rows, down_columns in self._pieces(layer):
            gate, up = x @ gate_rows.T, x @ up_rows.T
            for values, stem in ((gate, FFN_GATE), (up, FFN_UP)):
                bias = self._bias(stem.format(layer))
                if bias is not None:
                    values += bias[neurons]
            a = activate(gate, self._family.activation)
            if rule is not None:
                a = np.where(rule.clamp[layer, neurons], np.minimum(a, 0), a) + rule.shift[layer, neurons]
            inner = a * up
            if rule is not None and rule.constant is not None:
                inner += rule.constant[layer, neurons]
            result += inner @ down_columns.T
        bias = self._bias(FFN_DOWN.format(layer))
        return result if bias is None else result + bias

    def neurons(self, layer: int, index: npt.NDArray[np.int64]) -> Neurons:
        """The weights of some neurons, ``index`` sorted."""
        gates, ups, downs = [], [], []
        for neurons, gate_rows, up_rows, down_columns in self._pieces(layer):
            some = index[(index >= neurons.start) & (index < neurons.stop)] - neurons.start
            gates.append(gate_rows[some])
            ups.append(up_rows[some])
            downs.append(down_columns[:, some])
        biases = (self._bias(stem.format(layer)) for stem in (FFN_GATE, FFN_UP))
        gate_bias, up_bias = (np.zeros(len(index), np.float32) if one is None else one[index] for one in biases)
        return Neurons(index, np.concatenate(gates), np.concatenate(ups), np.hstack(downs), gate_bias, up_bias)

    def _pieces(self, layer: int) -> Iterator[tuple[slice, Floats, Floats, Floats]]:
        if layer in self._kept:
            yield from self._kept[layer]
            return
        pieces = self._read(layer)
        if self._keeps:
            self._kept[layer] = list(pieces)
            pieces = iter(self._kept[layer])
        yield from pieces

    def _read(self, layer: int) -> Iterator[tuple[slice, Floats, Floats, Floats]]:
        """Some neurons at a time: which, their gate and up rows ``[n, hidden]``, their down columns ``[hidden, n]``."""
        down = self._down(layer)
        up = self._header.require_tensor(FFN_UP.format(layer) + ".weight")
        fused = self._family.fused  # then the gate's rows come first in the up projection
        gate = up if fused else self._header.require_tensor(FFN_GATE.format(layer) + ".weight")
        width = down.row_length
        columns = read_rows(self._header, down, 0, down.rows)
        for start in range(0, width, _NEURONS):
            end = min(start + _NEURONS, width)
            shift = width if fused else 0
            cut = slice(start * down.row_bytes // width, end * down.row_bytes // width)
            yield (
                slice(start, end),
                decode(read_rows(self._header, gate, start, end), gate.type_id),
                decode(read_rows(self._header, up, shift + start, shift + end), up.type_id),
                decode(columns[:, cut], down.type_id),
            )

    def _down(self, layer: int) -> TensorInfo:
        return self._header.require_tensor(FFN_DOWN.format(layer) + ".weight")

    def _bias(self, stem: str) -> Floats | None:
        tensor = self._header.by_name.get(stem + ".bias")
        return None if tensor is None else read_vector(self._header, tensor)


class ProgramMLP:
    """The MLPs of a file with a program in them, in plain float32: what the steered file should compute."""

    def __init__(self, mlp: FileMLP, program: MLPProgram) -> None:
        self._mlp, self._program = mlp, program
        self._neurons: dict[int, Neurons] = {}

    def __call__(self, layer: int, x: Floats) -> Floats:
        """``[rows, hidden]`` for an input ``[rows, hidden]``."""
        program = self._program.layers[layer]
        if layer not in self._neurons:
            self._neurons[layer] = self._mlp.neurons(layer, program.touched)
        return self._mlp(layer, x) + program_change(program, LayerSample(x, self._neurons[layer]))
