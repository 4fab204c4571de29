"""Fit the units that stand for a clamp: min(silu(g), 0) ~ sum_j alpha_j silu(k_j g + b_j), k_j a power of two.

    python benchmarks/fit_clamp_basis.py

prints the tables of npti_export/compiler/shapes.py: for each number of units and each deviation of a normal gate the
scales and biases that fit best; the compiler solves for alpha itself, under each neuron's own gate. In the first
table the clamped neuron is switched off, in the second it stays, with a gate bias, as one more unit (alpha = k = 1).
A power-of-two gate scale leaves every float and every f16 block scale exact when a gate row is multiplied by it. The
squared error is weighted by the gate's density over a floor that keeps the tails, up to |g| = 60, in hand. |alpha|
stays under LARGEST, so that rounding it into f16 block scales cannot unbalance large terms that cancel.
"""

import itertools

import numpy as np
from scipy.optimize import least_squares

GRID = np.concatenate([np.linspace(-60, -12.2, 60), np.linspace(-12, 12, 481), np.linspace(12.2, 60, 60)])
SPACING = np.gradient(GRID)
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
DEVIATIONS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
UNITS = {False: (1, 2, 3, 4, 5), True: (1, 2, 3, 4)}  # whether the neuron stays
LARGEST = {False: 0.5, True: 1.0}
FLOOR = 1e-3
STARTS = {1: 8, 2: 8, 3: 5, 4: 2, 5: 1}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


TARGET = np.minimum(GRID * sigmoid(GRID), 0)


def fit(scales, deviation, starts, rng, stays):
    """The cheapest of some local fits: cost, rms error under the normal gate, worst error, biases, alphas."""
    scales, count = np.array(scales), len(scales)
    density = np.exp(-((GRID / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    weight = np.sqrt((density + FLOOR) * SPACING)

    def parts(p):
        z = scales[:, None] * GRID + p[count : 2 * count, None]
        return z, sigmoid(z)

    def error(p):
        z, s = parts(p)
        own = (GRID + p[-1]) * sigmoid(GRID + p[-1]) if stays else 0
        return p[:count] @ (z * s) + own - TARGET

    def residual(p):
        return weight * error(p)

    def jacobian(p):
        z, s = parts(p)
        rows = [z * s, p[:count, None] * (s + z * s * (1 - s))]
        if stays:
            own = sigmoid(GRID + p[-1])
            rows.append((own + (GRID + p[-1]) * own * (1 - own))[None])
        return (weight * np.concatenate(rows)).T

    best = None
    for _ in range(starts):
        most = LARGEST[stays]
        start = np.concatenate([rng.uniform(-most, most, count), rng.normal(0, 2, count + stays)])
        limit = np.concatenate([np.full(count, most), np.full(count + stays, np.inf)])
        found = least_squares(residual, start, jac=jacobian, bounds=(-limit, limit), max_nfev=250)
        if best is None or found.cost < best.cost:
            best = found
    rms = np.sqrt((density * error(best.x) ** 2 * SPACING).sum())
    return best.cost, rms, np.abs(error(best.x)).max(), best.x[count:].tolist()


def main():
    for stays, counts in UNITS.items():
        for count in counts:
            table(stays, count)


def table(stays, count):
    rng = np.random.default_rng(0)
    print(f"    {stays, count}: (", flush=True)
    for deviation in DEVIATIONS:
        choices = [
            (*fit(scales, deviation, STARTS[count], rng, stays), scales)
            for scales in itertools.combinations_with_replacement(SCALES, count)
        ]
        _, rms, worst, biases, scales = min(choices, key=lambda one: one[0])
        rounded = tuple(round(bias, 4) for bias in biases)
        print(f"        ({scales}, {rounded}),  # deviation {deviation}: rms {rms:.5f}, worst {worst:.4f}", flush=True)
    print("    ),", flush=True)


if __name__ == "__main__":
    main()
