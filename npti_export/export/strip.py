"""Take a program out of a GGUF again: the base file, bit for bit."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npti_export.compiler.program import OFF_BIAS
from npti_export.errors import GGUFError
from npti_export.export import layout, widen
from npti_export.export.rehome import Home
from npti_export.export.rest import MOST_GAPS
from npti_export.files import atomic_files, atomic_output, sha256_file
from npti_export.gguf.reader import GGUFFile, TensorInfo, mlp_widths, parse_gguf
from npti_export.gguf.shards import read_model, shard_paths

_F32 = 0


def strip(path: Path, out: Path, *, force: bool) -> str:
    """Write the unsteered file that ``path`` was baked from, bit for bit.

    Args:
        path: the steered file, or the first one of a split model.
        out: the result; of a split model see :func:`npti_export.gguf.shards.shard_paths`.
        force: replace what is there.

    Returns:
        The SHA-256 of the (first) file; each file's was compared with the one recorded when it was baked.

    Raises:
        GGUFError: not a steered file, or the result is not the base, in which case nothing is written.
        OutputError: ``out`` exists and ``force`` is not set.
    """
    steered = read_model(path)
    plans = _plans(steered)
    if not steered.shards:
        with atomic_output(out, force=force) as temporary:
            return _write(plans[0], temporary)
    paths = shard_paths(out, len(plans))
    with atomic_files(paths, force=force) as folder:
        digests = [_write(plan, folder / file.name) for plan, file in zip(plans, paths, strict=True)]
    return digests[0]


@dataclass(frozen=True)
class _Base:
    """What is known about the base of a steered file or shard: its SHA-256, and the widths of its MLPs, one a layer."""

    steered: GGUFFile
    digest: str
    home: Home
    widths: list[int]


def _plans(steered: GGUFFile) -> list[_Base]:
    """What is known about the base of each file of the model.

    Raises:
        GGUFError: not a steered file, or one that says what cannot be.
    """
    digests = []
    for part in steered.parts:
        digest = part.text(layout.SHA256) or ""
        if part.number(layout.FORMAT_KEY) != layout.FORMAT or not re.fullmatch("[0-9a-f]{64}", digest):
            raise GGUFError(
                f"{part.path}: was not made by this version of npti-export (no npti.base metadata); nothing to strip"
            )
        digests.append(digest)
    now = mlp_widths(steered)
    for part in steered.parts:
        for tensor in part.tensors:
            if layout.with_width(tensor, now, part.path).shape != tensor.shape:
                raise GGUFError(
                    f"{part.path}: {tensor.name} is {tensor.shape}, which does not go with the widths of its MLPs; "
                    "the file is damaged"
                )
    home, widths = layout.steered_home(steered), layout.base_widths(steered, now)
    return [_Base(part, digest, home, widths) for part, digest in zip(steered.parts, digests, strict=True)]


def _write(plan: _Base, target: Path) -> str:
    path = plan.steered.path
    try:
        with path.open("rb") as source, path.open("rb") as copied, target.open("wb", buffering=0) as stream:
            widen.write_pieces(copied, stream, _pieces(plan, source))
    except EOFError as error:
        raise GGUFError(f"{path}: changed or ended while it was read ({error}); it may be damaged") from error
    found = sha256_file(target)
    if found != plan.digest:
        raise GGUFError(
            f"{path}: the base cannot be restored (sha256 {found[:12]}…, not {plan.digest[:12]}…); it is damaged"
        )
    return found


def _size(steered: GGUFFile) -> int:
    """Of the base, which :func:`npti_export.export.rest.check_rest` saw to be not much more than what is left of it."""
    return steered.require_int(layout.BYTES, most=steered.size + MOST_GAPS)


def _layout(plan: _Base) -> tuple[bytes, list[TensorInfo]]:
    """Header bytes and tensors (offsets from the start of the file) of the base."""
    steered = plan.steered
    stored = steered.data(layout.HEADER)
    if stored is not None:
        if _size(steered) < len(stored):
            raise GGUFError(
                f"{steered.path}: {layout.BYTES} is {_size(steered)}, less than {layout.HEADER} is long; it is damaged"
            )
        return stored, list(parse_gguf(io.BytesIO(stored), _size(steered), steered.path).tensors)
    keys = layout.base_keys(((entry.key, entry.raw) for entry in steered.keys), plan.home)
    kept = steered.tensors[: steered.number(layout.TENSORS)]
    base = [layout.with_width(one, plan.widths, steered.path) for one in kept]
    header, placed = layout.header_of(steered, keys, base)
    return header, [
        TensorInfo(one.name, one.shape, one.type_id, len(header) + one.offset, one.nbytes) for one in placed
    ]


def _pieces(plan: _Base, source: BinaryIO) -> Iterator[widen.Piece]:
    """The whole base file in pieces: its header, its tensors in the order of the file, and what lies between them."""
    header, tensors = _layout(plan)
    gaps = memoryview(plan.steered.data(layout.GAPS) or b"")  # zeros where it is empty
    biases = _own_biases(plan, source, tensors)

    def gap(length: int) -> Iterator[widen.Piece]:
        nonlocal gaps
        data, gaps = gaps[:length], gaps[length:]
        yield data
        yield from widen.zeros(length - len(data))

    size = _size(plan.steered)
    yield header[:size]  # a shard without tensors may end before its padding
    position = len(header)
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.offset > position:
            yield from gap(tensor.offset - position)
        if tensor.name in biases:
            yield biases[tensor.name]
        else:
            yield from _narrowed(source, plan, tensor)
        position = tensor.offset + tensor.nbytes
    if size > position:
        yield from gap(size - position)


def _narrowed(source: BinaryIO, plan: _Base, tensor: TensorInfo) -> Iterator[widen.Piece]:
    wide = plan.steered.require_tensor(tensor.name)
    _, kind = layout.mlp_tensor(tensor.name) or (0, "")
    if wide.type_id != tensor.type_id or wide.nbytes < tensor.nbytes or not (kind or wide.nbytes == tensor.nbytes):
        raise GGUFError(f"{plan.steered.path}: {tensor.name} is not as large as in its base; the file is damaged")
    order = plan.home.base_order(tensor.name)
    if order is not None:
        return widen.reorder_rows(source, wide, order)
    if kind == "down.weight":
        return widen.keep_columns(source, wide, tensor.row_bytes)
    if kind:
        return widen.keep_bytes(wide, tensor.nbytes)
    return widen.copy(wide)


def _own_biases(plan: _Base, source: BinaryIO, tensors: list[TensorInfo]) -> dict[str, bytes]:
    """Biases that the base had itself: those added to as they were kept, gates that are switched off put back."""
    kept = plan.steered.data(layout.OFF_GATES) or b""
    if len(kept) % 4:
        raise GGUFError(f"{plan.steered.path}: {layout.OFF_GATES} is not made of float32; the file is damaged")
    stored = np.frombuffer(kept, np.float32)
    result = {}
    for tensor in tensors:
        whole = plan.steered.data(layout.kept_key(tensor.name))
        if whole is not None and len(whole) != tensor.nbytes:
            raise GGUFError(
                f"{plan.steered.path}: {layout.kept_key(tensor.name)} has {len(whole)} bytes where {tensor.nbytes} are "
                "due; the file is damaged"
            )
        if whole is not None:
            result[tensor.name] = whole
            continue
        _, kind = layout.mlp_tensor(tensor.name) or (0, "")
        if kind != "gate.bias":
            continue
        wide = plan.steered.require_tensor(tensor.name)
        if wide.type_id != _F32:
            raise GGUFError(f"{plan.steered.path}: {wide.name} is not F32; the file is damaged")
        values = widen.read_floats(source, wide)[: tensor.shape[0]]
        off = np.flatnonzero(values == OFF_BIAS)
        if len(off) > len(stored):
            raise GGUFError(f"{plan.steered.path}: {layout.OFF_GATES} is too short; the file is damaged")
        values[off], stored = stored[: len(off)], stored[len(off) :]
        result[tensor.name] = values.tobytes()
    return result
