"""New down columns: how near they come, and how units are laid out for it."""

import numpy as np
import pytest
from reference import Q2_0, plain_dequantize
from test_compiler import run_program
from tolerances import COLUMNS

from npti_export.compiler.exact import compile_exact
from npti_export.compiler.layout import arrange
from npti_export.gguf.blocks import decode, quantise, type_id_of
from npti_export.gguf.columns import granule, is_codebook, quantise_columns
from npti_export.rule import SteeringRule


def decoded(rows, name):
    from gguf import GGMLQuantizationType

    return plain_dequantize(rows, Q2_0 if name == "Q2_0" else GGMLQuantizationType[name]).astype(float)


def layer_of(shifts, clamps, copies, width=300):
    """A program of one layer, and its units' sources."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(width)
    shift, clamp = np.zeros((1, width), np.float32), np.zeros((1, width), bool)
    shift[0, chosen[:shifts]] = rng.uniform(0.2, 1, shifts)
    clamp[0, chosen[shifts : shifts + clamps]] = True
    return compile_exact(SteeringRule(shift, clamp), copies)


@pytest.mark.parametrize("name", COLUMNS)
def test_new_columns_are_near_and_corrections_bring_them_nearer(name):
    """Columns of a matrix in the type, shuffled, decoded independently of the package."""
    kind = type_id_of(name)
    rng = np.random.default_rng(0)
    matrix = decode(quantise(rng.normal(size=(48, 512)).astype(np.float32), kind), kind)
    layer = arrange(layer_of(10, 20, 4, 512).layers[0], 512, granule(kind), is_codebook(kind))
    wanted = matrix[:, layer.source]
    working = (layer.corrects < 0) & (layer.up_scale != 0)
    assert working.sum() == 90

    def error(found):
        return np.linalg.norm(found - wanted[:, working]) / np.linalg.norm(wanted[:, working])

    alone = decoded(quantise_columns(wanted, None, kind), name)
    together = decoded(quantise_columns(wanted, layer.corrects, kind), name)
    total = together.copy()
    for place in np.flatnonzero((layer.corrects >= 0) & (layer.up_scale != 0)):
        total[:, layer.corrects[place]] += together[:, place]
    bare, corrected = error(alone[:, working]), error(total[:, working])
    assert bare < COLUMNS[name][0]
    assert corrected < min(COLUMNS[name][1], 0.8 * bare)


@pytest.mark.parametrize("copies", [3, 4, 5])
@pytest.mark.parametrize("name", [name for name in COLUMNS if is_codebook(type_id_of(name))])
def test_the_units_of_a_clamp_are_rounded_alike_in_codebooks(name, copies):
    kind = type_id_of(name)
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(8, 300)).astype(np.float32)
    layer = arrange(layer_of(10, 20, copies).layers[0], 256, granule(kind), is_codebook(kind))
    found = decoded(quantise_columns(matrix[:, layer.source], None, kind), name)
    plain = layer_of(10, 20, copies).layers[0].padded(256)
    scattered = decoded(quantise_columns(matrix[:, plain.source], None, kind), name)
    spread = lambda one, values: np.mean(  # noqa: E731
        [np.std(values[:, (one.source == neuron) & (one.gate_scale != 0)], axis=1).mean() for neuron in layer.off]
    )
    assert spread(layer, found) == 0
    assert spread(plain, scattered) > 0.02


@pytest.mark.parametrize("copies", [3, 4, 5])
@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize(("shifts", "clamps"), [(0, 0), (0, 5), (7, 0), (7, 5), (31, 17)])
@pytest.mark.parametrize("units", [128, 256, 512])
def test_an_arranged_program_computes_the_same(copies, codebook, shifts, clamps, units):
    """Whatever the room, with corrections whose columns are zero, as they are where nothing is lost."""
    program = layer_of(shifts, clamps, copies, 60)
    layer = arrange(program.layers[0], units, 32, codebook)
    assert layer.units == units
    rng = np.random.default_rng(2)
    up, gate = rng.normal(size=(2, 1, 60, 16))
    down, x = rng.normal(size=(1, 16, 60)), rng.normal(size=(9, 16))
    corrects = np.full(units, -1) if layer.corrects is None else layer.corrects
    works = layer.up_scale != 0
    assert works[corrects < 0].sum() == program.layers[0].units
    for place in np.flatnonzero((corrects >= 0) & works):
        for field in ("source", "gate_scale", "gate_bias", "up_scale"):
            assert getattr(layer, field)[place] == getattr(layer, field)[corrects[place]]
    again = type(program)(60, (layer.picked(np.arange(units), corrects < 0),))
    np.testing.assert_allclose(
        run_program(again, gate, up, down, x), run_program(program, gate, up, down, x), atol=1e-9
    )
