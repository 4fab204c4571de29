"""Fit the units that stand for a clamp: min(silu(g), 0) ~ sum_j alpha_j silu(k_j g + b_j), k_j a power of two.

    python benchmarks/fit_clamp_basis.py

prints the table of npti_export/compiler/clamp.py. A power-of-two gate scale leaves every float and every f16 block
scale exact when a gate row is multiplied by it. Gates crowd around 0, so the squared error is weighted by a normal
density of deviation 1 over a floor that keeps the tails, up to |g| = 60, in hand. |alpha| stays under LARGEST, so
that rounding it into f16 block scales cannot unbalance large terms that cancel.
"""

import itertools

import numpy as np
from scipy.optimize import least_squares

GRID = np.concatenate([np.linspace(-60, -12.05, 200), np.linspace(-12, 12, 1201), np.linspace(12.05, 60, 200)])
SPACING = np.gradient(GRID)
DENSITY = np.exp(-(GRID**2) / 2) / np.sqrt(2 * np.pi)
WEIGHT = np.sqrt((DENSITY + 0.01) * SPACING)
SCALES = (1.0, 2.0, 4.0, 8.0)
LARGEST = 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


TARGET = np.minimum(GRID * sigmoid(GRID), 0)


def fit(scales, starts, rng):
    scales = np.array(scales)
    count = len(scales)

    def parts(p):
        z = scales[:, None] * GRID + p[count:, None]
        return z, sigmoid(z)

    def residual(p):
        z, s = parts(p)
        return WEIGHT * (p[:count] @ (z * s) - TARGET)

    def jacobian(p):
        z, s = parts(p)
        return (WEIGHT * np.concatenate([z * s, p[:count, None] * (s + z * s * (1 - s))])).T

    best = None
    for _ in range(starts):
        start = np.concatenate([rng.uniform(-LARGEST, LARGEST, count), rng.normal(0, 2, count)])
        limit = np.concatenate([np.full(count, LARGEST), np.full(count, np.inf)])
        found = least_squares(residual, start, jac=jacobian, bounds=(-limit, limit), max_nfev=600)
        if best is None or found.cost < best.cost:
            best = found
    z, s = parts(best.x)
    error = best.x[:count] @ (z * s) - TARGET
    rms = np.sqrt((DENSITY * error**2 * SPACING).sum())
    return (
        best.cost,
        rms,
        np.abs(error).max(),
        scales.tolist(),
        best.x[:count].tolist(),
        best.x[count:].tolist(),
    )


def main():
    for count in (3, 4, 5):
        rng = np.random.default_rng(0)
        results = [fit(scales, 12, rng) for scales in itertools.combinations_with_replacement(SCALES, count)]
        results.sort(key=lambda one: one[0])
        for cost, rms, worst, scales, alpha, bias in results[:3]:
            print(
                f"J={count} cost {cost:.3g} rms {rms:.5f} worst {worst:.5f}\n  {scales}\n  {bias}\n  {alpha}",
                flush=True,
            )


if __name__ == "__main__":
    main()
