"""What the compiler needs to know of a model beside the rule: what its MLPs read while it is steered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npti_export.compiler.neurons import Floats, LayerSample, Neurons
from npti_export.compiler.passes import layer_rules
from npti_export.errors import ModelError
from npti_export.gguf.mlp import FileMLP
from npti_export.progress import Progress
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.verify_llamacpp import in_chunks


def calibrate(
    runtime: LlamaCppRuntime,
    mlp: FileMLP,
    rule: SteeringRule,
    sequences: Sequence[tuple[int, ...]],
    tokens: int,
    progress: Progress,
) -> list[LayerSample]:
    """Run the steered model, its MLPs computed by the rule, and keep what each of them read.

    Args:
        runtime: the file that will be baked into, opened with its source.
        mlp: of that file.
        rule: of the model's sizes.
        sequences: questions with answers, token ids.
        tokens: how many are kept, evenly spread; fewer where there are fewer.
        progress: told of each pass.

    Raises:
        ModelError: there is no token.
    """
    lengths = [len(one) for one in sequences]
    total = sum(lengths)
    if not total:
        raise ModelError("calibration: there is no question to ask; give --bench a folder with search questions")
    kept = np.zeros(total, np.bool_)
    kept[np.linspace(0, total - 1, min(tokens, total)).round().astype(np.int64)] = True
    inputs: list[list[Floats]] = [[] for _ in rule.shift]
    seen = [0] * len(rule.shift)

    def see(layer: int, x: Floats, y: Floats) -> bool:
        inputs[layer].append(x[kept[seen[layer] : seen[layer] + len(x)]])
        seen[layer] += len(x)
        y[:] = mlp(layer, x, rule)
        return True

    progress.start("calibrate", len(sequences))
    for some in in_chunks(sequences, runtime.model.vocabulary_size, runtime.settings.context):
        runtime.run(some, see)
        progress.advance(len(some), sum(map(len, some)))
    return [
        LayerSample(np.concatenate(x), mlp.neurons(layer, one.touched)) if x else _NO_MLP
        for layer, (x, one) in enumerate(zip(inputs, layer_rules(rule), strict=True))
    ]


def _nothing(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


# deci has layers without an MLP, which no rule touches
_NO_MLP = LayerSample(
    _nothing(1, 1),
    Neurons(np.zeros(0, np.int64), _nothing(0, 1), _nothing(0, 1), _nothing(1, 0), _nothing(0), _nothing(0)),
)
