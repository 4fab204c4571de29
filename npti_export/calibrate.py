"""What the compiler needs to know of a model beside the rule: what its MLPs read while it is steered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from npti_export.compiler.neurons import Floats, Indices, LayerSample, Neurons
from npti_export.compiler.passes import layer_rules
from npti_export.rule import SteeringRule


class TokenSamples:
    """Keeps what the MLPs of a running model see of some tokens, evenly spread.

    Args:
        lengths: of the sequences that will be run, one after the other.
        tokens: how many are kept; fewer where there are fewer.
        layers: of the model.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, layers: int) -> None:
        total = sum(lengths)
        self._kept = np.zeros(total, np.bool_)
        self._kept[np.linspace(0, total - 1, min(tokens, total)).round().astype(np.int64)] = True
        self._inputs: list[list[Floats]] = [[] for _ in range(layers)]
        self._streams: list[list[Floats]] = [[] for _ in range(layers)]
        self._seen = [0] * layers

    def see_stream(self, layer: int, h: Floats) -> None:
        """The residual stream ``[rows, hidden]`` that an MLP will add to, before :meth:`see_input`."""
        some = h[self._kept[self._seen[layer] : self._seen[layer] + len(h)]]
        self._streams[layer].append(np.square(some, dtype=np.float64).sum(-1).astype(np.float32))

    def see_input(self, layer: int, x: Floats) -> None:
        """What an MLP reads, ``[rows, hidden]``."""
        self._inputs[layer].append(x[self._kept[self._seen[layer] : self._seen[layer] + len(x)]])
        self._seen[layer] += len(x)

    def samples(self, rule: SteeringRule, neurons: Callable[[int, Indices], Neurons]) -> list[LayerSample]:
        """One a layer; ``neurons`` reads the weights of some of a layer's neurons."""
        return [
            LayerSample(np.concatenate(x), neurons(layer, one.touched), _sensitivity(sizes)) if x else _NO_MLP
            for layer, (x, sizes, one) in enumerate(zip(self._inputs, self._streams, layer_rules(rule), strict=True))
        ]


def _sensitivity(sizes: Sequence[Floats]) -> float:
    return float(np.mean(1 / np.maximum(np.concatenate(sizes), np.finfo(np.float32).tiny)))


def _nothing(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


# deci has layers without an MLP, which no rule touches
_NO_MLP = LayerSample(
    _nothing(1, 1),
    Neurons(np.zeros(0, np.int64), _nothing(0, 1), _nothing(0, 1), _nothing(1, 0), _nothing(0), _nothing(0)),
)
