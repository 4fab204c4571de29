"""Rules as a dial: units that all poles share, silent by themselves, and low-rank changes of ``W_down`` that use them.

A LoRA of ``W_down`` adds ``scale · Σ_r column_r · (selection_r · h)`` to an MLP's output, where ``h`` is what
``W_down`` reads, units included. So every rank stands for one neuron: its column is the neuron's own down column, and
what it selects is

- for a shift ``c``: ``c`` times the unit whose gate is the constant 1, which holds ``W_up[i]·x``;
- for a clamp: the neuron's clamp units less the neuron itself, ``min(silu(g), 0) - silu(g)`` times ``W_up[i]·x``.

Shifts of several poles add up, as the adapters do. Clamps unite, and two adapters that both clamp a neuron would do it
twice: what poles have in common is therefore an adapter of its own, to be subtracted when they are mixed. With
``N(S)`` the neurons that all poles of a set ``S`` clamp, inclusion and exclusion gives the union over the poles that
are on as ``Σ (-1)^(|S|+1) N(S)`` over the sets ``S`` of them, which is exact for any number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from npti_export.compiler.exact import compile_exact
from npti_export.compiler.program import Floats, Indices, LayerProgram, MLPProgram
from npti_export.errors import ProfileError
from npti_export.rule import SteeringRule

Kind = Literal["shift", "clamp", "overlap"]
Signs = npt.NDArray[np.int8]

_KNOWN = ("source", "gate_scale", "gate_bias", "up_scale", "off", "copies", "silent")  # of a program, to _silent


@dataclass(frozen=True)
class Ranks:
    """What one adapter does to one layer.

    Attributes:
        neurons: ``[ranks]`` int64, whose down columns are added.
        factors: ``[ranks]`` float32, by which each column is multiplied.
        signs: ``[ranks, width + units]`` int8, -1, 0 or 1: what of the input of ``W_down`` each rank sums up.
    """

    neurons: Indices
    factors: Floats
    signs: Signs


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter of a dial.

    Attributes:
        kind: ``shift`` and ``clamp`` belong to one pole; ``overlap`` is what several poles clamp in common.
        traits: the pole, or the poles in the order of the dial.
        rule: what it does; shifts, or clamps.
    """

    kind: Kind
    traits: tuple[str, ...]
    rule: SteeringRule


@dataclass(frozen=True)
class DialProgram:
    """A silent program, and the adapters that use its units.

    Attributes:
        units: for MLPs of the rules' width. In each layer come first the constant units of ``shifted``, one each,
            then those of clamps.
        adapters: shift and clamp of each pole in turn, then the overlaps; none without a neuron.
        shifted: ``[layers]`` sorted neurons that some pole shifts.
        clamping: ``[layers]``, the neuron that each of the clamp units stands for.
    """

    units: MLPProgram
    adapters: tuple[AdapterPlan, ...]
    shifted: tuple[Indices, ...]
    clamping: tuple[Indices, ...]

    def ranks(self, adapter: AdapterPlan, layer: int, width: int, total: int) -> Ranks:
        """What an adapter does to a layer of ``width`` neurons that has ``total`` once it is widened."""
        chosen = np.flatnonzero(adapter.rule.shift[layer] if adapter.kind == "shift" else adapter.rule.clamp[layer])
        rows = np.arange(len(chosen))
        signs = np.zeros((len(chosen), total), np.int8)
        if adapter.kind == "shift":
            signs[rows, width + np.searchsorted(self.shifted[layer], chosen)] = 1
            return Ranks(chosen, adapter.rule.shift[layer, chosen], signs)
        source = self.clamping[layer]
        units = np.flatnonzero(np.isin(source, chosen))
        signs[np.searchsorted(chosen, source[units]), width + len(self.shifted[layer]) + units] = 1
        signs[rows, chosen] = -1
        return Ranks(chosen, np.ones(len(chosen), np.float32), signs)


def compile_dial(rules: Mapping[str, SteeringRule], clamp_units: int, mixed: int) -> DialProgram:
    """Compile the rules of several poles into one dial.

    Args:
        rules: by pole, of one model.
        clamp_units: see :func:`npti_export.compiler.exact.compile_exact`.
        mixed: most poles that can be on at once with their clamps united exactly; there are overlaps of up to so many.

    Raises:
        ProfileError: a rule with constants, for which a dial has no place.
    """
    for pole, rule in rules.items():
        if rule.constants:
            raise ProfileError(f"{pole}: adds constants, which a dial cannot switch; make a steered file of this rule")
    some = next(iter(rules.values()))
    shifted = np.any([rule.shift != 0 for rule in rules.values()], axis=0)
    clamped = np.any([rule.clamp for rule in rules.values()], axis=0)
    none = np.zeros_like(some.shift)
    # A shift of 1 everywhere: the unit's gate is the constant 1, and each adapter's columns say how much of it.
    constants = compile_exact(SteeringRule(shifted.astype(np.float32), np.zeros_like(clamped)), clamp_units)
    clamps = compile_exact(SteeringRule(none, clamped), clamp_units)
    layers = tuple(_silent(*pair) for pair in zip(constants.layers, clamps.layers, strict=True))
    return DialProgram(
        MLPProgram(constants.width, layers),
        tuple(_adapters(rules, mixed)),
        tuple(np.flatnonzero(row) for row in shifted),
        tuple(layer.source for layer in clamps.layers),
    )


def overlap_scale(poles: int) -> float:
    """The factor of what so many poles have in common, all of them being on: -1 for two, 1 for three and so on."""
    return -1.0 if poles % 2 == 0 else 1.0


def _adapters(rules: Mapping[str, SteeringRule], mixed: int) -> Iterator[AdapterPlan]:
    for pole, rule in rules.items():
        nothing = np.zeros_like(rule.shift), np.zeros_like(rule.clamp)
        if rule.shifted:
            yield AdapterPlan("shift", (pole,), SteeringRule(rule.shift, nothing[1]))
        if rule.clamped:
            yield AdapterPlan("clamp", (pole,), SteeringRule(nothing[0], rule.clamp))
    yield from _overlaps(list(rules.items()), mixed)


def _overlaps(rules: Sequence[tuple[str, SteeringRule]], mixed: int) -> Iterator[AdapterPlan]:
    """Pairs first, then threes and so on; a set is tried only if all but its last pole have something in common."""
    common: dict[tuple[int, ...], npt.NDArray[np.bool_]] = {(at,): rule.clamp for at, (_, rule) in enumerate(rules)}
    for size in range(2, min(mixed, len(rules)) + 1):
        for places in combinations(range(len(rules)), size):
            if places[:-1] not in common:
                continue
            clamp = common[places[:-1]] & rules[places[-1]][1].clamp
            if clamp.any():
                common[places] = clamp
                poles = tuple(rules[at][0] for at in places)
                yield AdapterPlan("overlap", poles, SteeringRule(np.zeros(clamp.shape, np.float32), clamp))


def _silent(constants: LayerProgram, clamps: LayerProgram) -> LayerProgram:
    """The units of both, with zero down columns and every neuron of the base left on.

    Raises:
        ValueError: a program has something that a dial cannot switch, such as a bias of the base's own neurons.
    """
    for part in (constants, clamps):
        for one in fields(part):
            value = getattr(part, one.name)
            if one.name not in _KNOWN and not (value is None or (np.size(value) == 0)):
                raise ValueError(f"a dial has no place for a program's {one.name}")
    both = (constants, clamps)
    return LayerProgram(
        source=np.concatenate([part.source for part in both]),
        gate_scale=np.concatenate([part.gate_scale for part in both]),
        gate_bias=np.concatenate([part.gate_bias for part in both]),
        up_scale=np.concatenate([part.up_scale for part in both]),
        off=np.zeros(0, np.int64),
        silent=True,
    )
