"""Counting gate activations while llama.cpp decodes: every value looked up once, summed up in large pieces."""

from __future__ import annotations

from collections.abc import Sequence
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
        # an answer's own counts: int32, as an answer may be longer than 65,535 tokens
        self._counts = np.zeros((answers, layers, width), np.int32)
        self._tokens = np.zeros(answers, np.int64)
        self._group_of = np.zeros(answers, np.int64)
        self._rows: list[tuple[_Group, slice, slice]] = []  # group, rows of the pass, places in its buffer

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
                self._sum_up(group)
                group.make_room(end - start)
            self._rows.append((group, rows, slice(group.held, group.held + end - start)))
            group.owners += answers[rows]
            start = end
        np.add.at(self._tokens, list(answers), 1)
        self._group_of[list(answers)] = groups

    def see(self, layer: int, first: int | None = None) -> See:
        """What a tap does with a layer's pre-activations ``[rows, neurons]``; the ``first`` columns are the gate's.

        A layer may have fewer neurons than the widest one; those that it lacks are never active.
        """

        def look(values: Floats) -> bool:
            gate = values[:, :first]
            width = gate.shape[1]
            bins = self._bins[gate.view(np.uint32) >> DROPPED_BITS]
            for group, rows, place in self._rows:
                group.buffer[layer, place, :width] = bins[rows]
                largest = group.largest[layer, :width]
                np.maximum(largest, gate[rows].max(0), out=largest)
            return False

        return look

    def see_product(self, layer: int) -> See:
        """What a tap does with the input of a layer's down projection ``[rows, neurons]``."""

        def look(values: Floats) -> bool:
            width = values.shape[1]
            for group, rows, _ in self._rows:
                some = values[rows].astype(np.float64)
                group.product[0, layer, :width] += some.sum(0)
                group.product[1, layer, :width] += np.square(some, out=some).sum(0)
            return False

        return look

    def counts(self) -> AnswerCounts:
        """Of each answer."""
        for group in self._groups:
            self._sum_up(group)
        return AnswerCounts(self._counts, self._tokens)

    def results(self) -> list[ActivationStats]:
        """The statistics of each group.

        Raises:
            ModelError: a gate was not a number.
        """
        for group in self._groups:
            self._sum_up(group)
        return [self._result(index, group) for index, group in enumerate(self._groups)]

    def _result(self, index: int, group: _Group) -> ActivationStats:
        chosen = np.flatnonzero((self._group_of == index) & (self._tokens > 0))
        if not len(chosen):
            return ActivationStats.empty(*group.largest.shape)
        refuse_no_numbers(group.largest, self._where)
        refuse_no_numbers(group.product, self._where)
        return ActivationStats(
            int(self._tokens[chosen].sum()),
            self._counts[chosen].sum(0, dtype=np.int64),
            group.histogram,
            activate(np.maximum(group.largest, 0), self._activation),
            product=group.product,
        )

    def _sum_up(self, group: _Group) -> None:
        held = len(group.owners)
        if not held:
            return
        owners = np.array(group.owners)
        order = np.argsort(owners, kind="stable")
        names, starts = np.unique(owners[order], return_index=True)
        width = group.largest.shape[1]
        columns = np.arange(width, dtype=np.int32) * (BIN_COUNT + 1)
        for layer, buffer in enumerate(group.buffer):
            bins = buffer[:held]
            active = (bins != _NOT_POSITIVE).view(np.uint8)[order]
            self._counts[names, layer] += np.add.reduceat(active, starts, axis=0, dtype=np.int32)
            counts = np.bincount((bins + columns).ravel(), minlength=width * (BIN_COUNT + 1))
            group.histogram[layer] += counts.reshape(width, BIN_COUNT + 1)[:, 1:].astype(np.int32)
        group.owners.clear()


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
        self.owners: list[int] = []  # the answer of each held row

    @property
    def held(self) -> int:
        """Rows in the buffer."""
        return len(self.owners)

    def make_room(self, rows: int) -> None:
        """A buffer that holds at least so many rows."""
        layers, size, width = self.buffer.shape
        if rows > size:
            self.buffer = np.zeros((layers, rows, width), np.uint8)


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
