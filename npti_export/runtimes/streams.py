"""Means of the residual stream in torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class StreamMeans:
    """Adds up the residual stream behind each layer over forward passes.

    Args:
        layers: the decoder layers.
        hidden: size of the stream.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], hidden: int) -> None:
        self._layers = layers
        self._sums = torch.zeros((len(layers), hidden), dtype=torch.float64)
        self._count = 0

    def listen(self, counted: torch.Tensor) -> ExitStack:
        """A block in which forward passes are counted at positions ``[batch, length]`` bool."""
        self._count += int(counted.sum())
        stack = ExitStack()
        for at, layer in enumerate(self._layers):
            stack.callback(layer.register_forward_hook(partial(self._see, at, counted)).remove)
        return stack

    def _see(self, at: int, counted: torch.Tensor, _module: Any, _inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        self._sums[at] += stream[counted.to(stream.device)].double().sum(0).cpu()

    def result(self) -> npt.NDArray[np.float64]:
        """The means, ``[layers, hidden]``."""
        return (self._sums / max(self._count, 1)).numpy()


class StreamFollower:
    """Moves the stream of a pass behind each layer to where it is wanted, and adds up what that took.

    Args:
        layers: the decoder layers.
        wanted: ``[layers, hidden]``, the change of the mean.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], wanted: npt.NDArray[np.float64]) -> None:
        self._layers, self._wanted = layers, torch.from_numpy(wanted)
        self._sums, self._plain = torch.zeros_like(self._wanted), torch.zeros_like(self._wanted)
        self._count = 0

    def looking(self, counted: torch.Tensor) -> ExitStack:
        """A block whose pass shows where the stream is, at positions ``[batch, length]`` bool."""
        self._count += int(counted.sum())
        return self._hooked(self._look, counted)

    def moving(self, counted: torch.Tensor) -> ExitStack:
        """A block whose pass, over the same, is moved."""
        return self._hooked(self._move, counted)

    def _hooked(self, hook: Any, counted: torch.Tensor) -> ExitStack:
        stack = ExitStack()
        for at, layer in enumerate(self._layers):
            stack.callback(layer.register_forward_hook(partial(hook, at, counted)).remove)
        return stack

    def _look(self, at: int, counted: torch.Tensor, _module: Any, _inputs: Any, output: Any) -> None:
        self._plain[at] = _mean(output, counted)

    def _move(self, at: int, counted: torch.Tensor, _module: Any, _inputs: Any, output: Any) -> Any:
        share = self._wanted[at] - (_mean(output, counted) - self._plain[at])
        self._sums[at] += share * int(counted.sum())
        if isinstance(output, tuple):
            return (_plus(share, None, None, output[0]), *output[1:])
        return _plus(share, None, None, output)

    def result(self) -> npt.NDArray[np.float64]:
        """The mean of what was added, ``[layers, hidden]``."""
        return (self._sums / max(self._count, 1)).numpy()


def _mean(output: Any, counted: torch.Tensor) -> torch.Tensor:
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream[counted.to(stream.device)].double().mean(0).cpu()


def adding(downs: Sequence[torch.nn.Module], added: npt.NDArray[np.float64]) -> ExitStack:
    """A block in which each down projection's output gets a row of ``added`` ``[layers, hidden]``."""
    stack = ExitStack()
    for down, row in zip(downs, added, strict=True):
        stack.callback(down.register_forward_hook(partial(_plus, torch.from_numpy(row))).remove)
    return stack


def _plus(row: torch.Tensor, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return (output.double() + row.to(output.device)).to(output.dtype)
