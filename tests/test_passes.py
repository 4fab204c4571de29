"""The compiler's passes, on random MLPs, against the rule and the program written out neuron by neuron in float64."""

import numpy as np
import pytest
from tolerances import CLAMP_FITTED, FLOAT32

from npti_export.compiler.budget import within_budget
from npti_export.compiler.canonical import canonical
from npti_export.compiler.clamp import clamp_basis, fit_clamps, worst_clamp
from npti_export.compiler.exact import compile_exact
from npti_export.compiler.gate_bias import all_to_biases, clamps_to_biases, fit_biases
from npti_export.compiler.kinds import ProgramKind, parse_program
from npti_export.compiler.low_rank import low_rank, with_mean
from npti_export.compiler.neurons import LayerSample, Neurons, program_change, relative_error, rule_change
from npti_export.compiler.passes import Calibration, compile_rule, layer_rules
from npti_export.compiler.program import OFF_BIAS
from npti_export.compiler.refine import refine_clamps
from npti_export.errors import CompileError, RecipeError
from npti_export.rule import SteeringRule

HIDDEN, WIDTH, TOKENS = 24, 64, 300


def silu(z):
    z = np.asarray(z, np.float64)
    return z / (1 + np.exp(-np.clip(z, -700, None)))


def make(shifts=6, clamps=5, seed=0, biased=False):
    """A one-layer rule, its exact program and a sample; gates are about 0.7 wide, as a real model's are."""
    rng = np.random.default_rng(seed)
    shift = np.zeros((1, WIDTH), np.float32)
    shift[0, rng.choice(WIDTH, shifts, replace=False)] = rng.normal(size=shifts)
    clamp = np.zeros((1, WIDTH), bool)
    clamp[0, rng.choice(WIDTH, clamps, replace=False)] = True
    rule = SteeringRule(shift, clamp)
    (layer,) = layer_rules(rule)
    mixing = rng.normal(size=(HIDDEN, HIDDEN)) * np.linspace(0.2, 2, HIDDEN)  # inputs have a shape, as real ones have
    inputs = (rng.normal(size=(TOKENS, HIDDEN)) @ mixing / np.sqrt(HIDDEN)).astype(np.float32)
    count = len(layer.touched)
    gate, up = (rng.normal(size=(2, count, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32)
    down = rng.normal(size=(HIDDEN, count)).astype(np.float32)
    biases = rng.normal(size=(2, count)).astype(np.float32) * np.float32(0.3 * biased)
    return rule, compile_exact(rule, 4).layers[0], LayerSample(inputs, Neurons(layer.touched, gate, up, down, *biases))


def plain_rule(rule, sample):
    neurons, x = sample.neurons, sample.inputs.astype(np.float64)
    out = np.zeros((len(x), HIDDEN))
    for place, neuron in enumerate(neurons.index):
        g = x @ neurons.gate[place] + neurons.gate_bias[place]
        a = silu(g)
        steered = (np.minimum(a, 0) if rule.clamp[0, neuron] else a) + rule.shift[0, neuron]
        out += np.outer((steered - a) * (x @ neurons.up[place] + neurons.up_bias[place]), neurons.down[:, place])
    return out


def plain_program(program, sample):
    neurons, x = sample.neurons, sample.inputs.astype(np.float64)
    place_of = {int(neuron): place for place, neuron in enumerate(neurons.index)}
    out = np.zeros((len(x), HIDDEN))

    def add(gate_before, gate_after, factor, place):
        inner = factor * (x @ neurons.up[place] + neurons.up_bias[place])
        return np.outer((silu(gate_after) - gate_before) * inner, neurons.down[:, place])

    def gate(place):
        return x @ neurons.gate[place] + neurons.gate_bias[place]

    for neuron in program.off:
        g = gate(place_of[int(neuron)])
        out += add(silu(g), g + float(OFF_BIAS), 1, place_of[int(neuron)])
    for neuron, bias in zip(program.biased, program.bias, strict=True):
        g = gate(place_of[int(neuron)])
        out += add(silu(g), g + float(bias), 1, place_of[int(neuron)])
    for unit, neuron in enumerate(program.source):
        place = place_of[int(neuron)]
        z = float(program.gate_scale[unit]) * gate(place) + float(program.gate_bias[unit])
        out += add(0, z, float(program.up_scale[unit]), place)
    if program.dense is not None:
        for unit in range(program.dense.units):
            constant = silu(program.dense.gate_bias[unit]) * (x @ program.dense.up[unit])
            out += np.outer(constant, program.dense.down[:, unit])
    return out if program.down_bias is None else out + program.down_bias


def error_of(rule, program, sample):
    want = plain_rule(rule, sample)
    return float(np.sqrt(np.square(want - plain_program(program, sample)).sum() / np.square(want).sum()))


@pytest.mark.parametrize("biased", [False, True])
def test_changes_are_those_written_out(biased):
    rule, exact, sample = make(biased=biased)
    (layer,) = layer_rules(rule)
    want = plain_rule(rule, sample)
    np.testing.assert_allclose(rule_change(layer, sample), want, atol=100 * FLOAT32)
    programs = [exact, all_to_biases(layer, exact, sample), low_rank(layer, exact, sample, 3)]
    programs.append(with_mean(layer, clamps_to_biases(layer, exact, sample), sample))
    for program in programs:
        np.testing.assert_allclose(program_change(program, sample), plain_program(program, sample), atol=100 * FLOAT32)
        assert relative_error(layer, program, sample) == pytest.approx(error_of(rule, program, sample), rel=1e-3)
    assert np.abs(want).max() > 0.5


def test_a_gate_bias_is_the_best_of_a_fine_grid():
    """Brute force, neuron by neuron: no bias leaves less variance, but for the coarseness of the pass's own grid."""
    rule, _, sample = make(seed=3)
    (layer,) = layer_rules(rule)
    neurons, x = sample.neurons, sample.inputs.astype(np.float64)
    fit = fit_biases(layer, sample, layer.touched)
    for place, neuron in enumerate(neurons.index):
        g, up = x @ neurons.gate[place], x @ neurons.up[place]
        steered = (np.minimum(silu(g), 0) if rule.clamp[0, neuron] else silu(g)) + rule.shift[0, neuron]
        left = [((steered - silu(g + bias)) * up).var() for bias in (-1000, *np.arange(-8, 6, 0.02))]
        before = ((steered - silu(g)) * up).var()
        assert fit.left[place] <= min(left) / before + 0.02
        found = ((steered - silu(g + float(fit.bias[place]))) * up).var()
        assert found / before == pytest.approx(fit.left[place], rel=1e-3)
    assert fit.left.mean() < 0.5  # biases do most of this rule's work


def test_shifts_alone_are_a_linear_map_of_their_number():
    rule, exact, sample = make(shifts=6, clamps=0)
    (layer,) = layer_rules(rule)
    nothing = all_to_biases(layer, exact, sample)
    bare = type(nothing)(
        *(one[:0] for one in (exact.source, exact.gate_scale, exact.gate_bias, exact.up_scale, exact.off))
    )
    errors = [error_of(rule, low_rank(layer, bare, sample, rank, known=True), sample) for rank in (1, 2, 4, 6)]
    assert errors[-1] < 1e-5
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    # no map of that rank does better: the rest is what the singular values beyond it hold
    want = plain_rule(rule, sample)
    sizes = np.linalg.svd(want - want.mean(0), compute_uv=False)
    for rank, error in zip((1, 2, 4), errors, strict=False):
        least = np.sqrt(np.square(sizes[rank:]).sum() / np.square(want).sum())
        assert error == pytest.approx(least, rel=0.01)


def test_what_biases_leave_of_clamps_is_partly_linear():
    rule, exact, sample = make(shifts=0, clamps=12, seed=1)
    (layer,) = layer_rules(rule)
    biases = clamps_to_biases(layer, exact, sample)
    assert biases.units == 0
    alone = error_of(rule, with_mean(layer, biases, sample), sample)
    more = error_of(rule, low_rank(layer, biases, sample, 8), sample)
    assert more < alone < error_of(rule, biases, sample) < 0.6


@pytest.mark.parametrize("units", [0, 2, 5, 12, 40])
def test_a_budget_is_kept_and_used(units):
    rule, exact, sample = make(shifts=9, clamps=6)
    (layer,) = layer_rules(rule)
    program = within_budget(layer, exact, sample, units)
    assert program.units <= units
    smaller = within_budget(layer, exact, sample, max(units - 2, 0))
    assert error_of(rule, program, sample) <= error_of(rule, smaller, sample) + 1e-6
    if units >= exact.units:
        assert program is exact
    assert error_of(rule, within_budget(layer, exact, sample, 12), sample) < 0.25


@pytest.mark.parametrize("fit", [fit_clamps, refine_clamps])
def test_the_worst_error_of_a_clamp(fit):
    """Neuron by neuron over a finer grid, from what the units say they are."""
    rule, _, sample = make(shifts=3, clamps=8, seed=2)
    (layer,) = layer_rules(rule)
    program = fit(layer, compile_exact(rule, 3).layers[0], sample)
    gates, worst = np.linspace(-60, 60, 24001), 0.0
    for neuron in np.flatnonzero(rule.clamp[0]):
        own = program.bias[program.biased == neuron]
        total = silu(gates + float(own[0])) if len(own) else np.zeros_like(gates)
        for unit in np.flatnonzero((program.source == neuron) & (program.gate_scale != 0)):
            gate = float(program.gate_scale[unit]) * gates + float(program.gate_bias[unit])
            total += float(program.up_scale[unit]) * silu(gate)
        worst = max(worst, np.abs(total - np.minimum(silu(gates), 0)).max())
    assert worst_clamp(program) == pytest.approx(worst, rel=0.1)
    assert 0 < worst < 0.2
    assert worst_clamp(all_to_biases(layer, program, sample)) == 0


@pytest.mark.parametrize("units", [3, 4, 5])
@pytest.mark.parametrize("fit", [fit_clamps, refine_clamps])
def test_clamps_fitted_to_their_gates_are_nearer(units, fit):
    rule, _, sample = make(shifts=3, clamps=12, seed=2)
    (layer,) = layer_rules(rule)
    exact = compile_exact(rule, units).layers[0]
    fitted = fit(layer, exact, sample)
    before, after = error_of(rule, exact, sample), error_of(rule, fitted, sample)
    assert after < CLAMP_FITTED * before
    assert fitted.units == exact.units
    # far from all gates that were seen, the units must not run away
    far = LayerSample(20 * sample.inputs, sample.neurons)
    assert error_of(rule, fitted, far) < max(2 * error_of(rule, exact, far), 0.05)
    if fit is fit_clamps:
        assert np.abs(fitted.up_scale[3:]).max() <= 0.5
        assert np.isin(fitted.gate_scale[3:], [0, 1, 2, 4, 8, 16]).all()  # rows are multiplied without rounding


def test_where_columns_are_rounded_terms_that_cancel_stay_small():
    """Each unit's column rounded by itself: the fit that knows of it is nearer than the one that does not."""
    rule, _, sample = make(shifts=0, clamps=14, seed=6)
    (layer,) = layer_rules(rule)
    exact = compile_exact(rule, 4).layers[0]
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=(exact.units, HIDDEN)) * 0.1 for _ in range(20)]

    def rounded_error(program):
        neurons, x = sample.neurons, sample.inputs.astype(np.float64)
        places = np.searchsorted(neurons.index, program.source)
        terms = silu(program.gate_scale * (x @ neurons.gate[places].T) + program.gate_bias)
        terms = terms * program.up_scale * (x @ neurons.up[places].T)
        left = plain_rule(rule, sample) - plain_program(program, sample)
        size = np.sqrt(np.square(neurons.down).mean())
        return np.mean([np.square(left - terms @ (one * size)).sum() for one in noise])

    aware, blind = (rounded_error(fit_clamps(layer, exact, sample, rounding=one)) for one in (0.1, 0.0))
    assert aware < 0.9 * blind
    assert aware < rounded_error(exact)


def test_refining_three_units_comes_near_four_fixed_ones():
    rule, _, sample = make(shifts=0, clamps=14, seed=5)
    (layer,) = layer_rules(rule)
    refined = refine_clamps(layer, compile_exact(rule, 3).layers[0], sample)
    assert error_of(rule, refined, sample) < 1.2 * error_of(rule, compile_exact(rule, 4).layers[0], sample)
    assert error_of(rule, refined, sample) < 0.6 * error_of(rule, compile_exact(rule, 3).layers[0], sample)
    assert clamp_basis(4).rms < clamp_basis(3).rms


def calibration(samples, block=2, rounding=0.01):
    return Calibration(samples, WIDTH, block, rounding)


@pytest.mark.parametrize("text", ["exact", "bias", "lowrank:4", "budget:10%", "kl:0.01"])
def test_every_program_compiles_and_says_what_it_costs(text):
    rule, exact, sample = make(shifts=9, clamps=6)
    errors = []

    def measure(program):
        errors.append(relative_error(layer_rules(rule)[0], program.layers[0], sample) ** 2)
        return errors[-1]

    compiled = compile_rule(rule, parse_program(text), calibration([sample]), 3, measure)
    first, *_, last = compiled.steps
    assert (first.name, first.units) == ("rule written out", 9 + 3 * 6)
    program = compiled.program.layers[0]
    assert (last.units, last.widest) == (program.units, program.units)
    assert last.error == pytest.approx(error_of(rule, program, sample), rel=1e-3)
    most = {"exact": 27, "bias": 0, "lowrank:4": 4, "budget:10%": 6, "kl:0.01": 26}[text]
    assert program.units <= most
    if text == "kl:0.01":
        assert last.error**2 <= 0.01
        assert program.units < exact.units
    if text != "exact":
        assert last.error > first.error


def test_the_least_width_for_a_fidelity():
    """What is found is one block wider than what just fails."""
    rule, _, sample = make(shifts=9, clamps=6)
    (layer,) = layer_rules(rule)

    def measure(program):
        return error_of(rule, program.layers[0], sample) ** 2

    kind = ProgramKind("kl", 0.004)
    found = compile_rule(rule, kind, calibration([sample]), 3, measure)
    units = -(-found.program.widest // 2) * 2
    exact = fit_clamps(layer, compile_exact(rule, 3).layers[0], sample, rounding=0.01)
    assert measure(found.program) <= 0.004 < error_of(rule, within_budget(layer, exact, sample, units - 2), sample) ** 2
    with pytest.raises(CompileError, match=r"program kl:1e-12: the rule written out in full .* is at KL"):
        compile_rule(rule, ProgramKind("kl", 1e-12), calibration([sample]), 3, measure)


def test_layers_that_the_rule_leaves_alone_stay_alone():
    rule, _, sample = make()
    both = SteeringRule(np.vstack([rule.shift, 0 * rule.shift]), np.vstack([rule.clamp, rule.clamp & False]))
    empty = LayerSample(
        sample.inputs,
        Neurons(
            *(one[:0] for one in (sample.neurons.index, sample.neurons.gate, sample.neurons.up)),
            sample.neurons.down[:, :0],
            *np.zeros((2, 0)),
        ),
    )
    for text in ("exact", "bias", "lowrank:4", "budget:10%"):
        program = compile_rule(both, parse_program(text), calibration([sample, empty]), 3).program.layers[1]
        assert (program.units, program.changes_gates, program.changes_output) == (0, False, False)


def test_a_budget_under_one_block_says_what_can_be():
    rule, _, sample = make()
    with pytest.raises(
        CompileError, match=r"blocks of 32 in this file, which is 50% of its 64; take budget:50% or bias"
    ):
        compile_rule(rule, parse_program("budget:40%"), calibration([sample], block=32), 3)


def test_the_same_inputs_give_the_same_program():
    rule, _, sample = make()
    one, two = (
        compile_rule(rule, parse_program("lowrank:4"), calibration([sample]), 3).program.layers[0] for _ in range(2)
    )
    np.testing.assert_array_equal(one.dense.up, two.dense.up)
    np.testing.assert_array_equal(one.bias, two.bias)


def test_canonical_rules_have_nothing_in_them_that_does_nothing():
    shift = np.array([[0.0, -0.0, 1e-40, 0.5]], np.float32)
    rule = canonical(SteeringRule(shift, np.zeros((1, 4), bool), np.zeros((1, 4), np.float32)))
    np.testing.assert_array_equal(rule.shift, [[0, 0, 0, 0.5]])
    assert not np.signbit(rule.shift).any()
    assert rule.constant is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "best",
        "bias:1",
        "budget:5",
        "budget:-1%",
        "budget:x%",
        "lowrank:",
        "lowrank:1.5",
        "lowrank:0",
        "kl:0",
        "kl:nan",
    ],
)
def test_other_programs_are_refused(text):
    with pytest.raises(RecipeError, match="exact, bias, lowrank:R"):
        parse_program(text)


def test_programs_print_as_they_are_written():
    for text in ("exact", "bias", "lowrank:16", "budget:2.5%", "kl:0.001"):
        assert str(parse_program(text)) == text
        assert parse_program(text).approximates == (text != "exact")
