"""Write the files of a dial: the widened base and its adapters, streaming a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npti_export.architectures import FFN_DOWN, Layout
from npti_export.compiler.dial import AdapterPlan, DialProgram
from npti_export.errors import GGUFError
from npti_export.export.gguf import BakePlan, plan_bake, write_bake
from npti_export.export.lora import LoraFile, LoraTypes, plan_lora
from npti_export.files import check_place
from npti_export.gguf.blocks import decode_columns, type_name
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.weights import read_rows
from npti_export.gguf.writer import Value

# By the type of the down projection. A runtime rounds what a matrix is multiplied by to that matrix's own kind: so the
# neuron that a clamp takes away is rounded as the base rounds it, no input can be too large for the one and not for the
# other, and the types are as small as that allows. All hold -1, 0 and 1 exactly. Measured on the default model, KL to
# the rule: F32 6.7e-6; F16 9.5e-6 (with F32 matrices 9.2e-6, with Q4_0 3.5e-5); BF16 1.4e-4 (its own noise); Q4_1
# 0.0042 (F32 0.0045), Q8_0 0.0039 (F32 0.0041), Q4_K_M 0.0090 (F32 0.0089).
_TYPES = {"F32": LoraTypes("F32", "F32"), "F16": LoraTypes("F16", "F16"), "BF16": LoraTypes("BF16", "F32")}
_QUANTISED = LoraTypes("Q4_0", "F16")


@dataclass(frozen=True)
class DialPlan:
    """A dial, laid out but not written."""

    bake: BakePlan
    program: DialProgram
    files: tuple[LoraFile, ...]

    @property
    def nbytes(self) -> int:
        """Size of all its files with weights."""
        return self.bake.nbytes + sum(one.nbytes for one in self.files)


def plan_dial(
    base: GGUFFile,
    program: DialProgram,
    paths: Sequence[Path],
    metadata: Mapping[str, Value],
    base_sha256: Sequence[str],
    layout: Layout = "uniform",
) -> DialPlan:
    """Lay out a dial.

    Args:
        base: header of the unsteered file, see :func:`npti_export.export.gguf.check_base`.
        program: compiled for it.
        paths: of the adapters, in their order.
        metadata: added to each file under ``npti.``.
        base_sha256: of the base, or of each of its shards in turn.
        layout: of the widened base, see :func:`npti_export.export.gguf.plan_bake`.

    Raises:
        ModelError: the program is for neurons that a layer does not have.
    """
    bake = plan_bake(base, program.units, {"kind": "dial base", **metadata}, base_sha256, layout)
    files = [_plan_file(bake, one, path, metadata) for one, path in zip(program.adapters, paths, strict=True)]
    return DialPlan(bake, program, tuple(files))


def _plan_file(bake: BakePlan, adapter: AdapterPlan, path: Path, metadata: Mapping[str, Value]) -> LoraFile:
    base, rule = bake.base, adapter.rule
    counts = np.count_nonzero(rule.shift, axis=1) + rule.clamp.sum(axis=1)
    ranks = {layer: int(count) for layer, count in enumerate(counts) if count}
    types = {layer: lora_types(base.require_tensor(_down(layer)).type_id) for layer in ranks}
    about: dict[str, Value] = {"kind": f"dial {adapter.kind}", **metadata, "trait": " ".join(adapter.traits)}
    hidden = base.require_int(f"{base.architecture}.embedding_length")
    return plan_lora(
        path, bake.home.steered, ranks, {layer: _total(bake, layer) for layer in ranks}, hidden, types, about
    )


def write_dial(plan: DialPlan, base_path: Path) -> None:
    """Write a planned dial, its base to ``base_path`` (of a split model: the first file).

    Memory is bounded by a few tensors, whatever the model's size.

    Raises:
        DiskFullError: known before the first byte.
        GGUFError: the base changed while it was read, or a column of it is not finite or too large.
    """
    check_place(base_path, plan.nbytes)
    write_bake(plan.bake, base_path)
    for file in plan.files:
        file.create()
    base = plan.bake.base
    for layer, width in enumerate(plan.bake.widths):
        users = [
            (adapter, file)
            for adapter, file in zip(plan.program.adapters, plan.files, strict=True)
            if layer in file.types
        ]
        if not users:
            continue
        down = base.require_tensor(_down(layer))
        rows = read_rows(base, down, 0, down.rows)
        for adapter, file in users:
            ranks = plan.program.ranks(adapter, layer, width, _total(plan.bake, layer))
            columns = decode_columns(rows, ranks.neurons, down.type_id) * ranks.factors
            try:
                file.write(layer, ranks.signs, columns)
            except ArithmeticError as error:
                raise GGUFError(
                    f"{base.path}: {down.name}: {error}; the file is damaged, take another copy or type"
                ) from error


def lora_types(type_id: int) -> LoraTypes:
    """The types of an adapter's matrices for a down projection of a ggml type."""
    return _TYPES.get(type_name(type_id), _QUANTISED)


def _down(layer: int) -> str:
    return FFN_DOWN.format(layer) + ".weight"


def _total(bake: BakePlan, layer: int) -> int:
    return bake.widths[layer] + bake.program.layers[layer].units
