"""Means of the residual stream in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.context import chunks
from npti_export.runtimes.llamacpp.taps import Floats, See

_BEHIND = "l_out"  # what a layer hands on, in every family (``cb`` in src/models)


class StreamMeans:
    """Adds up the residual stream behind each layer over passes of several sequences each.

    Args:
        layers: their number.
        hidden: size of the stream.
        mlp_output: node of an MLP's output.
        added: ``[layers, hidden]``, added to it; None leaves it.
    """

    def __init__(self, layers: int, hidden: int, mlp_output: str, added: npt.NDArray[np.float64] | None) -> None:
        self._sums = np.zeros((layers, hidden))
        self._count = 0
        self._seen = [0] * layers
        self._counted = np.zeros(0, np.bool_)
        self.nodes: dict[bytes, See] = {f"{_BEHIND}-{at}".encode(): self._behind(at) for at in range(layers)}
        if added is not None:
            rows = added.astype(np.float32)
            self.nodes |= {f"{mlp_output}-{at}".encode(): _adding(rows[at]) for at in range(layers)}

    def begin(self, exchanges: Sequence[Exchange]) -> list[tuple[int, ...]]:
        """Expect a pass over these, one behind the other; returns what is fed."""
        self._seen = [0] * len(self._seen)
        self._counted = counted_rows(exchanges)
        self._count += int(self._counted.sum())
        return [one.tokens[:-1] for one in exchanges]

    def _behind(self, layer: int) -> See:
        def see(values: Floats) -> bool:
            start = self._seen[layer]
            self._seen[layer] = start + len(values)
            rows = values[self._counted[start : start + len(values)]]
            self._sums[layer] += rows.sum(0, dtype=np.float64)
            return False

        return see

    def result(self) -> npt.NDArray[np.float64]:
        """The means, ``[layers, hidden]``."""
        return self._sums / max(self._count, 1)


class StreamFollower:
    """Moves the stream of a pass behind each layer to where it is wanted, and adds up what that took.

    Args:
        wanted: ``[layers, hidden]``, the change of the mean.
    """

    def __init__(self, wanted: npt.NDArray[np.float64]) -> None:
        self._wanted = wanted
        self._sums = np.zeros_like(wanted)
        self._count = 0
        self._plain = np.zeros_like(wanted)
        self._counted = np.zeros(0, np.bool_)
        layers = range(len(wanted))
        self.looking: dict[bytes, See] = {f"{_BEHIND}-{at}".encode(): self._look(at) for at in layers}
        self.moving: dict[bytes, See] = {f"{_BEHIND}-{at}".encode(): self._move(at) for at in layers}

    def begin(self, exchanges: Sequence[Exchange]) -> list[tuple[int, ...]]:
        """Expect two passes over these, the first looking, the second moving; returns what is fed."""
        self._counted = counted_rows(exchanges)
        self._count += int(self._counted.sum())
        return [one.tokens[:-1] for one in exchanges]

    def _look(self, layer: int) -> See:
        def see(values: Floats) -> bool:
            self._plain[layer] = values[self._counted].mean(0, dtype=np.float64)
            return False

        return see

    def _move(self, layer: int) -> See:
        def see(values: Floats) -> bool:
            moved = values[self._counted].mean(0, dtype=np.float64) - self._plain[layer]
            share = self._wanted[layer] - moved
            self._sums[layer] += share * self._counted.sum()
            values += share.astype(np.float32)
            return True

        return see

    def result(self) -> npt.NDArray[np.float64]:
        """The mean of what was added, ``[layers, hidden]``."""
        return self._sums / max(self._count, 1)


def whole_chunks(exchanges: Sequence[Exchange], vocabulary: int, batch: int) -> Iterator[list[Exchange]]:
    """Groups of exchanges that are computed in one go each, so that all their rows meet at every node.

    Raises:
        ModelError: one is longer than a batch.
    """
    longest = max(len(one.tokens) for one in exchanges)
    if longest > batch:
        raise ModelError(f"--prompt-batch {batch} is too small: a question and its answer take {longest} tokens")
    return chunks(exchanges, lambda one: len(one.tokens), vocabulary, batch)


def counted_rows(exchanges: Sequence[Exchange]) -> npt.NDArray[np.bool_]:
    """Which rows of a pass over exchanges, one behind the other, predict a response token; the last is not fed."""
    return np.concatenate([np.arange(len(one.tokens) - 1) >= len(one.prompt) - 1 for one in exchanges])


def _adding(row: Floats) -> See:
    def see(values: Floats) -> bool:
        values += row
        return True

    return see
