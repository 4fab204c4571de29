"""Counting gate activations while llama.cpp decodes: every value looked up once, summed up in large pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.activations import activate
from npti_export.errors import ModelError
from npti_export.models import ModelShape
from npti_export.runtimes.llamacpp.taps import Floats, See
from npti_export.stats import BIN_COUNT, EDGES, ActivationStats, AnswerCounts

# A float32 without its last 11 bits: 12 bits of mantissa are left, so a value lands in a neighbouring bin only if it
# is within 1/8192 of an edge.
DROPPED_BITS = 11
_HELD_ROWS = 256  # kept as bin numbers until they are summed up: one byte a neuron and row
_NOT_POSITIVE = 0  # bin b of the statistics is kept as b + 1
# What is worked on at once stays in a processor's cache: values that are looked up and products, and neurons whose
# bins are summed up.
_LOOKED_UP, _PRODUCTS, _SUMMED_UP = 1 << 16, 1 << 17, 256


class GateCounter:
    """Statistics of the gates of one or several groups of answers.

    Args:
        shape: layers and neurons of the model.
        activation: the gate's non-linearity.
        groups: how many statistics to keep apart.
        answers: how many answers there can be.
        where: the file, for a message.
    """

    def __init__(self, shape: ModelShape, activation: str, groups: int, answers: int, where: object) -> None:
        layers, width = shape.layers, shape.width
        self._where = where
        self._activation, self._bins = activation, bin_of_bits(activation)
        self._groups = [_Group(layers, width) for _ in range(groups)]
        # of each answer: a pass adds to one layer of all of them
        self._counts: npt.NDArray[np.signedinteger[Any]] = np.zeros((layers, answers, width), AnswerCounts.kind(0))
        self._tokens = np.zeros(answers, np.int64)
        self._group_of = np.zeros(answers, np.int64)
        self._rows: list[_Rows] = []

    def begin(self, answers: Sequence[int], groups: Sequence[int]) -> None:
        """Expect a pass with one row for each of these answers, rows of a group next to each other."""
        self._rows = []
        start = 0
        while start < len(answers):
            end = start
            while end < len(answers) and groups[end] == groups[start]:
                end += 1
            rows, group = slice(start, end), self._groups[groups[start]]
            if group.held + end - start > len(group.buffer[0]):
                group.sum_up()
                group.make_room(end - start)
            self._rows.append(_Rows(group, rows, group.hold(end - start), *_owners(answers[rows])))
            start = end
        np.add.at(self._tokens, list(answers), 1)
        self._group_of[list(answers)] = groups
        self._counts = self._counts.astype(AnswerCounts.kind(int(self._tokens.max(initial=0))), copy=False)

    def see(self, layer: int, first: int | None = None) -> See:
        """What a tap does with a layer's pre-activations ``[rows, neurons]``; the ``first`` columns are the gate's.

        A layer may have fewer neurons than the widest one; those that it lacks are never active.
        """

        def look(values: Floats) -> bool:
            gate = values[:, :first]
            width = gate.shape[1]
            for one in self._rows:
                some, bins = gate[one.rows], one.group.buffer[layer, one.held, :width]
                self._look_up(some, bins)
                largest = one.group.largest[layer, :width]
                np.maximum(largest, some.max(0), out=largest)
                active, counts = bins != _NOT_POSITIVE, self._counts[layer, :, :width]
                if one.several is None:
                    counts[one.answers] += active
                else:
                    for answer, its in one.several:
                        counts[answer] += active[its].sum(0, dtype=counts.dtype)
            return False

        return look

    def _look_up(self, gate: Floats, bins: npt.NDArray[np.uint8]) -> None:
        """Write the bins of pre-activations, both ``[rows, neurons]``."""
        rows = max(1, _LOOKED_UP // max(1, gate.shape[1]))
        keys = np.empty((min(rows, len(gate)), gate.shape[1]), np.int64)
        for start in range(0, len(gate), rows):
            some = gate[start : start + rows]
            found = np.right_shift(some.view(np.uint32), DROPPED_BITS, out=keys[: len(some)])
            self._bins.take(found, out=bins[start : start + rows], mode="clip")  # all are inside: it saves a copy

    def see_product(self, layer: int) -> See:
        """What a tap does with the input of a layer's down projection ``[rows, neurons]``."""

        def look(values: Floats) -> bool:
            for one in self._rows:
                columns = _PRODUCTS // (one.rows.stop - one.rows.start) + 1
                for start in range(0, values.shape[1], columns):
                    some = values[one.rows, start : start + columns].astype(np.float64)
                    product = one.group.product[:, layer, start : start + some.shape[1]]
                    product[0] += some.sum(0)
                    product[1] += np.square(some, out=some).sum(0)
            return False

        return look

    def counts(self) -> AnswerCounts:
        """Of each answer."""
        return AnswerCounts(self._counts.transpose(1, 0, 2), self._tokens)

    def results(self) -> list[ActivationStats]:
        """The statistics of each group.

        Raises:
            ModelError: a gate was not a number.
        """
        for group in self._groups:
            group.sum_up()
        return [self._result(index, group) for index, group in enumerate(self._groups)]

    def _result(self, index: int, group: _Group) -> ActivationStats:
        chosen = np.flatnonzero((self._group_of == index) & (self._tokens > 0))
        if not len(chosen):
            return ActivationStats.empty(*group.largest.shape)
        refuse_no_numbers(group.largest, self._where)
        refuse_no_numbers(group.product, self._where)
        return ActivationStats(
            int(self._tokens[chosen].sum()),
            np.stack([counts[chosen].sum(0, dtype=np.int64) for counts in self._counts]),
            group.histogram,
            activate(np.maximum(group.largest, 0), self._activation),
            product=group.product,
        )


def refuse_no_numbers(seen: npt.NDArray[Any], where: object) -> None:
    """Raise if a gate, or an input of a down projection, was not a number: what is made of all of them is none, then.

    Raises:
        ModelError: it names the file.
    """
    if np.isnan(seen).any() or np.isposinf(seen).any():
        raise ModelError(f"{where}: computes gates that are not numbers; get the file again")


class _Group:
    """What is counted of one group."""

    def __init__(self, layers: int, width: int) -> None:
        self.histogram = np.zeros((layers, width, BIN_COUNT), np.int32)
        self.largest = np.full((layers, width), -np.inf, np.float32)  # of the pre-activation
        self.buffer = np.zeros((layers, _HELD_ROWS, width), np.uint8)
        self.product = np.zeros((2, layers, width))  # of the down projection's input: sum, sum of squares
        self.held = 0  # rows in the buffer

    def hold(self, rows: int) -> slice:
        """Places of so many more rows in the buffer."""
        self.held += rows
        return slice(self.held - rows, self.held)

    def sum_up(self) -> None:
        """Count what is in the buffer, and empty it."""
        columns = np.arange(_SUMMED_UP) * (BIN_COUNT + 1)
        for buffer, histogram in zip(self.buffer[:, : self.held], self.histogram, strict=True):
            for start in range(0, buffer.shape[1], _SUMMED_UP):
                bins = buffer[:, start : start + _SUMMED_UP]
                width = bins.shape[1]
                counts = np.bincount((bins + columns[:width]).ravel(), minlength=width * (BIN_COUNT + 1))
                histogram[start : start + width] += counts.reshape(width, -1)[:, 1:].astype(np.int32)
        self.held = 0

    def make_room(self, rows: int) -> None:
        """A buffer that holds at least so many rows."""
        layers, size, width = self.buffer.shape
        if rows > size:
            self.buffer = np.zeros((layers, rows, width), np.uint8)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a pass.

    Attributes:
        group: that they belong to.
        rows: of the pass.
        held: places in the group's buffer.
        answers: of the rows, one each.
        several: where an answer has several rows, each answer and its rows.
    """

    group: _Group
    rows: slice
    held: slice
    answers: slice | list[int]
    several: list[tuple[int, npt.NDArray[np.bool_]]] | None


def _owners(answers: Sequence[int]) -> tuple[slice | list[int], list[tuple[int, npt.NDArray[np.bool_]]] | None]:
    """What :class:`_Rows` holds of answers. Such next to each other are a slice, to which is added in place."""
    names = sorted(set(answers))
    if len(names) < len(answers):
        return list(answers), [(name, np.equal(answers, name)) for name in names]
    consecutive = range(answers[0], answers[0] + len(answers))
    if list(answers) == list(consecutive):
        return slice(consecutive.start, consecutive.stop), None
    return list(answers), None


@cache
def bin_of_bits(activation: str) -> npt.NDArray[np.uint8]:
    """For the upper bits of a pre-activation: 0 if ``a`` is not positive, else 1 + its bin in ``EDGES``."""
    assert BIN_COUNT < 256
    keys = np.arange(1 << (32 - DROPPED_BITS), dtype=np.uint32)
    middle = (keys << DROPPED_BITS | (1 << (DROPPED_BITS - 1))).view(np.float32)
    positive = np.isfinite(middle) & (middle > 0) & (keys > 0)
    bins = np.zeros(len(keys), np.uint8)
    values = activate(middle[positive], activation)
    bins[positive] = np.where(values > 0, np.searchsorted(EDGES, values, side="right") + 1, 0)
    return bins
