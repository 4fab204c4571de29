"""Counting gate activations in torch, each layer's on the layer's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npti_export.routing import ExpertRouting, routing_for
from npti_export.stats import BIN_COUNT, EDGES, ActivationStats, AnswerCounts

# Activations that are sorted into bins at once: what that takes is some 20 bytes each, for a moment, beside the model.
# A processor takes as many as stay in its cache.
_AT_ONCE, _AT_ONCE_CPU, _PRODUCTS_CPU = 1 << 25, 1 << 21, 1 << 17
_CELL_BITS = 19  # a float32 without these: 4 bits of mantissa are left, a cell narrower than any bin of the statistics


class StatsAccumulator:
    """Builds an :class:`ActivationStats` from forward passes.

    Args:
        layers: of the model.
        width: neurons of a layer, of all its experts together.
        experts: of a layer; 1 in a dense model.
        products: whether the inputs of down projections will be seen, too.
    """

    def __init__(self, layers: int, width: int, experts: int = 1, *, products: bool = False) -> None:
        self._tokens = 0
        self._layers = [_LayerCounts(width, experts, products=products) for _ in range(layers)]
        self._experts, self._products = experts, products
        self._answers: list[AnswerCounts] = []  # of each pass

    @contextmanager
    def listen(
        self,
        activations: Sequence[torch.nn.Module],
        counted: torch.Tensor,
        down_projections: Sequence[torch.nn.Module] = (),
    ) -> Iterator[None]:
        """Count, during the forward passes of the block, the positions of ``counted`` ``[batch, length]`` bool."""
        with ExitStack() as stack:
            for layer, module in zip(self._layers, activations, strict=True):
                routing = routing_for(module)
                if routing is not None:
                    stack.enter_context(routing.listening())
                layer.begin(counted)
                stack.callback(module.register_forward_hook(_hook(layer, routing)).remove)
            for layer, module in zip(self._layers, down_projections, strict=False):
                stack.callback(module.register_forward_pre_hook(_product_hook(layer)).remove)
            yield
        self._tokens += int(counted.sum())
        tokens = counted.sum(1).cpu().numpy()
        kind = AnswerCounts.kind(int(tokens.max(initial=0)))
        counts = np.empty((len(tokens), len(self._layers), self._layers[0].width), kind)
        for place, layer in enumerate(self._layers):  # one after the other: there are as many counts as statistics
            counts[:, place] = layer.answers.cpu().numpy()
        self._answers.append(AnswerCounts(counts, tokens))

    def result(self) -> ActivationStats:
        """What was counted so far."""
        layers = self._layers
        return ActivationStats(
            self._tokens,
            _stacked([layer.active for layer in layers]),
            _stacked([layer.histogram.view(-1, BIN_COUNT) for layer in layers]),
            _stacked([layer.largest for layer in layers]),
            _stacked([layer.routed for layer in layers]) if self._experts > 1 else None,
            _stacked([layer.product for layer in layers], axis=1).astype(np.float64) if self._products else None,
        )

    def counts(self) -> list[AnswerCounts]:
        """Of each answer, in their order, pass by pass: joined they would be there twice."""
        return self._answers


class _LayerCounts:
    """What the neurons of one layer did. It lies where the layer computes, which the layer's first output says."""

    def __init__(self, width: int, experts: int, *, products: bool) -> None:
        self.width, self._experts, self._products = width, experts, products
        self._device = torch.device("cpu")  # until then

    def begin(self, counted: torch.Tensor) -> None:
        """A pass begins, of which the positions ``[batch, length]`` count."""
        self._counted = counted
        self._placed: torch.Tensor | None = None
        self.answers = torch.zeros((len(counted), self.width), dtype=torch.int32, device=self._device)

    def counted(self, output: torch.Tensor) -> torch.Tensor:
        """The positions, on the device of an output, as all that is counted from now on."""
        if self._placed is None:
            self._device = output.device
            self._placed, self.answers = self._counted.to(output.device), self.answers.to(output.device)
        return self._placed

    @cached_property
    def active(self) -> torch.Tensor:
        return torch.zeros(self.width, dtype=torch.int64, device=self._device)

    @cached_property
    def histogram(self) -> torch.Tensor:
        return torch.zeros(self.width * BIN_COUNT, dtype=torch.int32, device=self._device)

    @cached_property
    def largest(self) -> torch.Tensor:
        return torch.zeros(self.width, dtype=torch.float32, device=self._device)

    @cached_property
    def routed(self) -> torch.Tensor:
        return torch.zeros(self._experts, dtype=torch.int64, device=self._device)

    @cached_property
    def product(self) -> torch.Tensor:
        # float64 where there is any: the sums of a shard, and of all of them, are right to the last digits
        exact = torch.float32 if self._device.type == "mps" else torch.float64
        return torch.zeros((2, self.width), dtype=exact, device=self._device)

    @cached_property
    def _edges(self) -> torch.Tensor:
        return torch.from_numpy(EDGES).to(self._device)

    def add(self, values: torch.Tensor, owners: torch.Tensor, neurons: slice) -> None:
        """Count activations ``[rows, neurons]`` of some of the neurons, in the answers ``owners`` ``[rows]``."""
        rows = max(1, (_AT_ONCE_CPU if values.device.type == "cpu" else _AT_ONCE) // values.shape[1])
        for some, whose in zip(torch.split(values, rows), torch.split(owners, rows), strict=True):
            if len(some):
                self._add(some.float(), whose, neurons)

    def _add(self, values: torch.Tensor, owners: torch.Tensor, neurons: slice) -> None:
        positive = values > 0
        self.answers[:, neurons].index_add_(0, owners, positive.int())
        self.active[neurons] += positive.sum(0)
        largest = self.largest[neurons]
        torch.maximum(largest, values.amax(0).clamp_min(0), out=largest)
        width, kinds = values.shape[1], BIN_COUNT + 1  # with one for what is not positive
        places = self._bins(values)
        places += 1
        places *= positive
        places += torch.arange(0, width * kinds, kinds, dtype=torch.int32, device=values.device)
        counts = torch.bincount(places.view(-1), minlength=width * kinds).view(width, kinds)
        histogram = self.histogram[neurons.start * BIN_COUNT : neurons.stop * BIN_COUNT]
        histogram.view(width, BIN_COUNT).add_(counts[:, 1:])

    def _bins(self, values: torch.Tensor) -> torch.Tensor:
        """The bin in ``EDGES`` of each value, int32; of one that is not positive any."""
        if values.device.type != "cpu":
            return torch.bucketize(values, self._edges, right=True, out_int32=True)
        # a quarter of the time: a processor takes a value's seven steps of a search one after the other
        cells = values.abs().view(torch.int32).bitwise_right_shift_(_CELL_BITS).view(-1)
        lowest, edges = _cells()
        bins = lowest.index_select(0, cells)
        bins += values.reshape(-1) >= edges.index_select(0, cells)
        return bins.view(values.shape)

    def add_products(self, values: torch.Tensor) -> None:
        """Add inputs of the down projection, ``[rows, width]``."""
        for some in torch.split(values, max(1, _AT_ONCE // values.shape[1])):
            columns = max(64, _PRODUCTS_CPU // max(1, len(some))) if some.device.type == "cpu" else self.width
            pieces = zip(torch.split(some, columns, 1), torch.split(self.product, columns, 1), strict=True)
            for piece, product in pieces:
                exact = piece.to(product.dtype)
                product[0] += exact.sum(0)
                product[1] += exact.square().sum(0)

    @property
    def every(self) -> slice:
        """All neurons."""
        return slice(0, self.width)


@cache
def _cells() -> tuple[torch.Tensor, torch.Tensor]:
    """For the upper bits of a positive float32: the bin of the least such number, and the edge above which it is the
    next one, int32 and float32; NaN, above which nothing is, where all are in one bin."""
    bits = np.arange(1 << (31 - _CELL_BITS), dtype=np.uint32) << _CELL_BITS
    first, last = (one.view(np.float32) for one in (bits, bits | ((1 << _CELL_BITS) - 1)))
    lowest, highest = (np.searchsorted(EDGES, one, side="right") for one in (first, last))
    assert (highest - lowest).max() == 1
    edges = np.where(highest > lowest, np.append(EDGES, np.nan)[lowest], np.nan)
    return torch.from_numpy(lowest.astype(np.int32)), torch.from_numpy(edges.astype(np.float32))


def _hook(layer: _LayerCounts, routing: ExpertRouting | None) -> Any:
    def dense(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        counted = layer.counted(output)
        layer.add(output[counted], counted.nonzero()[:, 0], layer.every)

    def of_expert(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        assert routing is not None
        counted, rows = layer.counted(output), routing.rows_of(output)
        wanted = counted.reshape(-1)[rows.tokens]
        layer.routed[rows.expert] += wanted.sum()
        layer.add(output[wanted], rows.tokens[wanted] // counted.shape[1], rows.neurons)

    return dense if routing is None else of_expert


def _product_hook(layer: _LayerCounts) -> Any:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        layer.add_products(inputs[0][layer.counted(inputs[0])])

    return hook


def _stacked(parts: Sequence[torch.Tensor], axis: int = 0) -> npt.NDArray[Any]:
    return np.stack([part.cpu().numpy() for part in parts], axis=axis)
