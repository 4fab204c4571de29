"""Take a program out of a GGUF again: the base file, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npti_export.compiler.program import OFF_BIAS
from npti_export.errors import GGUFError
from npti_export.export import layout, widen
from npti_export.export.rehome import Home
from npti_export.files import atomic_files, atomic_output, sha256_file
from npti_export.gguf.reader import GGUFFile, TensorInfo, mlp_widths, parse_gguf
from npti_export.gguf.shards import read_model, shard_paths


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
    if any(part.get(layout.FORMAT_KEY) != layout.FORMAT for part in steered.parts):
        raise GGUFError(
            f"{path}: was not made by this version of npti-export (no npti.base metadata); nothing to strip"
        )
    home, widths = layout.steered_home(steered), layout.base_widths(steered, mlp_widths(steered))
    plans = [_Base(part, home, widths) for part in steered.parts]
    if not steered.shards:
        with atomic_output(out, force=force) as temporary:
            return _write(plans[0], temporary)
    paths = shard_paths(out, len(plans))
    with atomic_files(paths, force=force) as folder:
        digests = [_write(plan, folder / file.name) for plan, file in zip(plans, paths, strict=True)]
    return digests[0]


@dataclass(frozen=True)
class _Base:
    """What is known about the base of a steered file or shard; ``widths`` are those of its MLPs, one a layer."""

    steered: GGUFFile
    home: Home
    widths: list[int]


def _write(plan: _Base, target: Path) -> str:
    path = plan.steered.path
    expected = plan.steered.get(layout.SHA256)
    with path.open("rb") as source, path.open("rb") as copied, target.open("wb", buffering=0) as stream:
        widen.write_pieces(copied, stream, _pieces(plan, source))
    found = sha256_file(target)
    if found != expected:
        raise GGUFError(
            f"{path}: the base cannot be restored (sha256 {found[:12]}…, not {str(expected)[:12]}…); it is damaged"
        )
    return found


def _layout(plan: _Base) -> tuple[bytes, list[TensorInfo]]:
    """Header bytes and tensors (offsets from the start of the file) of the base."""
    steered = plan.steered
    stored = steered.get(layout.HEADER)
    if stored is not None:
        size = steered.require_int(layout.BYTES)
        return bytes(stored), list(parse_gguf(io.BytesIO(bytes(stored)), size, steered.path).tensors)
    keys = layout.base_keys(((entry.key, entry.raw) for entry in steered.keys), plan.home)
    kept = steered.tensors[: int(steered.get(layout.TENSORS, len(steered.tensors)))]
    header, placed = layout.header_of(steered, keys, [layout.with_width(one, plan.widths) for one in kept])
    return header, [
        TensorInfo(one.name, one.shape, one.type_id, len(header) + one.offset, one.nbytes) for one in placed
    ]


def _pieces(plan: _Base, source: BinaryIO) -> Iterator[widen.Piece]:
    """The whole base file in pieces: its header, its tensors in the order of the file, and what lies between them."""
    header, tensors = _layout(plan)
    gaps = memoryview(bytes(plan.steered.get(layout.GAPS, [])))  # zeros where it is empty
    biases = _gate_biases(plan, source, tensors)

    def gap(length: int) -> bytes:
        nonlocal gaps
        data, gaps = bytes(gaps[:length]), gaps[length:]
        return data.ljust(length, b"\0")

    yield header[: plan.steered.require_int(layout.BYTES)]
    position = len(header)
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.offset > position:
            yield gap(tensor.offset - position)
        if tensor.name in biases:
            yield biases[tensor.name]
        else:
            yield from _narrowed(source, plan, tensor)
        position = tensor.offset + tensor.nbytes
    yield gap(max(0, plan.steered.require_int(layout.BYTES) - position))


def _narrowed(source: BinaryIO, plan: _Base, tensor: TensorInfo) -> Iterator[widen.Piece]:
    wide = plan.steered.require_tensor(tensor.name)
    order = plan.home.base_order(tensor.name)
    if order is not None:
        return widen.reorder_rows(source, wide, order)
    _, kind = layout.mlp_tensor(tensor.name) or (0, "")
    if kind == "down.weight":
        return widen.keep_columns(source, wide, tensor.row_bytes)
    if kind:
        return widen.keep_bytes(wide, tensor.nbytes)
    return widen.copy(wide)


def _gate_biases(plan: _Base, source: BinaryIO, tensors: list[TensorInfo]) -> dict[str, bytes]:
    """The gate biases that the base had itself, those of neurons that are switched off put back."""
    stored = np.frombuffer(bytes(plan.steered.get(layout.OFF_GATES, [])), np.float32)
    result = {}
    for tensor in tensors:
        if not tensor.name.endswith("ffn_gate.bias"):
            continue
        values = widen.read_floats(source, plan.steered.require_tensor(tensor.name))[: tensor.shape[0]]
        off = np.flatnonzero(values == OFF_BIAS)
        if len(off) > len(stored):
            raise GGUFError(f"{plan.steered.path}: {layout.OFF_GATES} is too short; the file is damaged")
        values[off], stored = stored[: len(off)], stored[len(off) :]
        result[tensor.name] = values.tobytes()
    return result
