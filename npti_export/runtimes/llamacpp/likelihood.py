"""How likely a model finds given answers: many short sequences at once, what they share computed once.

Sorted by their tokens, sequences form a tree in which the ones that share a beginning are neighbours. A shared token is
one row of the batch that belongs to all of them (llama.cpp allows that, and its attention lets every sequence see it),
so a question with four options is computed once, and so is a persona in front of many questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.context import MAX_SEQUENCES, Context

_LOGITS_BYTES = 256 << 20  # of one batch: bounds memory where the vocabulary is large
_SOFTMAX_BYTES = 1 << 20  # logits that are normalised at once: stays in a core's cache

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Load:
    """Sequences that are in the cache together.

    Attributes:
        members: indices of the exchanges, in the order of the tree.
        kept: for each, how many first tokens it has from the last member of the load before.
        fresh: for each, where the rows of its own begin; what is before, it shares with ``kept`` or its predecessor.
        rows: how many tokens are computed.
    """

    members: list[int]
    kept: list[int]
    fresh: list[int]
    rows: int

    @property
    def cells(self) -> int:
        """Room that it takes, with what it has from the load before."""
        return max(self.kept) + self.rows


def plan(exchanges: Sequence[Exchange], batch: int, limit: int) -> list[Load]:
    """Loads of about a batch each: a sequence that is longer makes one by itself.

    Args:
        exchanges: none without a prompt or a response.
        batch: tokens that are computed at once.
        limit: cells of the cache, 0 for no limit; the longest sequence fits in.
    """
    fed = [exchange.tokens[:-1] for exchange in exchanges]
    order = sorted(range(len(fed)), key=fed.__getitem__)
    common = [0, *(_common(fed[a], fed[b]) for a, b in pairwise(order))]
    loads: list[Load] = []
    start = 0
    while start < len(order):
        load, start = _load(exchanges, order, common, start, batch, limit)
        loads.append(load)
    return loads


def _load(
    exchanges: Sequence[Exchange], order: list[int], common: list[int], start: int, batch: int, limit: int
) -> tuple[Load, int]:
    """The load that begins with the ``start``-th sequence of the order, and where the next one begins."""
    # A response's probabilities come from rows of this load, so what is kept ends before any prompt's last token.
    kept = min(common[start], len(exchanges[order[start]].prompt) - 1)
    load = Load([], [], [], 0)
    shared, rows = kept, 0
    at = start
    while at < len(order) and len(load.members) < MAX_SEQUENCES - 1:
        exchange = exchanges[order[at]]
        if at > start:
            shared = min(shared, common[at])
        if len(exchange.prompt) - 1 < shared:  # only where one prompt is the beginning of another's answer
            break
        fresh = shared if at == start else common[at]
        added = len(exchange.tokens) - 1 - fresh
        if load.members and (rows + added > batch or (limit and kept + rows + added > limit)):
            break
        load.members.append(order[at])
        load.kept.append(shared)
        load.fresh.append(fresh)
        rows += added
        at += 1
    return Load(load.members, load.kept, load.fresh, rows), at


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class _Rows:
    """The rows of a load: what :meth:`Context.decode_piece` takes, and what is read from their logits.

    ``asked[i]`` is the row, ``targets[i]`` the token whose probability is wanted there, ``owners[i]`` the member.
    """

    tokens: Integers
    positions: Integers
    first: Integers
    counts: Integers
    wanted: Integers
    asked: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]


def _rows_of(load: Load, exchanges: Sequence[Exchange]) -> _Rows:
    tokens: list[int] = []
    positions: list[int] = []
    first: list[int] = []
    asked, targets, owners = (list[npt.NDArray[np.int64]]() for _ in range(3))
    counts = np.zeros(load.rows, np.int32)
    path = np.zeros(0, np.int64)  # of the member at hand: the row of each position; -1 if it is kept
    for member, index in enumerate(load.members):
        exchange, fresh = exchanges[index], load.fresh[member]
        whole = exchange.tokens
        end, begin = len(whole) - 1, len(tokens)
        tokens += whole[fresh:end]
        positions += range(fresh, end)
        first += [member] * (end - fresh)
        shared = path[:fresh] if member else np.full(fresh, -1, np.int64)
        path = np.concatenate([shared, np.arange(begin, len(tokens), dtype=np.int64)])
        counts[path[path >= 0]] += 1
        asked.append(path[len(exchange.prompt) - 1 :])
        targets.append(np.array(exchange.response, np.int64))
        owners.append(np.full(len(exchange.response), member, np.int64))
    rows = np.concatenate(asked)
    wanted = np.zeros(load.rows, np.int32)
    wanted[rows] = 1
    columns = (np.array(tokens, np.int32), np.array(positions, np.int32), np.array(first, np.int32))
    return _Rows(*columns, counts, wanted, rows, np.concatenate(targets), np.concatenate(owners))


def log_likelihoods(context: Context, exchanges: Sequence[Exchange], loads: Sequence[Load]) -> list[float]:
    """Mean log-likelihood per token (nats) of each response after its prompt.

    Args:
        context: with room for the largest load, and a sequence more than the one with most members.
        exchanges: what :func:`plan` made the loads of.
        loads: in their order.

    Raises:
        ModelError: llama.cpp fails, or its logits are not numbers.
    """
    result = np.zeros(len(exchanges))
    context.clear()
    trunk, last = context.sequences - 1, 0
    for load in loads:
        _carry_over(context, load, last, trunk)
        last = len(load.members) - 1
        rows = _rows_of(load, exchanges)
        found = np.zeros(len(rows.asked))
        for piece in _pieces(rows, context):
            logits = context.decode_piece(*(column[piece] for column in _columns(rows)))
            inside = (rows.asked >= piece.start) & (rows.asked < piece.stop)
            numbers = np.cumsum(rows.wanted[piece]) - 1  # of a row among the wanted ones
            asked = numbers[rows.asked[inside] - piece.start]
            found[inside] = logits[asked, rows.targets[inside]] - log_normalisers(logits)[asked]
        if not np.isfinite(found).all():
            raise ModelError(f"{context.model.path}: computes logits that are not numbers; get the file again")
        sums = np.bincount(rows.owners, found, len(load.members))
        result[load.members] = sums / np.bincount(rows.owners, minlength=len(load.members))
    return [float(one) for one in result]


def _carry_over(context: Context, load: Load, last: int, trunk: int) -> None:
    """Empty the cache, but for what the load shares with the last member of the one before."""
    if not max(load.kept):
        context.clear()
        return
    context.share(last, trunk, max(load.kept))
    for sequence in range(trunk):
        context.forget(sequence)
    for member, length in enumerate(load.kept):
        if length:
            context.share(trunk, member, length)
    context.forget(trunk)


def _pieces(rows: _Rows, context: Context) -> Iterator[slice]:
    most = max(1, _LOGITS_BYTES // (4 * context.model.vocabulary_size))
    begin, flagged = 0, 0
    for at, flag in enumerate(rows.wanted.tolist()):
        if at - begin == context.batch or flagged + flag > most:
            yield slice(begin, at)
            begin, flagged = at, 0
        flagged += flag
    yield slice(begin, len(rows.wanted))


def _columns(rows: _Rows) -> tuple[Integers, Integers, Integers, Integers, Integers]:
    return rows.tokens, rows.positions, rows.first, rows.counts, rows.wanted


def log_normalisers(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """``log Σ exp`` of each row of ``[rows, vocabulary]``: exponentials in float32, sums in float64."""
    step = max(1, _SOFTMAX_BYTES // (4 * logits.shape[1]))
    result = np.empty(len(logits))
    room = np.empty((step, logits.shape[1]), np.float32)
    for start in range(0, len(logits), step):
        piece = logits[start : start + step]
        most = piece.max(1)
        shifted = np.subtract(piece, most[:, None], out=room[: len(piece)])
        np.exp(shifted, out=shifted)
        result[start : start + len(piece)] = most + np.log(shifted.sum(1, dtype=np.float64))
    return result
