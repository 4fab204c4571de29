"""Counting gate activations in torch, on the model's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npti_export.routing import ExpertRouting, routing_for
from npti_export.stats import BIN_COUNT, EDGES, ActivationStats


class StatsAccumulator:
    """Builds an :class:`ActivationStats` from forward passes.

    Args:
        layers: of the model.
        width: neurons of a layer, of all its experts together.
        device: the model's.
        experts: of a layer; 1 in a dense model.
        products: whether the inputs of down projections will be seen, too.
    """

    def __init__(
        self, layers: int, width: int, device: torch.device, experts: int = 1, *, products: bool = False
    ) -> None:
        self._tokens = 0
        self._width, self._experts = width, experts
        self._active = torch.zeros((layers, width), dtype=torch.int64, device=device)
        self._histogram = torch.zeros((layers, width * BIN_COUNT), dtype=torch.int32, device=device)
        self._largest = torch.zeros((layers, width), dtype=torch.float32, device=device)
        self._routed = torch.zeros((layers, experts), dtype=torch.int64, device=device)
        # float64 where there is any: the sums of a shard, and of all of them, are right to the last digits
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._product = torch.zeros((2, layers, width), dtype=exact, device=device) if products else None
        self._answers: list[tuple[Any, Any]] = []  # [answers, layers, width] and [answers] of each pass
        self._edges = torch.from_numpy(EDGES).to(device)

    @contextmanager
    def listen(
        self,
        activations: Sequence[torch.nn.Module],
        counted: torch.Tensor,
        down_projections: Sequence[torch.nn.Module] = (),
    ) -> Iterator[None]:
        """Count, during the forward passes of the block, the positions of ``counted`` ``[batch, length]`` bool."""
        layers = len(activations)
        counts = torch.zeros((len(counted), layers, self._width), dtype=torch.int32, device=counted.device)
        with ExitStack() as stack:
            for layer, module in enumerate(activations):
                routing = routing_for(module)
                if routing is not None:
                    stack.enter_context(routing.listening())
                hook = self._hook(layer, counted, counts[:, layer], routing)
                stack.callback(module.register_forward_hook(hook).remove)
            for layer, module in enumerate(down_projections):
                stack.callback(module.register_forward_pre_hook(self._product_hook(layer, counted)).remove)
            yield
        self._tokens += int(counted.sum())
        self._answers.append((counts.cpu().numpy(), counted.sum(1).cpu().numpy()))

    def _hook(self, layer: int, counted: torch.Tensor, counts: torch.Tensor, routing: ExpertRouting | None) -> Any:
        owners = counted.nonzero()[:, 0]  # the answer of each counted position
        flat, length = counted.reshape(-1), counted.shape[1]

        def dense(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            self._add(layer, output[counted], owners, counts, slice(0, self._width))

        def of_expert(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            assert routing is not None
            rows = routing.rows_of(output)
            wanted = flat[rows.tokens]
            self._routed[layer, rows.expert] += wanted.sum()
            self._add(layer, output[wanted], rows.tokens[wanted] // length, counts, rows.neurons)

        return dense if routing is None else of_expert

    def _product_hook(self, layer: int, counted: torch.Tensor) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            assert self._product is not None
            values = inputs[0][counted].to(self._product.dtype)
            self._product[0, layer] += values.sum(0)
            self._product[1, layer] += values.square().sum(0)

        return hook

    def _add(
        self, layer: int, values: torch.Tensor, owners: torch.Tensor, counts: torch.Tensor, neurons: slice
    ) -> None:
        """Count activations ``[rows, neurons]`` of some of the layer's neurons; ``counts`` is ``[answers, width]``."""
        values = values.float()
        positive = values > 0
        if not len(values):
            return
        counts[:, neurons].index_add_(0, owners, positive.int())
        self._active[layer, neurons] += positive.sum(0)
        largest = self._largest[layer, neurons]
        torch.maximum(largest, values.max(0).values.clamp_min(0), out=largest)
        width = values.shape[1]
        first = torch.arange(width, device=values.device) * BIN_COUNT
        places = torch.bucketize(values, self._edges, right=True) + first
        bins = torch.bincount(places[positive], minlength=width * BIN_COUNT)
        self._histogram[layer, neurons.start * BIN_COUNT : neurons.stop * BIN_COUNT] += bins.int()

    def result(self) -> ActivationStats:
        """What was counted so far."""
        shape = (*self._active.shape, BIN_COUNT)
        return ActivationStats(
            self._tokens,
            self._active.cpu().numpy(),
            self._histogram.reshape(shape).cpu().numpy(),
            self._largest.cpu().numpy(),
            self._routed.cpu().numpy() if self._experts > 1 else None,
            None if self._product is None else self._product.double().cpu().numpy(),
        )

    def counts(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Active tokens ``[answers, layers, width]`` and tokens ``[answers]`` of each answer, in their order."""
        active, tokens = zip(*self._answers, strict=True)
        return np.concatenate(active), np.concatenate(tokens)
