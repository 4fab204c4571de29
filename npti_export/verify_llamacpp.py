"""Does a steered GGUF do what the rule says? Measured inside llama.cpp, with no torch and no float copy of the model.

The reference is the unsteered file, run by llama.cpp with the output of every MLP replaced by what the rule says, in
float32 numpy on the dequantised weights: attention and vocabulary are the runtime's own, the MLPs, which is all that
steering changes, are exact. The artifact runs untouched, and so does the unsteered file, which gives the noise that
is not ours. Beside the distributions, each layer of the artifact is compared with the rule on the input that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from npti_export.compiler.program import MLPProgram
from npti_export.gguf.mlp import FileMLP, Floats, LayerMLP, ProgramMLP
from npti_export.gguf.shards import read_model
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.context import chunks
from npti_export.runtimes.llamacpp.experts import ExpertPass
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime, SeeMLP
from npti_export.verify import Fidelity, LayerErrors, Tally

_CHECKED_ROWS = 64  # of each pass, whose MLPs are compared layer by layer


def measure_file(
    base: LlamaCppRuntime,
    artifact: LlamaCppRuntime,
    rule: SteeringRule,
    prompts: Sequence[tuple[int, ...]],
    recipe: Recipe,
    progress: Progress,
    *,
    file: LlamaCppRuntime | None = None,
    program: MLPProgram | None = None,
) -> tuple[Fidelity, LayerErrors | None]:
    """Compare rule, base and artifact on held-out prompts and the artifact's answers to them.

    Args:
        base: the unsteered model, opened with its source.
        artifact: what was made of the rule, opened with the source of the file that it was baked into.
        rule: what it should do.
        prompts: token ids.
        recipe: its ``verify`` section.
        progress: told of each pass.
        file: what the artifact was baked into, opened with its source, where that is not ``base``: the same model in
            another type. Its distance from the model is noise that is not ours, and layers are held to its weights.
        program: what was baked, where that only approximates the rule; layers are held to it then.

    Returns:
        The second is None for a mixture of experts.

    Raises:
        ModelError: llama.cpp cannot run one of the files.
    """
    source = base.source
    assert source is not None
    assert source.family is not None
    if source.family.mixture:
        return _measure_mixture(base, artifact, rule, prompts, recipe, progress), None
    mlp, file = _mlp_of(base), file or base
    own = mlp if file is base else _mlp_of(file)
    right: LayerMLP = partial(own, rule=rule) if program is None else ProgramMLP(own, program)
    tally, layers = Tally(), _LayerSums(len(rule.shift))
    progress.start("verify", 1 + 4 * len(prompts))
    sequences = _answers(artifact, prompts, recipe)
    progress.advance(1, sum(map(len, sequences)))
    for some in in_chunks(sequences, base.model.vocabulary_size, base.settings.context):
        want = base.run(some, replaced_by(partial(mlp, rule=rule)))
        plain = base.run(some, replaced_by(mlp))
        got = artifact.run(some, _watched(own, right, layers.add_artifact))
        floor = file.run(some, _watched(own, own, layers.add_base))
        tally.add(want, plain, got, floor)
        progress.advance(4 * len(some), 4 * sum(map(len, some)))
    return tally.result(), layers.result()


def _measure_mixture(
    base: LlamaCppRuntime,
    artifact: LlamaCppRuntime,
    rule: SteeringRule,
    prompts: Sequence[tuple[int, ...]],
    recipe: Recipe,
    progress: Progress,
) -> Fidelity:
    """The same for a mixture of experts, of which no steered file is made: the rule within the runtime's arithmetic.

    Which experts a token gets is then the same for rule and artifact as long as their inputs are.
    """
    assert base.source is not None
    activation, tally = base.source.activation, Tally()

    def steer(layer: int, parts: ExpertPass) -> bool:
        parts.product[:] += parts.change(rule, layer, activation)
        return True

    progress.start("verify", 1 + 3 * len(prompts))
    sequences = _answers(artifact, prompts, recipe)
    progress.advance(1, sum(map(len, sequences)))
    for some in in_chunks(sequences, base.model.vocabulary_size, base.settings.context):
        want = base.run_experts(some, steer)
        plain = base.run_experts(some, lambda *_: False)
        got = artifact.run_experts(some, lambda *_: False)
        tally.add(want, plain, got, plain)
        progress.advance(3 * len(some), 3 * sum(map(len, some)))
    return tally.result()


def _mlp_of(runtime: LlamaCppRuntime) -> FileMLP:
    source = runtime.source
    assert source is not None
    assert source.family is not None
    return FileMLP(read_model(source.path), source.family)


def _answers(steered: LlamaCppRuntime, prompts: Sequence[tuple[int, ...]], recipe: Recipe) -> list[tuple[int, ...]]:
    exchanges = steered.generate(
        prompts,
        max_new_tokens=recipe.verify.answer_tokens,
        repetition_penalty=recipe.identify.repetition_penalty,
    )
    return [exchange.tokens for exchange in exchanges]


def in_chunks(sequences: Sequence[tuple[int, ...]], vocabulary: int, context: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences that are run together, see :func:`npti_export.runtimes.llamacpp.context.chunks`."""
    return chunks(sequences, len, vocabulary, context)


def replaced_by(mlp: LayerMLP) -> SeeMLP:
    """Compute the MLPs here."""

    def replace(layer: int, x: Floats, y: Floats) -> bool:
        y[:] = mlp(layer, x)
        return True

    return replace


def _watched(mlp: FileMLP, right: LayerMLP, add: Callable[[int, Floats, Floats, Floats], None]) -> SeeMLP:
    """Leave the MLPs; ``add`` gets layer, output, what it should be and what it would be unsteered, of some rows."""

    def watch(layer: int, x: Floats, y: Floats) -> bool:
        some = np.linspace(0, len(x) - 1, min(_CHECKED_ROWS, len(x)), dtype=np.int64)
        plain = mlp(layer, x[some])
        add(layer, y[some], plain if right is mlp else right(layer, x[some]), plain)
        return False

    return watch


class _LayerSums:
    """Squared sizes by layer, each row's by what is right there, summed over the checked rows.

    Rows count alike: the first token's output is a hundred times as large as others' in some layers, and would stand
    for all of them.
    """

    def __init__(self, layers: int) -> None:
        self._squares = np.zeros((3, layers))
        self._rows = np.zeros((2, layers))

    def add_artifact(self, layer: int, found: Floats, right: Floats, plain: Floats) -> None:
        self._squares[:2, layer] += (_ratio(found - right, right), _ratio(right - plain, right))
        self._rows[0, layer] += len(right)

    def add_base(self, layer: int, found: Floats, right: Floats, _plain: Floats) -> None:
        self._squares[2, layer] += _ratio(found - right, right)
        self._rows[1, layer] += len(right)

    def result(self) -> LayerErrors:
        rows = np.maximum(self._rows[[0, 0, 1]], 1)
        error, moved, floor = np.sqrt(self._squares / rows)
        return LayerErrors(tuple(error.tolist()), tuple(moved.tolist()), tuple(floor.tolist()))


def _ratio(values: Floats, right: Floats) -> float:
    """Sum over rows of the squared size of values by that of what is right; nothing by nothing is 0."""
    above, below = (np.square(one, dtype=np.float64).sum(1) for one in (values, right))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(above == 0, 0.0, above / below).sum())
