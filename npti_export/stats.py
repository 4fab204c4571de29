"""Mergeable per-neuron statistics of gate activations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npti_export.errors import ProfileError
from npti_export.files import atomic_output

# Positive activations go into geometric bins, ten an octave from 2^-7 to 2^5, with one bin below (from 0) and one
# above. A bin is 7% wide, so a quantile interpolated inside it is within about 1%; the published code's bins of
# 0.01 up to 3 are finer only above 0.14 and cap large activations.
BINS_PER_OCTAVE = 10
LOW_OCTAVE, HIGH_OCTAVE = -7, 5
EDGES: npt.NDArray[np.float32] = np.exp2(
    np.linspace(LOW_OCTAVE, HIGH_OCTAVE, (HIGH_OCTAVE - LOW_OCTAVE) * BINS_PER_OCTAVE + 1)
).astype(np.float32)
BIN_COUNT = len(EDGES) + 1
_FIELDS = ("active", "histogram", "largest")  # arrays of a saved file
_SPREAD_FIELDS = ("active_squared", "active_tokens")


@dataclass(frozen=True)
class Spread:
    """How much answers differ in how often a neuron fires: what the error of a probability needs.

    Tokens of one answer are alike, so the answer is the unit. All sums are integers and exact.

    Attributes:
        answers: number of answers with at least one token.
        tokens_squared: sum over answers of their tokens, squared.
        active_squared: ``[layers, width]`` int64, sum over answers of their active tokens, squared.
        active_tokens: ``[layers, width]`` int64, sum over answers of active tokens times tokens.
    """

    answers: int
    tokens_squared: int
    active_squared: npt.NDArray[np.int64]
    active_tokens: npt.NDArray[np.int64]

    @classmethod
    def of_answers(cls, active: npt.NDArray[np.integer], tokens: npt.NDArray[np.integer]) -> Spread:
        """Of answers with ``active`` ``[answers, layers, width]`` of ``tokens`` ``[answers]``."""
        counts, lengths = active.astype(np.int64), tokens.astype(np.int64)
        return cls(
            int((lengths > 0).sum()),
            int((lengths**2).sum()),
            (counts**2).sum(0),
            (counts * lengths[:, None, None]).sum(0),
        )

    def __add__(self, other: Spread) -> Spread:
        return Spread(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ActivationStats:
    """How often and how strongly each neuron fired over a set of tokens.

    Attributes:
        tokens: number of response tokens seen.
        active: ``[layers, width]`` int64, tokens on which ``a > 0``.
        histogram: ``[layers, width, BIN_COUNT]`` int32, the positive activations in the bins of ``EDGES``.
        largest: ``[layers, width]`` float32, the largest activation seen; 0 where none was positive.
        spread: how much the answers differ.

    Adding two is associative and commutative and has :meth:`empty` as zero, so shards, resumed runs and workers
    all combine by ``+``.
    """

    tokens: int
    active: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int32]
    largest: npt.NDArray[np.float32]
    spread: Spread

    @classmethod
    def empty(cls, layers: int, width: int) -> ActivationStats:
        """The statistics of no tokens."""
        return cls(
            0,
            np.zeros((layers, width), np.int64),
            np.zeros((layers, width, BIN_COUNT), np.int32),
            np.zeros((layers, width), np.float32),
            Spread(0, 0, np.zeros((layers, width), np.int64), np.zeros((layers, width), np.int64)),
        )

    def __add__(self, other: ActivationStats) -> ActivationStats:
        return ActivationStats(
            self.tokens + other.tokens,
            self.active + other.active,
            self.histogram + other.histogram,
            np.maximum(self.largest, other.largest),
            self.spread + other.spread,
        )

    def probability(self) -> npt.NDArray[np.float64]:
        """``P(a > 0)`` of each neuron, ``[layers, width]`` (paper: activation probability).

        Raises:
            ProfileError: no token was counted.
        """
        if self.tokens == 0:
            raise ProfileError("no response token was counted: the model answered every question with nothing")
        return self.active / self.tokens

    def probability_variance(self) -> npt.NDArray[np.float64]:
        """Squared standard error of :meth:`probability`, ``[layers, width]``, for answers drawn at random.

        The variance of a ratio of sums over answers (linearised, Cochran, Sampling Techniques, 6.4): with active
        tokens ``a`` and tokens ``t`` of ``n`` answers, ``n / (n - 1) * sum (a - p t)^2 / (sum t)^2``. Infinite for
        fewer than two answers.
        """
        spread, p = self.spread, self.probability()
        if spread.answers < 2:
            return np.full(p.shape, np.inf)
        squares = spread.active_squared - 2 * p * spread.active_tokens + p**2 * spread.tokens_squared
        return np.maximum(squares, 0) / self.tokens**2 * spread.answers / (spread.answers - 1)

    def quantile(self, q: float) -> npt.NDArray[np.float64]:
        """The ``q`` quantile of each neuron's activation over all tokens, ``[layers, width]``, 0 where negative.

        Interpolated geometrically inside a bin (linearly in the lowest), so exact up to the bin's width.
        """
        rank = q * self.tokens - (self.tokens - self.active)  # how many positive values lie below it
        cumulative = np.cumsum(self.histogram, axis=-1)
        index = np.minimum((cumulative < rank[..., None]).sum(axis=-1), BIN_COUNT - 1)
        within = np.take_along_axis(self.histogram, index[..., None], -1)[..., 0]
        before = np.take_along_axis(cumulative, index[..., None], -1)[..., 0] - within
        fraction = np.clip((rank - before) / np.maximum(within, 1), 0.0, 1.0)
        edges = EDGES.astype(np.float64)
        low = np.concatenate([[0.0], edges])[index]
        high = np.minimum(np.concatenate([edges, [np.inf]])[index], self.largest)
        high = np.maximum(high, low)
        geometric = np.where(low > 0, low, 1.0) * (high / np.where(low > 0, low, 1.0)) ** fraction
        value = np.where(low > 0, geometric, high * fraction)
        return np.where(rank > 0, value, 0.0)


def _arrays(one: ActivationStats) -> dict[str, npt.NDArray[np.generic]]:
    parts = {field: getattr(one, field) for field in _FIELDS}
    return parts | {field: getattr(one.spread, field) for field in _SPREAD_FIELDS}


def save_stats(path: Path, stats: dict[str, ActivationStats], progress: dict[str, object]) -> None:
    """Write named statistics and a JSON-able progress record to one safetensors file, atomically."""
    from safetensors.numpy import save

    tensors = {f"{name}.{field}": array for name, one in stats.items() for field, array in _arrays(one).items()}
    sizes = {name: [one.tokens, one.spread.answers, one.spread.tokens_squared] for name, one in stats.items()}
    record = {"sizes": sizes, "progress": progress}
    with atomic_output(path, force=True) as temporary:
        # written by us, not by the library, so that a full disk is an OSError like everywhere else
        temporary.write_bytes(save(tensors, metadata={"npti": json.dumps(record)}))


def load_stats(path: Path) -> tuple[dict[str, ActivationStats], dict[str, object]]:
    """Read what :func:`save_stats` wrote.

    Raises:
        ProfileError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            record = json.loads(tensors.metadata()["npti"])
            stats = {}
            for name, (tokens, answers, squared) in record["sizes"].items():
                read = {field: tensors.get_tensor(f"{name}.{field}") for field in (*_FIELDS, *_SPREAD_FIELDS)}
                spread = Spread(int(answers), int(squared), *(read[field] for field in _SPREAD_FIELDS))
                active, histogram, largest = (read[field] for field in _FIELDS)
                stats[name] = ActivationStats(int(tokens), active, histogram, largest, spread)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: damaged statistics; delete the file and run again") from error
    return stats, record["progress"]
