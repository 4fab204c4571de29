"""LoRA files in llama.cpp's format that change nothing but down projections.

Keys and names after ``llama_adapter_lora_init_impl`` (src/llama-adapter.cpp): ``general.type`` is ``adapter``,
``adapter.type`` ``lora``, ``general.architecture`` that of the model; ``W.lora_a`` is ``[rank, n_ff]``, ``W.lora_b``
``[n_embd, rank]``. Without ``adapter.lora.alpha`` a request's scale is taken as it is (src/llama-adapter.h,
``get_scale``); with one it would be divided by each tensor's own rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npti_export.architectures import FFN_DOWN
from npti_export.compiler.dial import Signs
from npti_export.gguf.blocks import Bytes, Floats, block_shape, is_float, quantise, type_id_of
from npti_export.gguf.reader import DEFAULT_ALIGNMENT, align
from npti_export.gguf.writer import NewTensor, Value, encode_header, encode_value, lay_out

_VERSION = 3


@dataclass(frozen=True)
class LoraTypes:
    """ggml types of a LoRA's two matrices, by name."""

    a: str
    b: str


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, laid out; :meth:`create` it, then :meth:`write` each layer that it has ``types`` for."""

    path: Path
    header: bytes
    tensors: Mapping[str, NewTensor]
    types: Mapping[int, LoraTypes]

    @property
    def nbytes(self) -> int:
        """Its size."""
        end = max(one.offset + one.nbytes for one in self.tensors.values())
        return len(self.header) + align(end, DEFAULT_ALIGNMENT)

    def create(self) -> None:
        """Write the header, and zeros for the rest."""
        with self.path.open("wb") as stream:
            stream.write(self.header)
            stream.truncate(self.nbytes)

    def write(self, layer: int, signs: Signs, columns: Floats) -> None:
        """Fill in a layer.

        Args:
            layer: one that has ranks.
            signs: ``[rank, n_ff]``, -1, 0 or 1.
            columns: ``[n_embd, rank]`` float32.

        Raises:
            ArithmeticError: a column is not finite, or too large for its type.
        """
        types = self.types[layer]
        encoded = {"lora_a": encode_signs(signs, types.a), "lora_b": _encode_columns(columns, types.b)}
        with self.path.open("rb+") as stream:
            for name, data in encoded.items():
                tensor = self.tensors[_name(layer, name)]
                if data.nbytes != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {data.nbytes} bytes do not fit in {tensor.nbytes}")
                stream.seek(len(self.header) + tensor.offset)
                stream.write(data.data)


def plan_lora(
    path: Path,
    architecture: str,
    ranks: Mapping[int, int],
    widths: Mapping[int, int],
    hidden: int,
    types: Mapping[int, LoraTypes],
    metadata: Mapping[str, Value],
) -> LoraFile:
    """Lay out a LoRA file.

    Args:
        path: the file.
        architecture: ``general.architecture`` of the model that it is for.
        ranks: by layer; layers without a rank are left out, as llama.cpp takes no empty tensor.
        widths: n_ff of these layers.
        hidden: n_embd.
        types: of its matrices, by layer.
        metadata: added under ``npti.``.
    """
    keys = [
        ("general.architecture", encode_value(architecture)),
        ("general.type", encode_value("adapter")),
        ("adapter.type", encode_value("lora")),
        *((f"npti.{key}", encode_value(value)) for key, value in metadata.items()),
    ]
    tensors = []
    for layer, rank in ranks.items():
        tensors.append(_tensor(_name(layer, "lora_a"), (widths[layer], rank), types[layer].a))
        tensors.append(_tensor(_name(layer, "lora_b"), (rank, hidden), types[layer].b))
    placed = lay_out(tensors, DEFAULT_ALIGNMENT)
    header = encode_header(_VERSION, keys, placed, DEFAULT_ALIGNMENT)
    return LoraFile(path, header, {one.name: one for one in placed}, types)


def encode_signs(signs: Signs, kind: str) -> Bytes:
    """Signs ``[R, C]`` as ``[R, row bytes]`` uint8 of a type that holds them exactly: a float type or Q4_0.

    A block of Q4_0 is an f16 scale and 32 nibbles standing for -8 to 7, those of its first half in the lower halves of
    the bytes (ggml-common.h, ``block_q4_0``). ggml itself would take a scale that cannot hold both 1 and -1.
    """
    if is_float(type_id_of(kind)):
        return quantise(signs.astype(np.float32), type_id_of(kind))
    if kind != "Q4_0":
        raise ValueError(f"{kind} is not written here")
    halves = (signs + np.int8(8)).astype(np.uint8).reshape(len(signs), -1, 2, 16)
    blocks = np.empty((*halves.shape[:2], 18), np.uint8)
    blocks[..., :2] = np.array([1.0], "<f2").view(np.uint8)
    blocks[..., 2:] = halves[:, :, 0] | halves[:, :, 1] << 4
    return blocks.reshape(len(signs), -1)


def _encode_columns(columns: Floats, kind: str) -> Bytes:
    if not np.isfinite(columns).all():
        raise ArithmeticError("a column is not finite")
    with np.errstate(over="ignore"):  # said below
        encoded = quantise(columns, type_id_of(kind))
    if kind == "F16" and not np.isfinite(encoded.view(np.float16)).all():
        raise ArithmeticError("a column is too large for F16")
    return encoded


def _tensor(name: str, shape: tuple[int, int], kind: str) -> NewTensor:
    type_id = type_id_of(kind)
    block, nbytes = block_shape(type_id, name)
    return NewTensor(name, shape, type_id, shape[0] // block * nbytes * shape[1])


def _name(layer: int, matrix: str) -> str:
    return f"{FFN_DOWN.format(layer)}.weight.{matrix}"
