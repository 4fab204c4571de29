"""A clamp as a sum of SiLUs: ``min(silu(g), 0) ≈ Σ alpha_j silu(scale_j g + bias_j)``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClampBasis:
    """Units that stand for one clamp.

    Attributes:
        scale: ``[units]``, powers of two, so that multiplying a gate row by one rounds nothing.
        bias: ``[units]``.
        alpha: ``[units]``, at most 0.5 in size.
        worst: largest error over ``|g| <= 60``.
        rms: root mean square error where ``g`` is standard normal.
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    alpha: tuple[float, ...]
    worst: float
    rms: float

    def __call__(self, gate: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The sum at gates ``[…]``, in float64."""
        z = np.multiply.outer(np.asarray(gate, np.float64), self.scale) + self.bias
        return np.asarray((np.asarray(self.alpha) * z / (1 + np.exp(-np.clip(z, -700, None)))).sum(-1))


# Printed by benchmarks/fit_clamp_basis.py.
_BASES: dict[int, ClampBasis] = {
    3: ClampBasis(
        (4.0, 8.0, 8.0),
        (3.7748486565444814, -0.7247766286084528, 44.56424989356241),
        (0.08234182360924627, -0.033630361378684664, -0.007538249547865194),
        worst=0.0242,
        rms=0.0084,
    ),
    4: ClampBasis(
        (4.0, 4.0, 4.0, 8.0),
        (5.302089683087676, 1.9316611653418299, 20.746741240195487, 0.012330908019568909),
        (0.04344297626376174, 0.07115345102844224, -0.017634525061581422, -0.048485117020459295),
        worst=0.0295,
        rms=0.0033,
    ),
    5: ClampBasis(
        (2.0, 2.0, 8.0, 8.0, 8.0),
        (1.8142470129302837, -4.22007575132933, 0.8014679806661824, 0.9548708072490147, 43.091794391336244),
        (
            0.17067189269201313,
            0.0070182552725775805,
            -0.4523770219995703,
            0.4152247644648402,
            -0.007272042796914509,
        ),
        worst=0.0246,
        rms=0.0022,
    ),
}


def clamp_basis(units: int) -> ClampBasis:
    """The basis of a number of units."""
    return _BASES[units]
