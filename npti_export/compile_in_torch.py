"""Compile a rule for a model that transformers runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from npti_export.calibrate import TokenSamples
from npti_export.compile_for import RuleCompiler
from npti_export.compiler.canonical import canonical
from npti_export.compiler.neurons import Floats, Indices, LayerSample, Neurons, program_change
from npti_export.compiler.passes import Calibration, layer_rules
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.export.as_llama import LEAST_MULTIPLE
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.devices import in_place
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered

if TYPE_CHECKING:
    from npti_export.verify import Logits


class TorchCompiler(RuleCompiler):
    """For a model whose layers are a llama's; ``runtime`` has it in float32."""

    def __init__(
        self, runtime: TransformersRuntime, recipe: Recipe, questions: Sequence[str], progress: Progress
    ) -> None:
        super().__init__(runtime, recipe, questions, progress)
        self._runtime = runtime
        self._layers: list[Any] = list(runtime.layers)

    def _watched(self, rule: SteeringRule, some: TokenSamples) -> list[LayerSample]:
        def seeing(see: Callable[[int, Floats], None], layer: int) -> Callable[..., None]:
            return lambda _module, inputs: see(layer, _array(inputs[0][0]))

        with self._under(rule), ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                norm, mlp = layer.post_attention_layernorm, layer.mlp
                stack.callback(norm.register_forward_pre_hook(seeing(some.see_stream, index)).remove)
                stack.callback(mlp.register_forward_pre_hook(seeing(some.see_input, index)).remove)
            for tokens in self.sequences:
                self._runtime.logits(tokens)
                self._progress.advance(1, len(tokens))
        return some.samples(rule, self._neurons)

    def _calibrated(self, samples: list[LayerSample]) -> Calibration:
        return Calibration(samples, self._runtime.source.shape.width, LEAST_MULTIPLE, 0.0)

    def _steered(self, sequences: Sequence[tuple[int, ...]], rule: SteeringRule) -> Iterator[Logits]:
        with self._under(rule):
            yield from map(self._runtime.logits, sequences)

    def _changed(
        self, sequences: Sequence[tuple[int, ...]], program: MLPProgram, rule: SteeringRule
    ) -> Iterator[Logits]:
        rules = layer_rules(canonical(rule))
        with ExitStack() as stack:
            for index, (layer, one, own) in enumerate(zip(self._layers, program.layers, rules, strict=True)):
                hook = _Program(one, self._neurons(index, own.touched))
                stack.callback(layer.mlp.register_forward_hook(hook).remove)
            yield from map(self._runtime.logits, sequences)

    @contextmanager
    def _under(self, rule: SteeringRule) -> Iterator[None]:
        with steered(self._runtime.activations, rule, self._runtime.down_projections):
            yield

    def _neurons(self, layer: int, chosen: Indices) -> Neurons:
        mlp = self._layers[layer].mlp
        projections = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        none = np.zeros(len(chosen), np.float32)  # what a checkpoint is written of has no biases of its own
        with in_place(*projections):
            gate, up, down = (projection.weight.detach() for projection in projections)
            at = torch.from_numpy(chosen).to(gate.device)
            return Neurons(chosen, _array(gate[at]), _array(up[at]), _array(down[:, at]), none, none)


class _Program:
    """A forward hook that adds what a program changes to an MLP's output."""

    def __init__(self, program: LayerProgram, neurons: Neurons) -> None:
        self._program, self._neurons = program, neurons

    def __call__(self, _module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        change = program_change(self._program, LayerSample(_array(inputs[0][0]), self._neurons))
        return output + torch.from_numpy(change).to(output)


def _array(values: torch.Tensor) -> Floats:
    array: Floats = values.float().cpu().numpy()
    return array
