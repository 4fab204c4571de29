"""The compiled program, run in float64, against the rule."""

import numpy as np
import pytest
from conftest import random_rule
from hypothesis import given
from hypothesis import strategies as st
from tolerances import CLAMP_STATED, FLOAT32

from npti_export.compiler.clamp import clamp_basis
from npti_export.compiler.exact import compile_exact, silu_inverse


def silu(x):
    return x / (1 + np.exp(-np.clip(x, -700, None)))


def run_program(program, gate, up, down, x):
    """Each layer's widened MLP on x [tokens, hidden], in float64."""
    outputs = []
    for layer, one in enumerate(program.layers):
        bias = np.zeros(len(gate[layer]))
        bias[one.off] = -1000.0
        a = silu(x @ gate[layer].T + bias)
        y = (a * (x @ up[layer].T)) @ down[layer].T
        unit_gate = x @ (gate[layer][one.source] * one.gate_scale[:, None].astype(float)).T + one.gate_bias.astype(
            float
        )
        unit_up = x @ (up[layer][one.source] * one.up_scale[:, None].astype(float)).T
        outputs.append(y + (silu(unit_gate) * unit_up) @ down[layer][:, one.source].T)
    return np.array(outputs)


def run_rule(rule, gate, up, down, x):
    outputs = []
    for layer in range(len(rule.shift)):
        a = silu(x @ gate[layer].T)
        a = np.where(rule.clamp[layer], np.minimum(a, 0), a) + rule.shift[layer]
        outputs.append((a * (x @ up[layer].T)) @ down[layer].T)
    return np.array(outputs)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    gate, up = (rng.normal(size=(3, 40, 16)) / 4 for _ in range(2))
    return gate, up, rng.normal(size=(3, 16, 40)) / 6, rng.normal(size=(200, 16)) * 1.5


def test_shifts_are_exact(weights):
    rule = random_rule(3, 40, per_layer=(9, 0))
    assert rule.clamped == 0
    want, base = run_rule(rule, *weights), run_rule(random_rule(3, 40, per_layer=(0, 0)), *weights)
    got = run_program(compile_exact(rule, 4), *weights)
    assert np.abs(got - want).max() < 20 * FLOAT32  # the bias is stored in float32
    assert np.abs(want - base).max() > 0.5


@pytest.mark.parametrize("units", [3, 4, 5])
def test_clamps_are_within_the_basis_error(weights, units):
    _, up, down, x = weights
    rule = random_rule(3, 40, per_layer=(3, 8))
    want, got = run_rule(rule, *weights), run_program(compile_exact(rule, units), *weights)
    base = run_rule(random_rule(3, 40, per_layer=(0, 0)), *weights)
    # |error of y| <= sum over clamped neurons of worst error x |up value| x |column|
    bound = np.array(
        [np.abs(x @ up[layer][rule.clamp[layer]].T) @ np.abs(down[layer][:, rule.clamp[layer]].T) for layer in range(3)]
    ) * (clamp_basis(units).worst * CLAMP_STATED)
    assert (np.abs(got - want) <= bound + 1e-4).all()
    assert np.square(got - want).mean() < 0.01 * np.square(want - base).mean()


@pytest.mark.parametrize("units", [3, 4, 5])
def test_stated_errors_of_the_basis(units):
    basis = clamp_basis(units)
    g = np.linspace(-60, 60, 480_001)
    error = np.abs(basis(g) - np.minimum(silu(g), 0))
    assert basis.worst / CLAMP_STATED / 1.01 < error.max() < basis.worst * CLAMP_STATED
    density = np.exp(-(g**2) / 2) / np.sqrt(2 * np.pi)
    rms = np.sqrt((density * error**2).sum() * (g[1] - g[0]))
    assert rms < basis.rms * CLAMP_STATED
    assert max(map(abs, basis.alpha)) <= 0.5
    assert all(np.log2(scale) % 1 == 0 for scale in basis.scale)


def test_more_units_are_nearer():
    assert clamp_basis(5).rms < clamp_basis(4).rms < clamp_basis(3).rms


@given(st.floats(1e-6, 1e3))
def test_silu_inverse(value):
    b = float(silu_inverse(np.array([value]))[0])
    assert b > 0
    assert b / (1 + np.exp(-b)) == pytest.approx(value, rel=1e-12)


def test_both_on_one_neuron_and_negative_shifts(weights):
    rule = random_rule(3, 40, per_layer=(4, 4))
    shift = rule.shift.copy()
    shift[rule.clamp] = -0.7
    both = type(rule)(shift, rule.clamp)
    error = np.abs(run_program(compile_exact(both, 5), *weights) - run_rule(both, *weights))
    without = np.abs(run_program(compile_exact(rule, 5), *weights) - run_rule(both, *weights))
    assert error.max() < 0.1 * without.max()


def test_padding_does_nothing(weights):
    program = compile_exact(random_rule(3, 40), 4)
    padded = type(program)(40, tuple(layer.padded(program.extra_width(32)) for layer in program.layers))
    assert {layer.units for layer in padded.layers} == {program.extra_width(32)}
    assert program.extra_width(32) % 32 == 0
    np.testing.assert_allclose(run_program(padded, *weights), run_program(program, *weights), atol=1e-12)
