"""Bake a program into a GGUF."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npti_export.architectures import FFN_DOWN, FFN_GATE, FFN_UP, RAGGED, Layout, check_bakeable, gguf_family
from npti_export.compiler.layout import arrange, without_idle_blocks
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.errors import DiskFullError, GGUFError, ModelError
from npti_export.export import biases, widen
from npti_export.export import layout as places
from npti_export.export.layout import PREFIX
from npti_export.export.rehome import Home, home_of
from npti_export.export.rest import check_rest, gaps_of
from npti_export.export.strip import strip
from npti_export.gguf.blocks import block_shape, is_float, supports_widening, type_name
from npti_export.gguf.columns import granule, is_codebook, is_fine
from npti_export.gguf.cursor import MAX_HEADER
from npti_export.gguf.reader import GGUFFile, is_mixture, layer_count, mlp_widths
from npti_export.gguf.shards import shard_paths
from npti_export.gguf.writer import NewTensor, Value, encode_value, patch_values

__all__ = ("PREFIX", "BakePlan", "check_base", "plan_bake", "record", "strip", "write_bake")

_AHEAD = 8  # batches computed ahead of the writing
_AHEAD_BYTES = 16 << 20  # larger ones are computed chunk by chunk as they are written, so that memory stays bounded
_MINIMUM_BLOCK = 32  # n_ff must be a multiple of it in llama.cpp's kernels
_F32 = 0


@dataclass(frozen=True)
class PartPlan:
    """One steered file, or one shard of it, laid out but not written."""

    base: GGUFFile
    header: bytes
    tensors: tuple[NewTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        if not self.tensors:
            return len(self.header)
        last = self.tensors[-1]
        return len(self.header) + -(-(last.offset + last.nbytes) // self.base.alignment) * self.base.alignment


@dataclass(frozen=True)
class BakePlan:
    """A steered file, laid out but not written; ``widths`` are the base's, one a layer."""

    base: GGUFFile
    home: Home
    program: MLPProgram
    widths: tuple[int, ...]
    parts: tuple[PartPlan, ...]

    @property
    def extra(self) -> int:
        """Neurons added to the layer that gets most."""
        return self.program.widest

    @property
    def mean_extra(self) -> float:
        """Neurons added to a layer on average."""
        return sum(layer.units for layer in self.program.layers) / len(self.program.layers)

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all its shards."""
        return sum(part.nbytes for part in self.parts)


def check_base(base: GGUFFile, layout: Layout = "uniform") -> None:
    """Raise if a program cannot be baked into ``base`` in a layout; reads nothing but its header.

    Raises:
        ArchitectureError: llama.cpp loads no MLP biases for this family, or takes no width for each layer of it.
        GGUFError: a tensor is missing or of another shape than the header says.
        ModelError: already steered, of a family that is re-homed and with something that has no place there, or a
            tensor type that cannot be widened.
    """
    family = gguf_family(base.architecture, str(base.path), mixture=is_mixture(base))
    check_bakeable(family, str(base.path))
    if any(entry.key.startswith(PREFIX) for part in base.parts for entry in part.keys):
        raise ModelError(f"{base.path}: is steered already; npti-export strip it first, or give --trait several times")
    home_of(base, layout)
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    for layer, width in enumerate(mlp_widths(base)):
        if width:
            _check_mlp(base, layer, hidden, width)
    check_rest(base)


def _check_mlp(base: GGUFFile, layer: int, hidden: int, width: int) -> None:
    shapes = {FFN_GATE: (hidden, width), FFN_UP: (hidden, width), FFN_DOWN: (width, hidden)}
    for stem, shape in shapes.items():
        tensor = base.require_tensor(stem.format(layer) + ".weight")
        if tensor.shape != shape:
            raise GGUFError(f"{base.path}: {tensor.name} is {tensor.shape}, not {shape}; the file is damaged")
        if not supports_widening(tensor.type_id):
            raise ModelError(
                f"{base.path}: {tensor.name} is {type_name(tensor.type_id)}, which cannot be widened; "
                "take a file whose MLP weights are floats or of a type that llama.cpp quantises to"
            )
        if stem.format(layer) + ".scale" in base.by_name:
            raise ModelError(
                f"{base.path}: {stem.format(layer)} has a scale beside it (a converted NVFP4 checkpoint), where "
                "llama.cpp allows no bias; take another type of the model"
            )
        bias = base.by_name.get(stem.format(layer) + ".bias")
        if bias is not None and (bias.shape, bias.type_id) != (shape[1:], _F32):
            raise GGUFError(f"{base.path}: {bias.name} is not {shape[1]} values of F32; the file is damaged")


def plan_bake(
    base: GGUFFile,
    program: MLPProgram,
    metadata: dict[str, Value],
    base_sha256: str | Sequence[str],
    layout: Layout = "uniform",
) -> BakePlan:
    """Lay out the steered file: every tensor of the base, the MLPs widened, biases appended.

    A split base gives a file split alike; keys about steering go to its first shard, what brings a shard of the base
    back to that shard.

    A ragged file is the uniform one without the blocks of new columns in which no unit works, so it computes the same.

    Args:
        base: header of the unsteered file, see :func:`check_base`.
        program: as many layers as the base has; where those differ in width, as wide as the widest.
        metadata: added under ``npti.``; floats may be patched later by :func:`record`.
        base_sha256: of the base file, which :func:`strip` compares its result with; of each of its shards in turn.
        layout: where a ragged file comes out with equal widths, as without units, it is the uniform one.

    Raises:
        ArchitectureError: the family cannot be ragged.
        ModelError: the program is for neurons that a layer does not have.
    """
    digests = [base_sha256] if isinstance(base_sha256, str) else base_sha256
    old = mlp_widths(base)
    padded = _padded(base, program, old, layout)
    widths = [width + layer.units for width, layer in zip(old, padded.layers, strict=True)]
    # Equal widths need no deci, which fewer programs know.
    home = home_of(base, layout if len(set(widths)) > 1 else "uniform")
    new = biases.new_biases(base, padded, widths)
    count = len(base.tensors) + sum(map(len, new.values()))
    parts = []
    for number, (part, digest) in enumerate(zip(base.parts, digests, strict=True)):
        tensors = [places.with_width(tensor, widths, part.path) for tensor in part.tensors]
        tensors += [bias for weight, added in new.items() if weight in part.by_name for bias in added]
        keys = places.steered_keys(part, home, widths, count, first=number == 0)
        about: dict[str, Value] = {places.FORMAT_KEY: places.FORMAT, places.SHA256: digest}
        if number == 0:
            about |= {PREFIX + key: value for key, value in metadata.items()}
        about |= _recovery(part, home, padded, old, keys, tensors)
        keys += [(key, encode_value(value)) for key, value in about.items()]
        header, placed = places.header_of(part, keys, tensors)
        if len(header) > MAX_HEADER:
            raise GGUFError(f"{part.path}: the header of its steered file would be too long; it is damaged")
        parts.append(PartPlan(part, header, tuple(placed)))
    return BakePlan(base, home, padded, tuple(old), tuple(parts))


def _padded(base: GGUFFile, program: MLPProgram, widths: Sequence[int], layout: Layout) -> MLPProgram:
    """The program with units in the order in which their columns are rounded best, each layer of whole blocks.

    All layers get as many, unless the file has a width for each, or is to have.

    Raises:
        ModelError: see :func:`plan_bake`.
    """
    for number, (layer, width) in enumerate(zip(program.layers, widths, strict=True)):
        biases.check_sizes(base, layer, number, width)
    blocks = _blocks(base)
    step, layers = max(blocks), []
    own = base.by_key[f"{base.architecture}.feed_forward_length"].array is not None and base.architecture == RAGGED
    for number, (layer, block) in enumerate(zip(program.layers, blocks, strict=True)):
        if layout == "ragged" and layer.silent:  # adapters know the units by their places
            layers.append(layer.padded(-(-layer.units // block) * block))
        elif layout == "ragged":
            layers.append(without_idle_blocks(_placed(base, number, layer, program.extra_width(step)), block))
        else:
            extra = -(-layer.units // step) * step if own else program.extra_width(step)
            layers.append(_placed(base, number, layer, extra))
    return MLPProgram(program.width, tuple(layers))


def _placed(base: GGUFFile, number: int, layer: LayerProgram, extra: int) -> LayerProgram:
    """One layer's units in that order, filled up to ``extra``."""
    if not extra or not layer.units:
        return layer.padded(extra)
    kind = base.require_tensor(FFN_DOWN.format(number) + ".weight").type_id
    if layer.silent or (is_fine(kind) and layer.dense is None):
        return layer.padded(extra)
    return arrange(layer, extra, granule(kind), is_codebook(kind), correct=not is_fine(kind))


def unit_block(base: GGUFFile) -> int:
    """Neurons are appended to all layers in multiples of this: of a block of any type of its down projections."""
    return max(_blocks(base))


def _blocks(base: GGUFFile) -> list[int]:
    """The same for each layer by itself."""
    blocks = []
    for layer, width in enumerate(mlp_widths(base)):
        blocks.append(_MINIMUM_BLOCK)
        if width:
            tensor = base.require_tensor(FFN_DOWN.format(layer) + ".weight")
            blocks[-1] = max(_MINIMUM_BLOCK, block_shape(tensor.type_id, str(base.path))[0])
    return blocks


def rounds_nothing(header: GGUFFile) -> bool:
    """Whether the MLPs of a model are floats: their types round neither biases, which are F32, nor copies."""
    layers = range(layer_count(header))
    names = [f"{stem.format(layer)}.weight" for stem in (FFN_GATE, FFN_UP, FFN_DOWN) for layer in layers]
    return all(is_float(header.by_name[name].type_id) for name in names if name in header.by_name)


def write_bake(plan: BakePlan, path: Path) -> None:
    """Write a planned file to ``path`` (of a split model: the first one), streaming.

    Memory is bounded by the batches ahead, whatever the model's size.

    Raises:
        DiskFullError: known before the first byte.
        GGUFError: the base changed or ended early while being read.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if free < plan.nbytes:
        raise DiskFullError(
            f"{path.absolute().parent}: the file needs {plan.nbytes / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free"
        )
    for part, target in zip(plan.parts, shard_paths(path, len(plan.parts)), strict=True):
        _write_part(plan, part, target)


def _write_part(plan: BakePlan, part: PartPlan, path: Path) -> None:
    base = part.base
    try:
        with (
            base.path.open("rb") as source,
            base.path.open("rb") as copied,
            path.open("wb", buffering=0) as target,
            ThreadPoolExecutor(1) as writer,
        ):
            pending: deque[Future[None]] = deque()
            # This thread computes what is new, the other one moves bytes, mostly inside the kernel.
            for pieces, streamed in _batches(plan, part, source):
                pending.append(writer.submit(widen.write_pieces, copied, target, pieces))
                while len(pending) > (0 if streamed else _AHEAD):
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
    except EOFError as error:
        raise GGUFError(f"{base.path}: changed or ended while it was read ({error}); run the command again") from error


def _batches(plan: BakePlan, part: PartPlan, source: BinaryIO) -> Iterator[tuple[Iterable[widen.Piece], bool]]:
    """The file in pieces, and whether computing them reads from ``source`` while they are written.

    Tensors that are copied are gathered until there is one with something new, so that neighbours go in one call.
    """
    batch: list[widen.Piece] = [part.header]
    position = 0
    for tensor in part.tensors:
        if tensor.offset > position:
            batch += widen.zeros(tensor.offset - position)
        position = tensor.offset + tensor.nbytes
        content = _content(source, plan, part, tensor)
        if tensor.nbytes >= _AHEAD_BYTES:
            yield batch, False
            yield content, True
            batch = []
            continue
        batch += content
        if not isinstance(batch[-1], widen.Range):
            yield batch, False
            batch = []
    batch += widen.zeros(part.nbytes - len(part.header) - position)
    yield batch, False


def _content(source: BinaryIO, plan: BakePlan, part: PartPlan, tensor: NewTensor) -> Iterator[widen.Piece]:
    old = part.base.by_name.get(tensor.name)
    found = places.mlp_tensor(tensor.name)
    if found is None:
        below = places.down_bias_layer(tensor.name)
        if below is not None and plan.program.layers[below].changes_output:
            return iter([biases.down_bias(plan.base, plan.program.layers[below], below).data])
        assert old is not None
        order = plan.home.steered_order(tensor.name)
        return widen.copy(old) if order is None else widen.reorder_rows(source, old, order)
    number, kind = found
    layer = plan.program.layers[number]
    if old is None:
        return iter([widen.gate_bias(plan.widths[number], layer).data])
    if kind.endswith("weight") and not layer.units:
        return widen.copy(old)
    up = np.zeros((0, old.row_length), np.float32) if layer.dense is None else layer.dense.up
    if kind == "gate.weight":
        return widen.append_rows(source, old, layer.source, layer.gate_scale, np.zeros_like(up))
    if kind == "up.weight":
        return widen.append_rows(source, old, layer.source, layer.up_scale, up)
    if kind == "down.weight":
        return widen.append_columns(source, old, layer)
    values = widen.read_floats(source, old)
    if kind == "gate.bias":
        return iter([widen.gate_bias(plan.widths[number], layer, values).data])
    return iter([widen.up_bias(layer, values).data])


def _recovery(
    part: GGUFFile,
    home: Home,
    program: MLPProgram,
    widths: Sequence[int],
    keys: Sequence[places.Entry],
    tensors: Sequence[NewTensor],
) -> dict[str, Value]:
    """What strip cannot work out for itself from a steered file with these keys and tensors.

    That is a header with quirks, bytes between tensors that are not zero, biases that were overwritten or added to.
    """
    count = len(part.tensors)
    header, _ = places.header_of(
        part, places.base_keys(keys, home), [places.with_width(one, widths, part.path) for one in tensors[:count]]
    )
    with part.path.open("rb") as stream:
        original = stream.read(part.data_start)
        biases_kept = biases.kept(part, program, stream)
    gaps = gaps_of(part)
    result: dict[str, Value] = {places.BYTES: part.size, places.TENSORS: count}
    if original != header[: part.size]:  # a shard without tensors may end before its padding
        result[places.HEADER] = original
    if gaps:
        result[places.GAPS] = gaps
    return result | biases_kept


def record(path: Path, values: dict[str, float]) -> None:
    """Fill in float metadata that :func:`plan_bake` left as placeholders, such as the measured fidelity."""
    patch_values(path, {PREFIX + key: value for key, value in values.items()})
