"""How far two judges agree on the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.document import Agreement
from npti_export.evaluate.estimate import resampled
from npti_export.evaluate.judge.prompts import RATINGS, What

_LEAST = 2  # answers that both rated; of one there is nothing to compare


def agreement(
    judges: tuple[str, str],
    what: What,
    one: npt.NDArray[np.float64],
    other: npt.NDArray[np.float64],
    questions: Sequence[str],
    *,
    seed: int = 0,
) -> Agreement | None:
    """Spearman's rank correlation of the ratings, and Cohen's kappa of the rounded ones.

    Args:
        judges: their names.
        what: was rated.
        one: ``[answers]`` ratings of the first, NaN where there is none.
        other: likewise of the second.
        questions: ``[answers]``, what each answers: intervals are over these.
        seed: of the intervals.

    Returns:
        None where fewer than two answers were rated by both. The correlation is 0 where a judge rates all alike.
    """
    both = ~(np.isnan(one) | np.isnan(other))
    first, second = one[both], other[both]
    if len(first) < _LEAST:
        return None
    asked = [question for question, rated in zip(questions, both, strict=True) if rated]

    def kappa(some: npt.NDArray[np.int64]) -> float:
        return quadratic_kappa(rounded(first[some]), rounded(second[some]))

    def correlation(some: npt.NDArray[np.int64]) -> float:
        return _spearman(first[some], second[some])

    every = np.arange(len(first))
    return Agreement(
        judges=judges,
        what=what,
        spearman=correlation(every),
        kappa=kappa(every),
        n=len(first),
        spearman_interval=resampled(correlation, asked, seed=seed),
        kappa_interval=resampled(kappa, asked, seed=seed),
    )


def _spearman(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic) if np.ptp(one) > 0 and np.ptp(other) > 0 else 0.0


def rounded(ratings: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The nearest whole ratings, halves upwards."""
    return np.floor(ratings + 0.5).astype(np.int64)


def quadratic_kappa(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968), ``1 - Σ w·observed / Σ w·expected`` with ``w = (i - j)²``.

    1 where both give every answer the same one rating, of which no disagreement can be expected.

    Args:
        one: ``[answers]`` ratings 1 to 5, at least one.
        other: likewise.
    """
    size = len(RATINGS)
    observed = np.zeros((size, size))
    np.add.at(observed, (one - 1, other - 1), 1 / len(one))
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = np.subtract.outer(np.arange(size), np.arange(size)) ** 2
    by_chance = float((weights * expected).sum())
    return 1 - float((weights * observed).sum()) / by_chance if by_chance else 1.0
