"""Mergeable per-neuron statistics of gate activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from npti_export.checked import encode_checked, load_checked, save_checked
from npti_export.errors import DamagedError, ProfileError

# Positive activations go into geometric bins: ten an octave from 2^-6 to 2^5, two an octave from there to 2^10, with
# one bin below (from 0) and one above. One of ten is 7% wide, so a quantile interpolated inside it is within about 1%;
# the published code's bins of 0.01 up to 3 are finer only above 0.14 and cap large activations. Together they are as
# many as let the statistics of an 8B model stay under 500 MB.
EDGES: npt.NDArray[np.float32] = np.exp2(np.concatenate([np.arange(-60, 50) / 10, np.arange(10, 21) / 2])).astype(
    np.float32
)
BIN_COUNT = len(EDGES) + 1
_FIELDS = ("active", "histogram", "largest")  # arrays of a saved file
_OPTIONAL = ("routed", "product")
_SPREAD_FIELDS = ("products", "mixed")
_PIECE = 1024  # neurons whose answers' counts are multiplied at once: what that takes stays in a processor's cache


@dataclass(frozen=True)
class PairSpread:
    """How much questions differ in what their two answers make a neuron do: what the error of ``delta`` needs.

    Tokens of one answer are alike, and so are the two answers to one question, so the question is the unit. With
    ``a`` active tokens of ``t`` in an answer, all sums are over questions, of integers, and exact.

    Attributes:
        pairs: number of questions.
        lengths: sums of ``t+ t+``, ``t- t-`` and ``t+ t-``.
        products: ``[3, layers, width]`` int64, sums of ``a+ a+``, ``a- a-`` and ``a+ a-``.
        mixed: ``[4, layers, width]`` int64, sums of ``a+ t+``, ``a- t-``, ``a+ t-`` and ``a- t+``.
    """

    pairs: int
    lengths: tuple[int, int, int]
    products: npt.NDArray[np.int64]
    mixed: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, layers: int, width: int) -> PairSpread:
        """Of no questions."""
        return cls(0, (0, 0, 0), np.zeros((3, layers, width), np.int64), np.zeros((4, layers, width), np.int64))

    @classmethod
    def of_answers(cls, plus: AnswerCounts, minus: AnswerCounts) -> PairSpread:
        """Of answers in the order of their questions."""
        s, t = plus.tokens.astype(np.int64), minus.tokens.astype(np.int64)
        answers, layers, width = plus.active.shape
        # every sum is of products of two counts: int32 holds it up to 4,095 tokens in each of 128 answers
        most = max(int(one.max(initial=0)) for one in (plus.active, minus.active, s, t))
        kind: type[np.signedinteger[Any]] = np.int32 if answers * most**2 < 2**31 else np.int64
        own, others = s.astype(kind), t.astype(kind)
        spread = cls.empty(layers, width)
        for layer in range(layers):
            for start in range(0, width, _PIECE):  # all answers at once are as large as the statistics of a trait
                piece = slice(start, start + _PIECE)
                a, b = (one.active[:, layer, piece].astype(kind) for one in (plus, minus))
                for place, (left, right) in enumerate(((a, a), (b, b), (a, b))):
                    spread.products[place, layer, piece] = np.einsum("ij,ij->j", left, right)
                for place, (tokens, active) in enumerate(((own, a), (others, b), (others, a), (own, b))):
                    spread.mixed[place, layer, piece] = np.einsum("i,ij->j", tokens, active)
        return cls(answers, (int(s @ s), int(t @ t), int(s @ t)), spread.products, spread.mixed)

    def __add__(self, other: PairSpread) -> PairSpread:
        first, second, third = (one + more for one, more in zip(self.lengths, other.lengths, strict=True))
        return PairSpread(
            self.pairs + other.pairs,
            (first, second, third),
            self.products + other.products,
            self.mixed + other.mixed,
        )

    def absorb(self, other: PairSpread) -> PairSpread:
        """See :meth:`ActivationStats.absorb`."""
        first, second, third = (one + more for one, more in zip(self.lengths, other.lengths, strict=True))
        products, mixed = _into(self.products, other.products), _into(self.mixed, other.mixed)
        return PairSpread(self.pairs + other.pairs, (first, second, third), products, mixed)

    def delta_variance(self, plus: ActivationStats, minus: ActivationStats) -> npt.NDArray[np.float64]:
        """Squared standard error of ``delta = p+ - p-``, ``[layers, width]``, for questions drawn at random.

        The variance of a difference of ratios, linearised (Cochran, Sampling Techniques, chapter 6): with the residual
        ``e = (a+ - p+ t+) / T+ - (a- - p- t-) / T-`` of each of ``n`` questions it is ``n / (n - 1) * sum e^2``.
        Infinite for fewer than two questions.
        """
        rates, others = plus.probability(), minus.probability()
        variance = np.full(rates.shape, np.inf)
        if self.pairs < 2:
            return variance
        for layer, (p, q) in enumerate(zip(rates, others, strict=True)):  # what it takes stays small
            products, mixed = self.products[:, layer], self.mixed[:, layer]
            own = products[0] - 2 * p * mixed[0] + p * p * self.lengths[0]
            other = products[1] - 2 * q * mixed[1] + q * q * self.lengths[1]
            both = products[2] - q * mixed[2] - p * mixed[3] + p * q * self.lengths[2]
            squares = own / plus.tokens**2 + other / minus.tokens**2 - 2 * both / (plus.tokens * minus.tokens)
            variance[layer] = np.maximum(squares, 0) * self.pairs / (self.pairs - 1)
        return variance


@dataclass(frozen=True)
class AnswerCounts:
    """What single answers did.

    Attributes:
        active: ``[answers, layers, width]``, tokens on which ``a > 0``: int16 where no answer is longer than it holds,
            as there are as many counts in a batch as in all statistics of a trait; else int32.
        tokens: ``[answers]`` int64, tokens that were counted.
    """

    active: npt.NDArray[np.signedinteger[Any]]
    tokens: npt.NDArray[np.int64]

    def __getitem__(self, some: slice) -> AnswerCounts:
        return AnswerCounts(self.active[some], self.tokens[some])

    @staticmethod
    def kind(longest: int) -> type[np.signedinteger[Any]]:
        """What :attr:`active` is of where no answer has more tokens than these."""
        return np.int16 if longest <= np.iinfo(np.int16).max else np.int32


@dataclass(frozen=True)
class ActivationStats:
    """How often and how strongly each neuron fired over a set of tokens.

    Attributes:
        tokens: number of response tokens seen.
        active: ``[layers, width]`` int64, tokens on which ``a > 0``.
        histogram: ``[layers, width, BIN_COUNT]`` int32, the positive activations in the bins of ``EDGES``.
        largest: ``[layers, width]`` float32, the largest activation seen; 0 where none was positive.
        routed: in a mixture of experts ``[layers, experts]`` int64, tokens that were sent to each expert; None in a
            dense model, where every neuron sees every token. A neuron whose expert is not asked is not active.
        product: ``[2, layers, width]`` float64, sum and sum of squares of the down projection's input ``a ⊙ up``, which
            DPN-LE (arXiv 2604.27929) and mean shifts read; None in a mixture of experts, where nobody counts it.

    Adding two is associative and commutative and has :meth:`empty` as zero, so shards, resumed runs and workers
    all combine by ``+``.
    """

    tokens: int
    active: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int32]
    largest: npt.NDArray[np.float32]
    routed: npt.NDArray[np.int64] | None = None
    product: npt.NDArray[np.float64] | None = None

    @classmethod
    def empty(cls, layers: int, width: int) -> ActivationStats:
        """The statistics of no tokens."""
        return cls(
            0,
            np.zeros((layers, width), np.int64),
            np.zeros((layers, width, BIN_COUNT), np.int32),
            np.zeros((layers, width), np.float32),
        )

    def __add__(self, other: ActivationStats) -> ActivationStats:
        return ActivationStats(
            self.tokens + other.tokens,
            self.active + other.active,
            self.histogram + other.histogram,
            np.maximum(self.largest, other.largest),
            _added(self.routed, other.routed),
            _added(self.product, other.product),
        )

    def absorb(self, other: ActivationStats) -> ActivationStats:
        """``self + other`` in the memory of ``self``, which must not be used afterwards."""
        return ActivationStats(
            self.tokens + other.tokens,
            _into(self.active, other.active),
            _into(self.histogram, other.histogram),
            _into(self.largest, other.largest, np.maximum),
            _added(self.routed, other.routed),
            _added(self.product, other.product, _into),
        )

    def moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and variance of each down projection's input, ``[layers, width]`` each.

        Raises:
            ProfileError: they were not counted, or there was no token.
        """
        if self.product is None or self.tokens == 0:
            raise ProfileError("the inputs of the down projections were not counted")
        mean, square = self.product / self.tokens
        return mean, np.maximum(square - mean * mean, 0)

    @property
    def seen(self) -> npt.NDArray[np.int64] | int:
        """Tokens for which a neuron's activation was computed: one number, or ``[layers, width]``."""
        if self.routed is None:
            return self.tokens
        return np.repeat(self.routed, self.active.shape[1] // self.routed.shape[1], axis=1)

    @property
    def finite(self) -> bool:
        """Whether all that was seen were numbers: one that was not stays in ``largest`` or ``product``."""
        return all(bool(np.isfinite(one).all()) for one in (self.largest, self.product) if one is not None)

    def probability(self) -> npt.NDArray[np.float64]:
        """``P(a > 0)`` of each neuron, ``[layers, width]`` (paper: activation probability).

        Raises:
            ProfileError: no token was counted.
        """
        if self.tokens == 0:
            raise ProfileError("no response token was counted: the model answered every question with nothing")
        return self.active / self.tokens

    def quantile(self, q: float) -> npt.NDArray[np.float64]:
        """The ``q`` quantile of each neuron's activation, ``[layers, width]``, 0 where negative.

        Over all tokens for which it was computed: those of an expert that is rarely asked must not count as nothing.
        Interpolated geometrically inside a bin (linearly in the lowest), so exact up to the bin's width.
        """
        rank = q * self.seen - (self.seen - self.active)  # how many positive values lie below it
        # layer by layer: what is cumulated takes twice the room of the histogram
        layers = zip(rank, self.histogram, self.largest, strict=True)
        return np.stack([_layer_quantile(*layer) for layer in layers])


def _layer_quantile(
    rank: npt.NDArray[np.float64], histogram: npt.NDArray[np.int32], largest: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """See :meth:`ActivationStats.quantile`: ``[width]``."""
    cumulative = np.cumsum(histogram, axis=-1)
    index = np.minimum((cumulative < rank[..., None]).sum(axis=-1), BIN_COUNT - 1)
    within = np.take_along_axis(histogram, index[..., None], -1)[..., 0]
    before = np.take_along_axis(cumulative, index[..., None], -1)[..., 0] - within
    fraction = np.clip((rank - before) / np.maximum(within, 1), 0.0, 1.0)
    edges = EDGES.astype(np.float64)
    low = np.concatenate([[0.0], edges])[index]
    high = np.minimum(np.concatenate([edges, [np.inf]])[index], largest)
    high = np.maximum(high, low)
    geometric = np.where(low > 0, low, 1.0) * (high / np.where(low > 0, low, 1.0)) ** fraction
    value: npt.NDArray[np.float64] = np.where(low > 0, geometric, high * fraction)
    return np.where(rank > 0, value, 0.0)


Counted = TypeVar("Counted", npt.NDArray[np.int64], npt.NDArray[np.float64])


def _added(one: Counted | None, other: Counted | None, add: Callable[..., Any] = np.add) -> Counted | None:
    if one is None or other is None:  # nothing was counted yet, or the model is dense
        return one if other is None else other
    result: Counted = add(one, other)
    return result


def _into(one: npt.NDArray[Any], other: npt.NDArray[Any], add: np.ufunc = np.add) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = add(one, other, out=one if one.flags.writeable else None)
    return result


@dataclass(frozen=True)
class ContrastStats:
    """What both poles did on the same questions; combines by ``+`` like its parts."""

    plus: ActivationStats
    minus: ActivationStats
    spread: PairSpread

    @classmethod
    def empty(cls, layers: int, width: int) -> ContrastStats:
        """Of no questions."""
        plus, minus = (ActivationStats.empty(layers, width) for _ in range(2))
        return cls(plus, minus, PairSpread.empty(layers, width))

    def __add__(self, other: ContrastStats) -> ContrastStats:
        return ContrastStats(self.plus + other.plus, self.minus + other.minus, self.spread + other.spread)

    def absorb(self, other: ContrastStats) -> ContrastStats:
        """``self + other`` in the memory of ``self``, which must not be used afterwards: of a large model there is
        not room for three."""
        return ContrastStats(
            self.plus.absorb(other.plus), self.minus.absorb(other.minus), self.spread.absorb(other.spread)
        )

    def counts(self) -> ContrastStats:
        """Without histograms and sums, which are most of the bytes: what the forecast of the overlap needs."""
        plus, minus = (
            replace(
                one,  # no slices, which would keep all that they are of
                histogram=np.empty((*one.active.shape, 0), np.int32),
                largest=np.empty((0, one.active.shape[1]), np.float32),
                product=None,
            )
            for one in (self.plus, self.minus)
        )
        return ContrastStats(plus, minus, self.spread)


def save_stats(path: Path, stats: ContrastStats, progress: dict[str, object]) -> None:
    """Write statistics and a JSON-able progress record to one file, atomically, with its checksum.

    Counts are kept in the fewest bytes that hold them, in most runs half of what they take in memory or less.
    """
    save_checked(path, *_contents(stats, progress))


def encode_stats(stats: ContrastStats, progress: dict[str, object]) -> bytes:
    """What :func:`save_stats` writes."""
    return encode_checked(*_contents(stats, progress))


def _contents(
    stats: ContrastStats, progress: dict[str, object]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, object]]:
    poles = {"plus": stats.plus, "minus": stats.minus}
    tensors = {f"{name}.{field}": getattr(one, field) for name, one in poles.items() for field in _FIELDS}
    for field in _OPTIONAL:
        tensors |= {f"{name}.{field}": getattr(one, field) for name, one in poles.items() if _has(one, field)}
    tensors |= {f"spread.{field}": getattr(stats.spread, field) for field in _SPREAD_FIELDS}
    record: dict[str, object] = {
        "tokens": {name: one.tokens for name, one in poles.items()},
        "spread": [stats.spread.pairs, *stats.spread.lengths],
        "progress": progress,
    }
    return {name: _narrowed(values) for name, values in tensors.items()}, record


def _narrowed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if values.dtype.kind != "i":
        return values
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))  # counts are never negative


def _widened(values: npt.NDArray[Any], kind: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """Counts as they are computed with, whatever they were kept in."""
    if values.dtype.kind not in "ui":
        raise ValueError("counts that are no integers")
    return values.astype(kind, copy=False)


def load_stats(path: Path) -> tuple[ContrastStats, dict[str, object]]:
    """Read what :func:`save_stats` wrote.

    Raises:
        ProfileError: damaged: not byte for byte what was written.
    """
    try:
        tensors, record = load_checked(path)
        plus, minus = (_read_pole(tensors, name, int(record["tokens"][name])) for name in ("plus", "minus"))
        pairs, *lengths = map(int, record["spread"])
        products, mixed = (_widened(tensors[f"spread.{field}"], np.int64) for field in _SPREAD_FIELDS)
        spread = PairSpread(pairs, (lengths[0], lengths[1], lengths[2]), products, mixed)
        found, progress = ContrastStats(plus, minus, spread), record["progress"]
        _check_shapes(found)
        if not isinstance(progress, dict):
            raise TypeError
    except (DamagedError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ProfileError(f"{path}: damaged statistics; delete the file and run again") from error
    return found, progress


def _check_shapes(stats: ContrastStats) -> None:
    """Raise a ValueError unless all that was read fits together."""
    layers, width = stats.plus.active.shape
    for one in (stats.plus, stats.minus):
        wanted = {
            "active": ((layers, width), np.int64),
            "histogram": ((layers, width, BIN_COUNT), np.int32),
            "largest": ((layers, width), np.float32),
            "product": ((2, layers, width), np.float64),
        }
        for name, (shape, dtype) in wanted.items():
            array = getattr(one, name)
            if array is not None and (array.shape != shape or array.dtype != dtype or not np.isfinite(array).all()):
                raise ValueError(name)
        routed = one.routed
        if routed is not None and (routed.ndim != 2 or len(routed) != layers or width % max(1, routed.shape[1])):
            raise ValueError("routed")
        if one.tokens < 0 or (one.active < 0).any() or (one.histogram < 0).any():
            raise ValueError("a count is negative")
    for array, kinds in ((stats.spread.products, 3), (stats.spread.mixed, 4)):
        if array.shape != (kinds, layers, width) or array.dtype != np.int64:
            raise ValueError("spread")


def _read_pole(tensors: dict[str, npt.NDArray[Any]], name: str, tokens: int) -> ActivationStats:
    more = {field: tensors[f"{name}.{field}"] for field in _OPTIONAL if f"{name}.{field}" in tensors}
    if "routed" in more:
        more["routed"] = _widened(more["routed"], np.int64)
    active, histogram, largest = (tensors[f"{name}.{field}"] for field in _FIELDS)
    return ActivationStats(tokens, _widened(active, np.int64), _widened(histogram, np.int32), largest, **more)


def _has(stats: ActivationStats, field: str) -> bool:
    return getattr(stats, field) is not None
