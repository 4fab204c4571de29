"""Looking at the neurons of a mixture of experts, and steering them, while llama.cpp computes.

Nodes are those of ``build_moe_ffn`` in src/llama-graph.cpp. A row of a pass is sent to a few experts; values of the
experts come as ``[rows, experts per token, neurons of an expert]``. The rule is applied where gate and up projection
meet, so everything else is the runtime's own arithmetic, and no weight has to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.activations import activate
from npti_export.gguf.experts import Experts
from npti_export.models import ModelShape
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.counting import DROPPED_BITS, bin_of_bits, refuse_no_numbers
from npti_export.runtimes.llamacpp.taps import Floats, See
from npti_export.stats import BIN_COUNT, ActivationStats, AnswerCounts

Indices = npt.NDArray[np.int64]
_ORDER = "ffn_moe_argsort"  # all experts, the likeliest first: the top ones are a view of it, which is not contiguous
_WEIGHTS = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled")
_PRODUCT = "ffn_moe_swiglu"


@dataclass(frozen=True)
class ExpertPass:
    """What the experts of one layer did with some rows.

    Attributes:
        experts: ``[rows, used]`` int64, the experts of each row.
        weights: ``[rows, used]`` float32, with which their outputs are added up.
        gate: ``[rows, used, neurons]`` float32, pre-activations.
        up: of the same shape, the up projection.
        product: of the same shape, ``a ⊙ up``; writing into it changes what goes on.
    """

    experts: Indices
    weights: Floats
    gate: Floats
    up: Floats
    product: Floats

    def change(self, rule: SteeringRule, layer: int, activation: str) -> Floats:
        """What a rule adds to :attr:`product`, ``[rows, used, neurons]`` (paper, neuron-based induction)."""
        neurons = self.gate.shape[-1]
        shift = rule.shift[layer].reshape(-1, neurons)[self.experts]
        clamp = rule.clamp[layer].reshape(-1, neurons)[self.experts]
        a = activate(self.gate, activation)
        steered: Floats = (np.where(clamp, np.minimum(a, 0), a) + shift - a) * self.up
        return steered


SeeExperts = Callable[[int, ExpertPass], bool]
"""Takes a layer and its pass, and says whether it changed :attr:`ExpertPass.product`."""


class ExpertNodes:
    """Collects the nodes of each layer into an :class:`ExpertPass`.

    Attributes:
        nodes: for a tap.
    """

    def __init__(self, layers: int, experts: Experts, see: SeeExperts) -> None:
        self._experts, self._see = experts, see
        self.nodes: dict[bytes, See] = {}
        for layer in range(layers):
            self._add(layer)

    def _add(self, layer: int) -> None:
        used, rows = self._experts.used, self._experts.rows
        held: dict[str, npt.NDArray[np.float32]] = {}

        def order(values: Floats) -> bool:
            held["experts"] = values[:, :used].copy()
            return False

        def weights(values: Floats) -> bool:
            held["weights"] = values.reshape(-1, used).copy()  # the last one before the experts is the one that counts
            return False

        def projection(name: str) -> See:
            def see(values: Floats) -> bool:
                held[name] = values.reshape(-1, used, rows).copy()  # its memory is used again
                return False

            return see

        def product(values: Floats) -> bool:
            chosen = held["experts"].view(np.int32).astype(np.int64)
            parts = ExpertPass(
                chosen, held["weights"], held["gate"], held["up"], values.reshape(len(chosen), used, rows)
            )
            return self._see(layer, parts)

        self.nodes |= {f"{_ORDER}-{layer}".encode(): order, f"{_PRODUCT}-{layer}".encode(): product}
        self.nodes |= {f"{name}-{layer}".encode(): weights for name in _WEIGHTS}
        self.nodes |= {f"ffn_moe_{name}-{layer}".encode(): projection(name) for name in ("gate", "up")}


class ExpertCounter:
    """Statistics of the experts' gates of one or several groups of answers.

    Args:
        shape: sizes of the model.
        activation: the gate's non-linearity.
        groups: how many statistics to keep apart.
        answers: how many answers there can be.
        where: the file, for a message.
    """

    def __init__(self, shape: ModelShape, activation: str, groups: int, answers: int, where: object) -> None:
        self._shape, self._activation, self._where = shape, activation, where
        self._bins = bin_of_bits(activation)
        sizes = (shape.layers, shape.experts, shape.width // shape.experts)
        self._counts: npt.NDArray[np.signedinteger[Any]] = np.zeros((answers, *sizes), AnswerCounts.kind(0))
        self._tokens = np.zeros(answers, np.int64)
        self._group_of = np.zeros(answers, np.int64)
        self._histogram = np.zeros((groups, *sizes, BIN_COUNT), np.int32)
        self._largest = np.full((groups, *sizes), -np.inf, np.float32)  # of the pre-activation
        self._routed = np.zeros((groups, *sizes[:2]), np.int64)
        self._rows: list[tuple[int, int]] = []  # answer and group of each row of the pass
        self._chosen: dict[int, Indices] = {}

    def begin(self, answers: Sequence[int], groups: Sequence[int]) -> None:
        """Expect a pass with one row for each of these answers."""
        self._rows = list(zip(answers, groups, strict=True))
        np.add.at(self._tokens, list(answers), 1)
        self._group_of[list(answers)] = groups
        self._counts = self._counts.astype(AnswerCounts.kind(int(self._tokens.max(initial=0))), copy=False)

    def nodes(self, experts: Experts) -> dict[bytes, See]:
        """For a tap: routing and gate of every layer."""
        nodes: dict[bytes, See] = {}
        for layer in range(self._shape.layers):

            def order(values: Floats, layer: int = layer) -> bool:
                self._chosen[layer] = values[:, : experts.used].copy().view(np.int32).astype(np.int64)
                return False

            def gate(values: Floats, layer: int = layer) -> bool:
                self._add(layer, values.reshape(-1, experts.used, experts.rows))
                return False

            nodes |= {f"{_ORDER}-{layer}".encode(): order, f"ffn_moe_gate-{layer}".encode(): gate}
        return nodes

    def _add(self, layer: int, gate: Floats) -> None:
        bins = self._bins[gate.view(np.uint32) >> DROPPED_BITS]
        for (answer, group), experts, row, row_bins in zip(
            self._rows, self._chosen[layer], gate, bins, strict=True
        ):  # a row's experts are all different, so nothing is added twice to one place
            place, neuron = np.nonzero(row_bins)
            self._counts[answer, layer, experts] += row_bins > 0
            self._histogram[group, layer, experts[place], neuron, row_bins[place, neuron] - 1] += 1
            self._routed[group, layer, experts] += 1
            largest = self._largest[group, layer]
            largest[experts] = np.maximum(largest[experts], row)

    def counts(self) -> AnswerCounts:
        """Of each answer."""
        return AnswerCounts(self._counts.reshape(len(self._counts), *self._layers_width), self._tokens)

    def results(self) -> list[ActivationStats]:
        """The statistics of each group.

        Raises:
            ModelError: a gate was not a number.
        """
        refuse_no_numbers(self._largest, self._where)
        return [self._result(group) for group in range(len(self._histogram))]

    def _result(self, group: int) -> ActivationStats:
        chosen = np.flatnonzero((self._group_of == group) & (self._tokens > 0))
        sizes = self._layers_width
        return ActivationStats(
            int(self._tokens[chosen].sum()),
            self._counts[chosen].sum(0, dtype=np.int64).reshape(sizes),
            self._histogram[group].reshape(*sizes, BIN_COUNT),
            activate(np.maximum(self._largest[group], 0), self._activation).reshape(sizes),
            self._routed[group],
        )

    @property
    def _layers_width(self) -> tuple[int, int]:
        return self._shape.layers, self._shape.width
