"""Anytime identification: how well the neurons of a pole are known already, and when to stop asking."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npti_export.identify.select import qualifying
from npti_export.recipe import SelectSection
from npti_export.stats import ContrastStats
from npti_export.traits import SIGNS

_DRAWS = 12
_PIECE = 1 << 15  # neurons drawn at once: what that takes stays in a processor's cache


def expected_overlap(stats: ContrastStats, select: SelectSection, total: int) -> float:
    """How much the neurons selected now will agree with those selected once all questions are asked.

    The ``delta`` of the questions to come is drawn for every neuron, the selection made again from all, and the two
    sets compared; the mean of the Jaccard indices, of the pole where it is smaller. What is to come is not simply like
    what was seen: a neuron ranks high partly by luck. So its true ``delta``, in units of its own standard error, has a
    normal prior (empirical Bayes): its mean is that of all observed ones, as the answers of one pole may be longer or
    of another kind for all neurons alike, its variance what theirs exceeds 1 by.

    Args:
        stats: of the questions so far.
        select: how neurons are selected.
        total: number of questions that there are.

    Returns:
        0 to 1; 1 where nothing is left to ask. The draws are seeded: the same statistics give the same number.
    """
    asked = stats.spread.pairs
    rest = total - asked
    if rest <= 0:
        return 1.0
    delta = (stats.plus.probability() - stats.minus.probability()).ravel()
    squared_error = stats.spread.delta_variance(stats.plus, stats.minus).ravel()
    if not np.isfinite(squared_error).all():
        return 0.0
    known = squared_error > 0  # the others never changed between questions
    error = np.sqrt(squared_error)
    observed = np.divide(delta, error, out=np.zeros_like(delta), where=known)
    mean, variance = (observed[known].mean(), observed[known].var()) if known.any() else (0.0, 1.0)
    shrink = max(variance - 1, 1e-6) / max(variance, 1 + 1e-6)
    expected = np.where(known, error * (mean + shrink * (observed - mean)), delta)
    deviation = np.sqrt(shrink * squared_error + squared_error * asked / rest)
    now = {sign: _chosen(delta, sign, select) for sign in SIGNS}
    found: dict[str, list[float]] = {sign: [] for sign in SIGNS}
    random, seen, final = np.random.default_rng(0), asked * delta, np.empty_like(delta)
    for _ in range(_DRAWS):
        for start in range(0, len(final), _PIECE):  # (asked * delta + rest * coming) / total
            some = slice(start, start + _PIECE)
            coming = random.standard_normal(out=final[some])
            coming *= deviation[some]
            coming += expected[some]
            coming *= rest
            coming += seen[some]
            coming /= total
        for sign in SIGNS:
            found[sign].append(jaccard(now[sign], _chosen(final, sign, select)))
    return min(float(np.mean(values)) for values in found.values())


def jaccard(left: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_]) -> float:
    """Common elements over all elements of two sets given as masks; 1 for two empty ones."""
    both = np.count_nonzero(left & right)
    union = np.count_nonzero(left) + np.count_nonzero(right) - both
    return both / union if union else 1.0


def _chosen(delta: npt.NDArray[np.float64], sign: str, select: SelectSection) -> npt.NDArray[np.bool_]:
    return qualifying(delta if sign == "+" else -delta, select.threshold, select.at_least, select.at_most)
