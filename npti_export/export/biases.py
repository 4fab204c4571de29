"""Biases of a steered GGUF: which it has, what is in them, and what of the base's own must be kept to get it back."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from npti_export.architectures import FFN_DOWN, FFN_GATE
from npti_export.compiler.program import OFF_BIAS, Floats, LayerProgram, MLPProgram
from npti_export.errors import ModelError
from npti_export.export import layout, widen
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.writer import NewTensor, Value

_F32 = 0


def check_sizes(base: GGUFFile, layer: LayerProgram, number: int, width: int) -> None:
    """Raise unless a layer of ``width`` neurons has everything that its program speaks of.

    Raises:
        ModelError: it is for another model.
    """
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    named = [*layer.source.tolist(), *layer.off.tolist(), *layer.biased.tolist()]
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


def down_bias(source: BinaryIO, part: GGUFFile, layer: LayerProgram, name: str) -> Floats:
    """The down bias of a layer, ``[hidden]`` float32: the base's own and the program's."""
    assert layer.down_bias is not None
    old = part.by_name.get(name)
    return layer.down_bias if old is None else widen.read_floats(source, old) + layer.down_bias


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
