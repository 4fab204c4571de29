"""Random programs with every part that one can have, and what they compute, written out in float64."""

from dataclasses import replace

import numpy as np
from reference import ReferenceLlama

from npti_export.compiler.exact import compile_exact
from npti_export.compiler.program import DenseUnits, MLPProgram
from npti_export.rule import SteeringRule

PARTS = ("copied", "biased", "dense", "down_bias")


def silu(x):
    return x * 0.5 * (1 + np.tanh(x / 2))


def random_program(widths, hidden, seed=0, parts=PARTS, dense=3, clamp_units=4):
    """Each layer that has an MLP gets all of ``parts``: shifts and clamps, biased gates, dense units, a down bias."""
    rng, layers = np.random.default_rng(seed), len(widths)
    shift, clamp = np.zeros((layers, max(widths)), np.float32), np.zeros((layers, max(widths)), bool)
    chosen = [rng.permutation(width) for width in widths]
    for layer, some in enumerate(chosen):
        if "copied" in parts:
            shift[layer, some[:4]] = rng.uniform(0.3, 1.5, len(some[:4])) * rng.choice([-1, 1], len(some[:4]))
            clamp[layer, some[4:8]] = True
    program = compile_exact(SteeringRule(shift, clamp), clamp_units)
    result = []
    for layer, some in zip(program.layers, chosen, strict=True):
        biased = np.sort(some[8:14])
        more = {"biased": biased, "bias": rng.normal(size=len(biased)).astype(np.float32)}
        if "biased" not in parts:
            more = {}
        if len(some) and "dense" in parts:
            up, down = rng.normal(size=(dense, hidden)) / np.sqrt(hidden), rng.normal(size=(hidden, dense)) / 8
            more["dense"] = DenseUnits(rng.uniform(0.5, 2, dense).astype(np.float32), *map(np.float32, (up, down)))
        if len(some) and "down_bias" in parts:
            more["down_bias"] = rng.normal(0, 0.15, hidden).astype(np.float32)
        result.append(replace(layer, **more))
    return MLPProgram(program.width, tuple(result))


def without(program, part):
    """The program with one part less."""
    nothing = compile_exact(SteeringRule(np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)), 4).layers[0]
    gone = {
        "copied": {name: getattr(nothing, name) for name in ("source", "gate_scale", "gate_bias", "up_scale", "off")},
        "biased": {"biased": nothing.biased, "bias": nothing.bias},
        "dense": {"dense": None},
        "down_bias": {"down_bias": None},
    }
    return MLPProgram(program.width, tuple(replace(layer, **gone[part]) for layer in program.layers))


class ProgramLlama(ReferenceLlama):
    """The base with a program beside its MLPs, whose weights stay what they are."""

    def __init__(self, path, program):
        super().__init__(path)
        self.program = program

    def mlp(self, x, layer, shift, clamp, seen):
        blk, one = f"blk.{layer}", self.program.layers[layer]
        raw = self.linear(x, f"{blk}.ffn_gate")
        up = self.linear(x, f"{blk}.ffn_up")
        gate = raw.copy()
        gate[:, one.biased] += one.bias.astype(float)
        a = silu(gate)
        a[:, one.off] = 0
        inner = a * up
        down = self.tensors[f"{blk}.ffn_down.weight"]
        y = inner @ down.T + self.tensors.get(f"{blk}.ffn_down.bias", 0)
        for unit, neuron in enumerate(one.source):
            g = raw[:, neuron] * float(one.gate_scale[unit]) + float(one.gate_bias[unit])
            y = y + np.outer(silu(g) * up[:, neuron] * float(one.up_scale[unit]), down[:, neuron])
        if one.dense is not None:
            for unit in range(len(one.dense.gate_bias)):
                value = silu(float(one.dense.gate_bias[unit])) * (x @ one.dense.up[unit].astype(float))
                y = y + np.outer(value, one.dense.down[:, unit].astype(float))
        return y if one.down_bias is None else y + one.down_bias.astype(float)
