"""Biases of a steered GGUF: which it has, what is in them, and what of the base's own must be kept to get it back."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from npti_export.architectures import FFN_DOWN, FFN_GATE
from npti_export.compiler.program import OFF_BIAS, Floats, LayerProgram, MLPProgram
from npti_export.errors import GGUFError, ModelError
from npti_export.export import layout, widen
from npti_export.gguf.blocks import decode
from npti_export.gguf.reader import GGUFFile, TensorInfo
from npti_export.gguf.weights import read_rows, read_vector
from npti_export.gguf.writer import NewTensor, Value

_F32 = 0
_FOLDED = 1 << 20  # weights: 8 MB in float64


def check_sizes(base: GGUFFile, layer: LayerProgram, number: int, width: int) -> None:
    """Raise unless a layer of ``width`` neurons has everything that its program speaks of.

    Raises:
        ModelError: it is for another model.
    """
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    constant = np.zeros(0, np.int64) if layer.constant is None else np.flatnonzero(layer.constant)
    named = [*layer.source.tolist(), *layer.off.tolist(), *layer.biased.tolist(), *constant[-1:].tolist()]
    if max(named, default=-1) >= width:
        raise ModelError(
            f"{base.path}: layer {number} has {width} neurons, and the rule steers one beyond; it is for another model"
        )
    sizes = [] if layer.dense is None else [layer.dense.up.shape[1]]
    sizes += [] if layer.down_bias is None else [len(layer.down_bias)]
    others = [size for size in sizes if size != hidden]
    if others:
        raise ModelError(
            f"{base.path}: has {hidden} hidden values, and the rule for layer {number} has {others[0]}; "
            "it is for another model"
        )
    if not width and (layer.units or layer.changes_output):
        raise ModelError(f"{base.path}: layer {number} has no MLP, and the rule steers it; it is for another model")


def new_biases(base: GGUFFile, program: MLPProgram, widths: list[int]) -> dict[str, list[NewTensor]]:
    """Biases that the base lacks, by the name of the weight in whose file they go; ``widths`` are the steered file's.

    llama.cpp adds each of the three biases of an MLP where it is there, whether or not the others are (``build_ffn``,
    src/llama-graph.cpp), so an up bias of zeros is never needed.
    """
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    result: dict[str, list[NewTensor]] = {}
    for number, layer in enumerate(program.layers):
        wanted = [(FFN_GATE, widths[number])] if layer.changes_gates else []
        wanted += [(FFN_DOWN, hidden)] if layer.changes_output else []
        for stem, size in wanted:
            name = stem.format(number)
            if f"{name}.bias" not in base.by_name:
                bias = NewTensor(f"{name}.bias", (size,), _F32, 4 * size)
                result.setdefault(f"{name}.weight", []).append(bias)
    return result


def down_bias(base: GGUFFile, layer: LayerProgram, number: int) -> Floats:
    """The down bias of a steered layer, ``[hidden]`` float32: the base's own, the program's and its folded constant.

    Raises:
        GGUFError: a weight is not finite.
    """
    weight = base.require_tensor(FFN_DOWN.format(number) + ".weight")
    total = np.zeros(weight.rows) if layer.down_bias is None else layer.down_bias.astype(np.float64)
    old = base.by_name.get(FFN_DOWN.format(number) + ".bias")
    if old is not None:
        total += read_vector(base, old)
    if layer.constant is not None:
        total += _folded(base, weight, layer.constant.astype(np.float64))
    if not np.isfinite(total).all():
        raise GGUFError(f"{base.path}: {weight.name}: a weight is not finite; the file is damaged, take another copy")
    return total.astype(np.float32)


def _folded(base: GGUFFile, weight: TensorInfo, constant: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``W · constant`` ``[rows]``, summed in float64 over the dequantised weights, :data:`_FOLDED` of them at once."""
    step, width = max(1, _FOLDED // weight.row_length), weight.row_length
    result = np.empty(weight.rows)
    for start in range(0, weight.rows, step):
        end = min(start + step, weight.rows)
        result[start:end] = decode(read_rows(base, weight, start, end), weight.type_id) @ constant[:width]
    return result


def kept(part: GGUFFile, program: MLPProgram, stream: BinaryIO) -> dict[str, Value]:
    """The base's own biases, of a file or shard, that cannot be worked out from the steered ones.

    Those that something was added to are kept whole. Of other gate biases only those are kept, in a row, where the
    steered file has :data:`OFF_BIAS`.
    """
    result: dict[str, Value] = {}
    off = []
    for tensor in part.tensors:
        number, kind = layout.mlp_tensor(tensor.name) or (layout.down_bias_layer(tensor.name), "down.bias")
        if number is None or kind not in ("gate.bias", "down.bias"):
            continue
        layer, gate = program.layers[number], kind == "gate.bias"
        old = widen.read_floats(stream, tensor) if gate or layer.changes_output else np.zeros(0, np.float32)
        if layer.bias.any() if gate else layer.changes_output:
            result[layout.kept_key(tensor.name)] = old.tobytes()
        elif gate:
            gone = old == OFF_BIAS
            gone[layer.off] = True
            off.append(old[gone])
    switched_off = np.concatenate(off).tobytes() if off else b""
    if switched_off:
        result[layout.OFF_GATES] = switched_off
    return result
