"""Means with intervals: every figure of an evaluation is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.document import ContrastPart, Estimate, Interval

RESAMPLES = 2000
_LEAST = 5  # questions that a figure which is no mean is resampled over
_CONFIDENCE = 0.95


def estimate(values: npt.ArrayLike, *, seed: int = 0, groups: Sequence[int] | None = None) -> Estimate:
    """Mean and 95% interval, by a seeded bootstrap over what was asked (BCa; the unit is the question).

    Where all values are equal, or there is one, the interval is the mean itself.

    Args:
        values: ``[n]``, one a question; for differences, paired ones.
        seed: of the resampling.
        groups: ``[n]``, of which group each value is, where values of a group have more in common than the question: a
            random direction, say. Then the interval is over groups, by Student's t: they are too few for a bootstrap.
    """
    from scipy.stats import bootstrap

    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return Estimate(mean=0.0, low=0.0, high=0.0, n=0)
    if groups is not None and len(set(groups)) > 1:
        return _over_groups(array, np.asarray(groups))
    mean = float(array.mean())
    if array.size < 2 or np.ptp(array) == 0:
        return Estimate(mean=mean, low=mean, high=mean, n=array.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate acceleration: answered by the percentile interval below
        found = bootstrap(
            (array,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=_CONFIDENCE,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    if not (np.isfinite(low) and np.isfinite(high)):
        low, high = _percentile(array, seed)
    return Estimate(mean=mean, low=low, high=high, n=array.size)


def _over_groups(array: npt.NDArray[np.float64], groups: npt.NDArray[np.int_]) -> Estimate:
    """The mean of all values; its standard error from the spread of the groups' sums, as survey statistics has it."""
    from scipy.stats import t

    mean = float(array.mean())
    sums = np.array([(array[groups == one] - mean).sum() for one in np.unique(groups)])
    count = len(sums)
    error = float(np.sqrt((sums**2).sum() * count / (count - 1))) / array.size
    reach = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * error
    return Estimate(mean=mean, low=mean - reach, high=mean + reach, n=array.size)


def resampled(
    statistic: Callable[[npt.NDArray[np.int64]], float], questions: Sequence[Hashable], *, seed: int = 0
) -> Interval | None:
    """95% interval of a figure that is no mean, by a seeded bootstrap over questions (percentiles).

    Args:
        statistic: the figure, of the answers at the places ``[n]`` that it is given.
        questions: which one each answer is to; those to one question are drawn together.
        seed: of the resampling.

    Returns:
        None where there are too few questions to draw from.
    """
    places: dict[Hashable, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question, []).append(place)
    if len(places) < _LEAST:
        return None
    groups = [np.array(one, np.int64) for one in places.values()]
    drawn = np.random.default_rng(seed).integers(0, len(groups), (RESAMPLES // 2, len(groups)))
    found = [statistic(np.concatenate([groups[at] for at in row])) for row in drawn]
    low, high = np.quantile(found, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def share(part: ContrastPart) -> str:
    """The gain as a share of the better prompt's, with its interval; empty where no prompt gained anything."""
    if part.share_of_prompt is None:
        return ""
    text = f"{part.share_of_prompt:.0%}"
    return (
        text
        if part.share_interval is None
        else f"{text} ({part.share_interval[0]:.0%} to {part.share_interval[1]:.0%})"
    )


def transformed(value: Estimate, function: Callable[[float], float]) -> Estimate:
    """A monotone function of a mean and of the ends of its interval."""
    low, high = sorted((function(value.low), function(value.high)))
    return Estimate(mean=function(value.mean), low=low, high=high, n=value.n)


def _percentile(array: npt.NDArray[np.float64], seed: int) -> tuple[float, float]:
    picks = np.random.default_rng(seed).integers(0, array.size, (RESAMPLES, array.size))
    low, high = np.quantile(array[picks].mean(1), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def interval(value: Estimate, digits: int = 3) -> str:
    """A mean with its interval, signed."""
    return f"{value.mean:+.{digits}f} ({value.low:+.{digits}f} to {value.high:+.{digits}f})"
