"""Bake a program into a GGUF, and take it out again."""

from __future__ import annotations

import io
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from npti_export.architectures import FFN_DOWN, FFN_GATE, FFN_UP, by_gguf_name
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.errors import DiskFullError, GGUFError, ModelError
from npti_export.export import widen
from npti_export.export.rest import MOST_GAPS, check_rest, gaps_of, is_mlp
from npti_export.files import atomic_output, sha256_file
from npti_export.gguf.blocks import block_shape, supports_widening, type_name
from npti_export.gguf.cursor import UINT32
from npti_export.gguf.reader import GGUFFile, KeyValue, TensorInfo, parse_gguf, read_gguf
from npti_export.gguf.writer import (
    NewTensor,
    Value,
    encode_header,
    encode_uint32,
    encode_value,
    lay_out,
    patch_values,
)

PREFIX = "npti."
FORMAT = 1  # of the npti.* keys and of what strip expects
_SHA256 = "npti.base.sha256"
_WIDTH = "npti.base.feed_forward_length"
_HEADER = "npti.base.header"
_GAPS = "npti.base.gaps"
_AHEAD = 8  # batches computed ahead of the writing
_AHEAD_BYTES = 16 << 20  # larger ones are computed chunk by chunk as they are written, so that memory stays bounded
_MINIMUM_BLOCK = 32  # n_ff must be a multiple of it in llama.cpp's kernels


@dataclass(frozen=True)
class BakePlan:
    """A steered file, laid out but not written."""

    base: GGUFFile
    program: MLPProgram
    header: bytes
    tensors: tuple[NewTensor, ...]
    extra: int
    base_sha256: str

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        last = self.tensors[-1]
        return len(self.header) + -(-(last.offset + last.nbytes) // self.base.alignment) * self.base.alignment


def check_base(base: GGUFFile) -> None:
    """Raise if a program cannot be baked into ``base``; reads nothing but its header.

    Raises:
        ArchitectureError: llama.cpp loads no MLP biases for this family.
        GGUFError: a tensor is missing or of another shape than the header says.
        ModelError: already steered, has MLP biases of its own, or a tensor type that cannot be widened.
    """
    by_gguf_name(base.architecture, str(base.path))
    if any(entry.key.startswith(PREFIX) for entry in base.keys):
        raise ModelError(f"{base.path}: is steered already; npti-export strip it first, or give --trait several times")
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    width = base.require_int(f"{base.architecture}.feed_forward_length")
    shapes = {FFN_GATE: (hidden, width), FFN_UP: (hidden, width), FFN_DOWN: (width, hidden)}
    if base.by_key[f"{base.architecture}.feed_forward_length"].kind != UINT32:
        raise GGUFError(f"{base.path}: {base.architecture}.feed_forward_length is not a uint32; the file is damaged")
    experts = base.by_key.get(f"{base.architecture}.expert_count")
    if experts is not None and (experts.array is not None or experts.value != 0):
        raise ModelError(f"{base.path}: is a mixture of experts, which cannot be baked yet; take a dense model")
    for layer in range(base.require_int(f"{base.architecture}.block_count")):
        for stem in (FFN_GATE, FFN_UP, FFN_DOWN):
            tensor = base.require_tensor(stem.format(layer) + ".weight")
            if tensor.shape != shapes[stem]:
                raise GGUFError(
                    f"{base.path}: {tensor.name} is {tensor.shape}, not {shapes[stem]}; the file is damaged"
                )
            if stem.format(layer) + ".bias" in base.by_name:
                raise ModelError(f"{base.path}: {stem.format(layer)} has a bias of its own, which is not supported yet")
            if not supports_widening(tensor.type_id):
                raise ModelError(
                    f"{base.path}: {tensor.name} is {type_name(tensor.type_id)}, which cannot be widened; "
                    "take a Q4_0 to Q8_0, K-quant, IQ4, F16, BF16 or F32 file of the model"
                )
    check_rest(base)


def plan_bake(base: GGUFFile, program: MLPProgram, metadata: dict[str, Value], base_sha256: str) -> BakePlan:
    """Lay out the steered file: every tensor of the base, the MLPs widened, gate biases appended.

    Args:
        base: header of the unsteered file, see :func:`check_base`.
        program: as many layers as the base has.
        metadata: added under ``npti.``; floats may be patched later by :func:`record`.
        base_sha256: of the base file, which :func:`strip` compares its result with.
    """
    widths = {
        block_shape(base.require_tensor(FFN_DOWN.format(layer) + ".weight").type_id, str(base.path))[0]
        for layer in range(len(program.layers))
    }
    extra = program.extra_width(max(widths | {_MINIMUM_BLOCK}))
    padded = MLPProgram(program.width, tuple(layer.padded(extra) for layer in program.layers))
    tensors = [_widened(tensor, program.width, extra) for tensor in base.tensors]
    tensors += [
        NewTensor(FFN_GATE.format(layer) + ".bias", (program.width + extra,), 0, 4 * (program.width + extra))
        for layer, one in enumerate(padded.layers)
        if one.off.size or one.gate_bias.any()
    ]
    added: dict[str, Value] = {
        "npti.format": FORMAT,
        _SHA256: base_sha256,
        _WIDTH: program.width,
        **{PREFIX + key: value for key, value in metadata.items()},
        **_recovery(base),
    }
    keys = _with_width(base, base.keys, program.width + extra)
    keys += [(key, encode_value(value)) for key, value in added.items()]
    header, placed = _lay_out(base, keys, tensors)
    return BakePlan(base, padded, header, tuple(placed), extra, base_sha256)


def write_bake(plan: BakePlan, path: Path) -> None:
    """Write a planned file to ``path``, streaming; memory is bounded by the batches ahead, whatever the model's size.

    Raises:
        DiskFullError: known before the first byte.
        GGUFError: the base changed or ended early while being read.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if free < plan.nbytes:
        raise DiskFullError(
            f"{path.absolute().parent}: the file needs {plan.nbytes / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free"
        )
    base = plan.base
    try:
        with (
            base.path.open("rb") as source,
            base.path.open("rb") as copied,
            path.open("wb", buffering=0) as target,
            ThreadPoolExecutor(1) as writer,
        ):
            pending: deque[Future[None]] = deque()
            # This thread computes what is new, the other one moves bytes, mostly inside the kernel.
            for pieces, streamed in _batches(plan, source):
                pending.append(writer.submit(widen.write_pieces, copied, target, pieces))
                while len(pending) > (0 if streamed else _AHEAD):
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
    except EOFError as error:
        raise GGUFError(f"{base.path}: changed or ended while it was read ({error}); run the command again") from error


def _batches(plan: BakePlan, source: BinaryIO) -> Iterator[tuple[Iterable[widen.Piece], bool]]:
    """The file in pieces, and whether computing them reads from ``source`` while they are written.

    Tensors that are copied are gathered until there is one with something new, so that neighbours go in one call.
    """
    batch: list[widen.Piece] = [plan.header]
    position = 0
    for tensor in plan.tensors:
        if tensor.offset > position:
            batch += widen.zeros(tensor.offset - position)
        position = tensor.offset + tensor.nbytes
        content = _content(source, plan, tensor)
        if tensor.nbytes >= _AHEAD_BYTES:
            yield batch, False
            yield content, True
            batch = []
            continue
        batch += content
        if not isinstance(batch[-1], widen.Range):
            yield batch, False
            batch = []
    batch += widen.zeros(plan.nbytes - len(plan.header) - position)
    yield batch, False


def record(path: Path, values: dict[str, float]) -> None:
    """Fill in float metadata that :func:`plan_bake` left as placeholders, such as the measured fidelity."""
    patch_values(path, {PREFIX + key: value for key, value in values.items()})


def strip(path: Path, out: Path, *, force: bool) -> str:
    """Write the unsteered file that ``path`` was baked from, bit for bit.

    Returns:
        Its SHA-256, which was compared with the one recorded when it was baked.

    Raises:
        GGUFError: not a steered file, or the result is not the base, in which case nothing is written.
        OutputError: ``out`` exists and ``force`` is not set.
    """
    steered = read_gguf(path)
    expected, version = steered.text(_SHA256), steered.by_key.get("npti.format")
    if version is None or version.array or version.value != FORMAT or not re.fullmatch("[0-9a-f]{64}", expected or ""):
        raise GGUFError(
            f"{path}: was not made by this version of npti-export (no npti.base metadata); nothing to strip"
        )
    assert expected is not None
    with atomic_output(out, force=force) as temporary:
        try:
            with path.open("rb") as source, path.open("rb") as copied, temporary.open("wb", buffering=0) as target:
                widen.write_pieces(copied, target, _base_pieces(steered, source))
        except EOFError as error:
            raise GGUFError(f"{path}: changed or ended while it was read ({error}); it may be damaged") from error
        found = sha256_file(temporary)
        if found != expected:
            raise GGUFError(
                f"{path}: the base cannot be restored (sha256 {found[:12]}…, not {expected[:12]}…); it is damaged"
            )
    return found


def _widened(tensor: TensorInfo, width: int, extra: int) -> NewTensor:
    if tensor.name.endswith(("ffn_gate.weight", "ffn_up.weight")):
        shape = (tensor.shape[0], width + extra)
    elif tensor.name.endswith("ffn_down.weight"):
        shape = (width + extra, tensor.shape[1])
    else:
        return NewTensor(tensor.name, tensor.shape, tensor.type_id, tensor.nbytes)
    block, nbytes = block_shape(tensor.type_id, tensor.name)
    return NewTensor(tensor.name, shape, tensor.type_id, shape[0] // block * nbytes * shape[1])


def _content(source: BinaryIO, plan: BakePlan, tensor: NewTensor) -> Iterator[widen.Piece]:
    old = plan.base.by_name.get(tensor.name)
    if old is None:
        return iter([widen.gate_bias(plan.program.width, _layer(plan, tensor.name))])
    if tensor.name.endswith("ffn_gate.weight"):
        layer = _layer(plan, tensor.name)
        return widen.append_rows(source, old, layer.source, layer.gate_scale)
    if tensor.name.endswith("ffn_up.weight"):
        layer = _layer(plan, tensor.name)
        return widen.append_rows(source, old, layer.source, layer.up_scale)
    if tensor.name.endswith("ffn_down.weight"):
        return widen.append_columns(source, old, _layer(plan, tensor.name).source)
    return widen.copy(old)


def _layer(plan: BakePlan, name: str) -> LayerProgram:
    return plan.program.layers[int(name.split(".")[1])]


def _lay_out(
    like: GGUFFile, keys: Sequence[tuple[str, bytes]], tensors: Sequence[NewTensor]
) -> tuple[bytes, list[NewTensor]]:
    """Header bytes and placed tensors of a file without quirks, of the version and alignment of ``like``."""
    placed = lay_out(tensors, like.alignment)
    return encode_header(like.version, keys, placed, like.alignment), placed


def _with_width(like: GGUFFile, entries: Iterable[KeyValue], width: int) -> list[tuple[str, bytes]]:
    """The entries with another width of the MLPs."""
    width_key = f"{like.architecture}.feed_forward_length"
    return [(entry.key, encode_uint32(width) if entry.key == width_key else entry.raw) for entry in entries]


def _recovery(base: GGUFFile) -> dict[str, Value]:
    """What strip cannot work out for itself: a header with quirks, bytes between tensors that are not zero."""
    header, _ = _lay_out(
        base,
        [(entry.key, entry.raw) for entry in base.keys],
        [NewTensor(one.name, one.shape, one.type_id, one.nbytes) for one in base.tensors],
    )
    with base.path.open("rb") as stream:
        original = stream.read(base.data_start)
    gaps = gaps_of(base)
    result: dict[str, Value] = {"npti.base.bytes": base.size}
    if original != header:
        result[_HEADER] = original
    if gaps:
        result[_GAPS] = gaps
    return result


def _base_layout(steered: GGUFFile) -> tuple[bytes, list[TensorInfo]]:
    """Header bytes and tensors (offsets from the start of the file) of the base of a steered file."""
    stored = steered.data(_HEADER)
    if stored is not None:
        if _base_bytes(steered) < len(stored):
            raise GGUFError(
                f"{steered.path}: npti.base.bytes is {_base_bytes(steered)}, less than {_HEADER} is long; it is damaged"
            )
        return stored, list(parse_gguf(io.BytesIO(stored), _base_bytes(steered), steered.path).tensors)
    width = steered.require_int(_WIDTH)
    if steered.require_int(f"{steered.architecture}.feed_forward_length") < width:
        raise GGUFError(f"{steered.path}: is narrower than its base; it is damaged")
    keys = _with_width(steered, (entry for entry in steered.keys if not entry.key.startswith(PREFIX)), width)
    for one in steered.tensors:
        if not is_mlp(one.name) or one.name.endswith("bias"):
            continue
        block, _ = block_shape(one.type_id, one.name)
        if len(one.shape) != 2 or (one.name.endswith("ffn_down.weight") and width % block):
            raise GGUFError(f"{steered.path}: {one.name} cannot have held {width} neurons; the file is damaged")
    tensors = [_widened(one, width, 0) for one in steered.tensors if not one.name.endswith("ffn_gate.bias")]
    header, placed = _lay_out(steered, keys, tensors)
    return header, [
        TensorInfo(one.name, one.shape, one.type_id, len(header) + one.offset, one.nbytes) for one in placed
    ]


def _base_pieces(steered: GGUFFile, source: BinaryIO) -> Iterator[widen.Piece]:
    """The whole base file in pieces: its header, its tensors in the order of the file, and what lies between them."""
    header, tensors = _base_layout(steered)
    gaps = memoryview(steered.data(_GAPS) or b"")  # zeros where it is empty

    def gap(length: int) -> Iterator[widen.Piece]:
        nonlocal gaps
        data, gaps = gaps[:length], gaps[length:]
        yield data
        yield from widen.zeros(length - len(data))

    yield header
    position = len(header)
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.offset > position:
            yield from gap(tensor.offset - position)
        yield from _narrowed(source, steered, tensor)
        position = tensor.offset + tensor.nbytes
    if _base_bytes(steered) > position:
        yield from gap(_base_bytes(steered) - position)


def _base_bytes(steered: GGUFFile) -> int:
    """Size of the base, which :func:`check_base` saw to be not much more than what is left of it."""
    return steered.require_int("npti.base.bytes", most=steered.size + MOST_GAPS)


def _narrowed(source: BinaryIO, steered: GGUFFile, tensor: TensorInfo) -> Iterator[widen.Piece]:
    wide = steered.require_tensor(tensor.name)
    if wide.type_id != tensor.type_id or wide.nbytes < tensor.nbytes:
        raise GGUFError(f"{steered.path}: {tensor.name} is smaller than in its base; the file is damaged")
    if tensor.name.endswith(("ffn_gate.weight", "ffn_up.weight")):
        return widen.keep_rows(wide, tensor.rows)
    if tensor.name.endswith("ffn_down.weight"):
        return widen.keep_columns(source, wide, tensor.row_bytes)
    return widen.copy(wide)
