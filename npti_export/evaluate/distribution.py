"""How strongly a trait's neurons fire under personas of its two poles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.document import Distribution
from npti_export.identify.select import pole_neurons
from npti_export.profile import NeuronProfile
from npti_export.recipe import Recipe
from npti_export.rule_io import SavedRule
from npti_export.stats import EDGES, ActivationStats, ContrastStats
from npti_export.traits import Sign, parse_recorded

_BINS = 24  # of the positive activations
_SHOWN = 0.998  # of all activations; the few above fall into the last bin
_LEAST = -0.28  # of SiLU, rounded; GELU's is -0.17


def distribution(stats: ContrastStats, neurons: npt.NDArray[np.bool_], sign: Sign) -> Distribution | None:
    """Activations of some neurons, all together, under both poles; None where there is nothing to show.

    The first bin holds what is not positive. The counted bins are geometric (:data:`npti_export.stats.EDGES`); what
    they hold is spread evenly over their width.

    Args:
        stats: of both poles.
        neurons: ``[layers, width]``.
        sign: the wanted pole.
    """
    sides = (stats.plus, stats.minus) if sign == "+" else (stats.minus, stats.plus)
    counted = [_counted(side, neurons) for side in sides]
    if min(total for _, total in counted) == 0:
        return None
    top = max(_top(*one) for one in counted)
    edges = np.linspace(0, top, _BINS + 1)
    wanted, opposite = (_shares(*one, edges) for one in counted)
    return Distribution(edges=[_LEAST, *edges.tolist()], wanted=wanted, opposite=opposite)


def trait_neurons(saved: SavedRule | None, pole: str, profile: NeuronProfile, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """The neurons of a pole that a rule shifts; or else, those of it by a recipe's selection.

    Else: the rule is of constants, steers towards another pole, or towards several, whose shares of the neurons it does
    not tell.

    Args:
        saved: the rule, and what it steers towards; None where there is none.
        pole: the judged one.
        profile: of its trait.
        recipe: whose selection.

    Raises:
        ProfileError: it selects none.
    """
    own = saved is not None and [parse_recorded(text).pole for text in saved.about.trait.split()] == [pole]
    if saved is not None and own and saved.rule.shifted:
        shifted: npt.NDArray[np.bool_] = saved.rule.shift != 0
        return shifted
    sign: Sign = "+" if pole.endswith("+") else "-"
    select, chosen = recipe.select, np.zeros(profile.p_plus.shape, np.bool_)
    chosen[pole_neurons(profile, sign, select.threshold, select.at_least, select.at_most)] = True
    return chosen


def _counted(stats: ActivationStats, neurons: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], int]:
    """Positive activations by bin, and how many there were in all."""
    seen = np.broadcast_to(stats.seen, neurons.shape)[neurons]
    bins: npt.NDArray[np.int64] = stats.histogram[neurons].sum(0, dtype=np.int64)
    return bins, int(seen.sum())


def _top(bins: npt.NDArray[np.int64], total: int) -> float:
    below = total - bins.sum() + np.cumsum(bins)
    place = int(np.searchsorted(below, _SHOWN * total))
    return float(EDGES[min(place, len(EDGES) - 1)])


def _shares(bins: npt.NDArray[np.int64], total: int, edges: npt.NDArray[np.float64]) -> list[float]:
    places = np.concatenate([[0.0], EDGES.astype(np.float64)])
    below = np.interp(edges, places, np.concatenate([[0], np.cumsum(bins[:-1])]))
    positive = np.diff(below)
    positive[-1] += bins.sum() - below[-1]
    return [float(one) for one in np.concatenate([[total - bins.sum()], positive]) / total]
