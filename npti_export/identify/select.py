"""Which neurons drive a pole (paper, neuron identification)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npti_export.errors import ProfileError
from npti_export.profile import NeuronProfile
from npti_export.traits import Sign

Indices = npt.NDArray[np.int64]


def pole_neurons(
    profile: NeuronProfile, sign: Sign, threshold: float, at_least: int, at_most: int | None
) -> tuple[Indices, Indices]:
    """The neurons of one pole, strongest ``|delta|`` first.

    A neuron belongs to ``+`` if ``delta >= threshold``, to ``-`` if ``delta <= -threshold``. The first ``at_least`` by
    ``|delta|`` are taken even below the threshold (published code), never one whose delta is 0 or of the other sign.
    Ties keep the order of layer and neuron, so the choice is reproducible.

    Returns:
        Layer and neuron indices, two ``[n]`` int64 arrays.

    Raises:
        ProfileError: no neuron qualifies.
    """
    # float64: p+ - p- of counts such as 3/10 - 2/10 must not fall under a threshold of 0.1 by rounding
    delta = profile.p_plus.astype(np.float64) - profile.p_minus.astype(np.float64)
    strength = (delta if sign == "+" else -delta).ravel()
    chosen = rank(strength, threshold, at_least, at_most)
    if len(chosen) == 0:
        raise ProfileError(
            f"no neuron of {profile.trait}{sign} has |delta| >= {threshold:g} (the largest is "
            f"{max(strength.max(), 0):.3f}); lower select.threshold or set select.at_least"
        )
    layers, neurons = np.unravel_index(chosen, delta.shape)
    return layers.astype(np.int64), neurons.astype(np.int64)


def rank(strength: npt.NDArray[np.float64], threshold: float, at_least: int, at_most: int | None) -> Indices:
    """Places of the neurons that qualify, strongest first; see :func:`pole_neurons`.

    Args:
        strength: ``[n]``, delta towards the wanted pole.
        threshold: smallest strength.
        at_least: so many qualify below the threshold, if they are above 0.
        at_most: cap.
    """
    places = np.flatnonzero(qualifying(strength, threshold, at_least, at_most))
    return places[np.argsort(-strength[places], kind="stable")]


def qualifying(
    strength: npt.NDArray[np.float64], threshold: float, at_least: int, at_most: int | None
) -> npt.NDArray[np.bool_]:
    """The neurons that :func:`rank` gives, as a mask ``[n]``, without sorting all.

    Those of a ranking are always its first ones, so that only their number has to be known, and the last one's
    strength; of several of that strength the first places are taken, as a stable sort does.
    """
    mask: npt.NDArray[np.bool_] = (strength >= threshold - 1e-7) & (strength > 0)
    enough = int(np.count_nonzero(mask))
    wanted = max(enough, at_least) if at_most is None else min(max(enough, at_least), at_most)
    if wanted == enough:
        return mask
    pool = mask if wanted < enough else strength > 0
    strengths = strength[pool]
    if wanted >= len(strengths):
        return pool
    last = float(np.partition(strengths, len(strengths) - wanted)[len(strengths) - wanted])
    mask = strength > last
    mask[np.flatnonzero(strength == last)[: wanted - np.count_nonzero(mask)]] = True
    return mask
