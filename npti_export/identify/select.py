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
    order = np.argsort(-strength, kind="stable")
    ranked = strength[order]
    qualifies = ranked >= threshold - 1e-7
    qualifies[:at_least] = True
    qualifies &= ranked > 0
    return order[qualifies][:at_most].astype(np.int64)
