"""How many units each layer's clamps get: against every way to share them, and in whole programs."""

from itertools import product

import numpy as np
import pytest
from test_passes import WIDTH, error_of, make

from npti_export.compiler.exact import compile_exact
from npti_export.compiler.kinds import ProgramKind
from npti_export.compiler.neurons import LayerSample
from npti_export.compiler.passes import Calibration, compile_rule, layer_rules
from npti_export.compiler.share import ClampCosts, rounded, share
from npti_export.errors import CompileError
from npti_export.rule import SteeringRule

CHOICES = (2, 3, 4)


def random_layers(rng, count):
    """Errors that fall by factors which grow smaller, as fits do."""
    layers = []
    for _ in range(count):
        first, ratio = rng.uniform(1, 20), rng.uniform(2, 6)
        layers.append(ClampCosts(int(rng.integers(1, 9)), {units: first / ratio ** (units - 2) for units in CHOICES}))
    return layers


@pytest.mark.parametrize("seed", range(20))
def test_no_way_to_share_is_better(seed):
    rng = np.random.default_rng(seed)
    layers, average = random_layers(rng, 5), rng.choice([2.4, 2.5, 3.3, 3.5])
    total = average * sum(one.clamps for one in layers)
    widest = int(rng.uniform(3, 4) * max(one.clamps for one in layers))

    def spent(some):
        return [one.clamps * count for one, count in zip(layers, some, strict=True)]

    def cost(some):
        return sum(one.errors[count] for one, count in zip(layers, some, strict=True))

    start = [int(average)] * 5
    everything = [some for some in product(CHOICES, repeat=5) if min(some) >= start[0]]
    allowed = [some for some in everything if sum(spent(some)) <= total and max(spent(some)) <= widest]
    units = share(layers, [widest] * 5, average)
    assert tuple(units) in allowed
    assert cost(units) == pytest.approx(min(map(cost, allowed)))
    assert cost(units) < cost(start)


def test_what_is_not_worth_a_unit_is_not_spent():
    """Where rounding is most of the error, another unit does nothing; where the room is out, there is none to give."""
    flat = ClampCosts(6, {3: 1.0, 4: 0.95, 5: 0.94})
    steep = ClampCosts(6, {3: 1.0, 4: 0.5, 5: 0.4})
    nothing = ClampCosts(0, {})
    assert share([flat, steep, nothing], [99, 99, 99], 5) == [3, 5, 0]
    assert share([flat, steep, nothing], [99, 99, 99], 3) == [3, 3, 0]
    assert share([flat, steep, nothing], [99, 29, 99], 3.5) == [3, 4, 0]
    assert share([flat, steep, nothing], [99, 23, 99], 3.5) == [3, 3, 0]
    assert share([], [], 4) == []


def three_layers():
    """Layers of the same kind of MLP; an error in the last weighs a thousand times as much as in the first."""
    made = [make(shifts=4, clamps=8, seed=seed) for seed in range(3)]
    rule = SteeringRule(*(np.vstack([getattr(one[0], name) for one in made]) for name in ("shift", "clamp")))
    samples = [LayerSample(one[2].inputs, one[2].neurons, 10.0 ** (2 * at)) for at, one in enumerate(made)]
    return [one[0] for one in made], rule, samples


def weighted(rules, program, samples):
    """Errors in relation to each rule's change, by the plain code of the passes' tests, weighed."""
    return sum(
        one.sensitivity * error_of(rule, layer, one) ** 2
        for rule, layer, one in zip(rules, program.layers, samples, strict=True)
    )


def per_clamp(program, rule):
    return [
        (layer.units - int(np.count_nonzero(rule.shift[at]))) / int(rule.clamp[at].sum())
        for at, layer in enumerate(program.layers)
    ]


@pytest.mark.parametrize(("rounding", "averages"), [(0.0, (2, 2.5, 3)), (1e-4, (3, 3.5, 4))])
def test_units_go_where_errors_weigh_most(rounding, averages):
    rules, rule, samples = three_layers()
    calibration = Calibration(samples, WIDTH, 1, rounding)
    programs = {one: compile_rule(rule, ProgramKind("exact"), calibration, one).program for one in averages}
    low, between, high = (weighted(rules, programs[one], samples) for one in averages)
    assert high < between < low
    units = per_clamp(programs[averages[1]], rule)
    assert np.mean(units) <= averages[1]
    assert units[0] < units[2]
    assert units[0] == min(units) == averages[0]


def test_an_average_that_no_clamp_can_have():
    _, rule, samples = three_layers()
    with pytest.raises(CompileError, match=r"compile\.clamp_units = 2\.5: .* a clamp takes at least 3 extra neurons"):
        compile_rule(rule, ProgramKind("exact"), Calibration(samples, WIDTH, 1, 0.05), 2.5)


def test_what_rounding_is_expected_to_cost():
    """Against columns that were in fact rounded, many times over."""
    rule, _, sample = make(shifts=3, clamps=4)
    program = compile_exact(rule, 4).layers[0]
    neurons, x = sample.neurons, sample.inputs.astype(np.float64)
    places = np.searchsorted(neurons.index, program.source)
    gates = program.gate_scale * (x @ neurons.gate[places].T) + program.gate_bias
    terms = gates / (1 + np.exp(-gates)) * program.up_scale * (x @ neurons.up[places].T)
    columns, rng = neurons.down[:, places], np.random.default_rng(0)
    tries = [np.square(terms @ (rng.normal(size=columns.shape) * 0.03 * columns).T).sum() for _ in range(400)]
    assert rounded(program, sample, 0.03) == pytest.approx(np.mean(tries), rel=0.1)
    assert rounded(program, sample, 0.0) == 0
    assert layer_rules(rule)[0].clamp.sum() == 4
