"""Where the units of a layer go among its new columns, so that quantising the columns costs the rule least.

Two things matter, and neither costs anything at run time:

- **The units of a clamp must be rounded alike.** Their sum is small only because large terms cancel (``alpha * bias``
  is up to 0.37 where the clamped activation is at most 0.28), so a column that comes out differently in each copy does
  more harm than one that is wrong in all of them. Values that are equal and share a scale are rounded equally, except
  in the codebook types (IQ1, IQ2, IQ3), which encode eight columns at once: there the same eight neurons must stand
  together in each copy.
- **Padding can work.** The units that fill up a block are computed whatever they hold. Here they repeat other units
  with what quantising lost of their columns, see :attr:`LayerProgram.corrects`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from npti_export.compiler.program import Indices, LayerProgram

_CODEWORD = 8  # columns of a codebook entry in all IQ1, IQ2 and IQ3 types (four in IQ3, twice over); ggml-common.h
_SCALED = 32  # columns under one scale in them, or a multiple of it


def arrange(layer: LayerProgram, units: int, granule: int, codebook: bool, *, correct: bool = True) -> LayerProgram:
    """The same program in another order, with corrections as far as there is room, ``units`` in all.

    Dense units come last, in blocks of their own where there is room: their columns are of another size.

    Args:
        layer: of at most ``units`` units.
        units: in all, a multiple of a block.
        granule: columns that share a scale. Corrections, which are small, start at a multiple of it.
        codebook: whether the type of the columns encodes eight at once.
        correct: whether there are to be corrections at all.
    """
    if not layer.units:
        return layer.padded(units)
    dense = layer.units - layer.copied
    least = -(-dense // granule) * granule
    if layer.copied + least > units:
        return layer.padded(units)
    chunks = _codeword_chunks(layer) if codebook else _plain_chunks(layer)
    if sum(map(len, chunks)) > units - least:
        chunks = _plain_chunks(layer)
    room = units - least
    if dense and correct:  # what the others cannot use for corrections is left for those of the dense ones
        room = min(room, 2 * -(-sum(map(len, chunks)) // granule) * granule)
    copied = _Places.of(chunks, room, granule, correct=correct)
    own = _Places.of(list(np.arange(dense)[:, None]), units - room, granule, correct=correct)
    result = layer.picked(copied.units, copied.works)
    if layer.dense is not None:
        result = replace(result, dense=layer.dense.picked(own.units, own.works))
    corrects = np.concatenate([copied.corrects, np.where(own.corrects < 0, -1, own.corrects + room)])
    return result if (corrects < 0).all() else replace(result, corrects=corrects)


def without_idle_blocks(layer: LayerProgram, block: int) -> LayerProgram:
    """The same program without the blocks of columns in which no unit works; each block is quantised by itself.

    Args:
        layer: padded to whole blocks.
        block: columns of a block.
    """
    works = layer.up_scale != 0
    if layer.dense is not None:
        works = np.concatenate([works, layer.dense.up.any(axis=1)])

    def whole(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return np.repeat(chosen.reshape(-1, block).any(axis=1), block)

    kept, corrects = whole(works), layer.corrects
    if corrects is not None:
        kept[corrects[kept & (corrects >= 0)]] = True
        kept = whole(kept)
        moved = np.cumsum(kept) - 1
        corrects = np.where(corrects < 0, -1, moved[corrects])[kept]
    copied = np.flatnonzero(kept[: layer.copied])
    result = layer.picked(copied, np.ones(len(copied), np.bool_))
    if layer.dense is not None:
        dense = np.flatnonzero(kept[layer.copied :])
        result = replace(result, dense=layer.dense.picked(dense, np.ones(len(dense), np.bool_)))
    return replace(result, corrects=corrects)


@dataclass(frozen=True)
class _Places:
    """Which unit stands where, ``[places]`` int64, whether it works there, and which place it corrects or -1."""

    units: Indices
    works: npt.NDArray[np.bool_]
    corrects: Indices

    @classmethod
    def of(cls, chunks: list[Indices], room: int, granule: int, *, correct: bool) -> _Places:
        """``chunks`` one after another in ``room`` places, and over again in what is left; all idle if there is none.

        A chunk has unit numbers, or -1 - number where a unit is idle.
        """
        placed = np.concatenate(chunks) if chunks else np.full(min(room, 1), -1)
        start = -(-len(placed) // granule) * granule
        ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        again = int(max(ends[start + ends <= room], default=0)) if correct else 0
        gap = np.full((start if again else room) - len(placed), _idle(placed[-1]) if room else 0)
        # What is left over takes residual columns, too: large ones beside working ones would take their scale away.
        tail = np.full(room - start - again, again - 1) if again else np.zeros(0, np.int64)
        places = np.concatenate([placed, gap, placed[:again], _idle(placed[tail])]).astype(np.int64)
        corrects = np.full(room, -1)
        if again:
            corrects[start:] = np.concatenate([np.arange(again), tail])
        return cls(np.where(places < 0, -1 - places, places), places >= 0, corrects.astype(np.int64))


def _plain_chunks(layer: LayerProgram) -> list[Indices]:
    """The copies of each clamp, then the shifts; four copies never straddle a block that way."""
    first = layer.copied - layer.copies * len(layer.off)
    clamps = np.arange(first, layer.copied).reshape(len(layer.off) if layer.copies else 0, layer.copies)
    return [*clamps, *np.arange(first)[:, None]]


def _codeword_chunks(layer: LayerProgram) -> list[Indices]:
    """Clamps in groups, copy by copy, each group filling whole scales; then the shifts, likewise."""
    clamps = len(layer.off) if layer.copies else 0
    first = layer.copied - layer.copies * clamps
    together = _SCALED // np.gcd(layer.copies, _SCALED // _CODEWORD)
    chunks = []
    for begin in range(0, clamps, together):
        neurons = np.arange(begin, min(begin + together, clamps))
        runs = [_filled(first + neurons * layer.copies + copy, together) for copy in range(layer.copies)]
        chunks.append(np.concatenate(runs))
    shifts = [np.arange(begin, min(begin + _SCALED, first)) for begin in range(0, first, _SCALED)]
    return chunks + [_filled(one, _SCALED) for one in shifts]


def _filled(units: Indices, length: int) -> Indices:
    """``units`` and then its last one, idle, up to a length."""
    return np.concatenate([units, np.full(length - len(units), _idle(units[-1]))])


def _idle(unit: Indices) -> Indices:
    """The code of a unit that keeps its place and column but does nothing."""
    return np.minimum(unit, -1 - unit)
