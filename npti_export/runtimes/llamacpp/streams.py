"""Means of the residual stream in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.taps import Floats, See

_BEHIND = "l_out"  # what a layer hands on, in every family (``cb`` in src/models)
_SETTLED = 1e-3  # of what a pass took: that little may be off in what was assumed before it


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

    Where a pass is computed in several pieces, each is moved by itself; pieces of a prompt that end before anything is
    counted, by what the others take on average. As that is known only afterwards, such a pass is run again until it
    takes what was assumed: a layer's share depends on the layers before it, so it is so after as many as there are.

    Args:
        wanted: ``[layers, hidden]``, the change of the mean.
    """

    def __init__(self, wanted: npt.NDArray[np.float64]) -> None:
        self._wanted = wanted
        self._sums = np.zeros_like(wanted)
        self._count = 0
        self._counted = np.zeros(0, np.bool_)
        self._seen = [0] * len(wanted)
        self._plain: list[list[npt.NDArray[np.float64]]] = [[] for _ in wanted]  # means of each layer's pieces
        self._left: list[list[npt.NDArray[np.float64]]] = []  # of these, what the pass at hand has not come to
        self._ahead = False  # whether a piece holds nothing that is counted
        self._passes = 0
        self._assumed, self._took = np.zeros_like(wanted), np.zeros_like(wanted)  # mean, sum over what is counted
        layers = range(len(wanted))
        self.looking: dict[bytes, See] = {f"{_BEHIND}-{at}".encode(): self._look(at) for at in layers}
        self.moving: dict[bytes, See] = {f"{_BEHIND}-{at}".encode(): self._move(at) for at in layers}

    def begin(self, exchanges: Sequence[Exchange]) -> list[tuple[int, ...]]:
        """Expect a looking pass over these, then moving ones for as long as :meth:`again`; returns what is fed."""
        self._counted = counted_rows(exchanges)
        self._plain = [[] for _ in self._wanted]
        self._ahead, self._passes, self._assumed = False, 0, np.zeros_like(self._wanted)
        return [one.tokens[:-1] for one in exchanges]

    def again(self) -> bool:
        """Whether a moving pass is due; when none is any more, what the last took is added up."""
        count = int(self._counted.sum())
        if self._passes:
            took = self._took / max(count, 1)
            off = float(np.linalg.norm(took - self._assumed))
            if not self._ahead or self._passes >= len(self._wanted) or off <= _SETTLED * float(np.linalg.norm(took)):
                self._sums += self._took
                self._count += count
                return False
            self._assumed = took
        self._passes += 1
        self._took = np.zeros_like(self._wanted)
        self._left = [list(pieces) for pieces in self._plain]
        return True

    def _rows(self, layer: int, values: Floats) -> npt.NDArray[np.bool_]:
        """Which rows of the piece at hand are counted."""
        start = self._seen[layer]
        end = start + len(values)
        self._seen[layer] = end % len(self._counted)  # the next pass begins anew
        return self._counted[start:end]

    def _look(self, layer: int) -> See:
        def see(values: Floats) -> bool:
            counted = self._rows(layer, values)
            if counted.any():
                self._plain[layer].append(values[counted].mean(0, dtype=np.float64))
            else:
                self._ahead = True
            return False

        return see

    def _move(self, layer: int) -> See:
        def see(values: Floats) -> bool:
            counted = self._rows(layer, values)
            share = self._assumed[layer]
            if counted.any():
                moved = values[counted].mean(0, dtype=np.float64) - self._left[layer].pop(0)
                share = self._wanted[layer] - moved
                self._took[layer] += share * counted.sum()
            values += share.astype(np.float32)
            return True

        return see

    def result(self) -> npt.NDArray[np.float64]:
        """The mean of what was added, ``[layers, hidden]``."""
        return self._sums / max(self._count, 1)


def counted_rows(exchanges: Sequence[Exchange]) -> npt.NDArray[np.bool_]:
    """Which rows of a pass over exchanges, one behind the other, predict a response token; the last is not fed."""
    return np.concatenate([np.arange(len(one.tokens) - 1) >= len(one.prompt) - 1 for one in exchanges])


def _adding(row: Floats) -> See:
    def see(values: Floats) -> bool:
        values += row
        return True

    return see
