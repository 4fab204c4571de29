"""Mixtures of experts in torch: whose rows of which tokens an activation module is given.

In these models one activation module serves all experts of a layer, and only the tokens that the router sends to an
expert reach it. A neuron is one row of one expert; the neurons of a layer are numbered expert by expert.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from npti_export.errors import AdapterError

_ATTRIBUTE = "npti_routing"


@dataclass(frozen=True)
class ExpertRows:
    """One call of the activation module.

    Attributes:
        expert: which of the layer's.
        neurons: places of its neurons among the layer's.
        tokens: ``[rows]`` int64, the token of each row, numbered through the batch.
    """

    expert: int
    neurons: slice
    tokens: torch.Tensor


class _Pass(threading.local):
    """What is known of the pass of one thread."""

    rows: ExpertRows | None = None  # of the call under way


class ExpertRouting:
    """Stands in the place of one experts module's ``forward``.

    While somebody listens or steers, the experts are computed one after the other, by the model's own plain code
    (grouped kernels hand over the rows of all experts at once, in an order of their own); else as they would be.

    Args:
        experts: a transformers module that takes hidden states ``[tokens, hidden]``, expert indices and weights
            ``[tokens, experts per token]``, and holds ``act_fn``, ``num_experts`` and ``down_proj``.
    """

    def __init__(self, experts: torch.nn.Module) -> None:
        self._experts: Any = experts
        self._pass = _Pass()
        self._users = self._listeners = 0
        experts.__dict__["forward"] = self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and saved models: everything but the pass under way."""
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pass=_Pass())

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' ``forward``.

        Raises:
            AdapterError: the model did not call its activation once for each expert that has tokens.
        """
        own = type(self._experts).forward
        act = self._experts.act_fn
        if not (self._listeners or getattr(act, "steers", False)):
            result: torch.Tensor = own(self._experts, hidden_states, top_k_index, top_k_weights)
            return result
        calls, thread = self._expected(top_k_index), threading.get_ident()

        def begin(*_: Any) -> None:
            if threading.get_ident() == thread:  # the same model may be at work in another one
                self._pass.rows = next(calls, None)

        handle = act.register_forward_pre_hook(begin)
        try:
            plain = getattr(own, "__wrapped__", own)
            result = plain(self._experts, hidden_states, top_k_index, top_k_weights)
        finally:
            handle.remove()
            self._pass.rows = None
        if next(calls, None) is not None:
            raise self._other_order()
        return result

    def _expected(self, index: torch.Tensor) -> Iterator[ExpertRows]:
        """In the order of transformers' plain experts: expert by expert, by place in the top k, then by token."""
        width = self.rows
        for expert in sorted(set(index.flatten().tolist())):
            if 0 <= expert < self._experts.num_experts:  # a number beyond means that the token goes to no expert
                tokens = torch.where((index == expert).T)[1]
                yield ExpertRows(expert, slice(expert * width, (expert + 1) * width), tokens)

    def rows_of(self, a: torch.Tensor) -> ExpertRows:
        """Whose activation ``a`` ``[rows, neurons of the expert]`` is.

        Raises:
            AdapterError: it is not the one that was to come.
        """
        found = self._pass.rows
        if found is None or a.shape != (len(found.tokens), self.rows):
            raise self._other_order()
        return found

    @property
    def rows(self) -> int:
        """Neurons of one expert."""
        return int(self._experts.down_proj.shape[-1])

    def _other_order(self) -> AdapterError:
        return AdapterError(
            f"{type(self._experts).__name__}: computes its experts in an order that is not known here, so that a rule "
            "would steer other neurons; load the model without kernel replacements"
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, :meth:`rows_of` answers."""
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1

    def retain(self) -> None:
        """One more user needs this."""
        self._users += 1

    def release(self) -> None:
        """One user less needs this; with the last one, the module is as it was."""
        self._users -= 1
        if not self._users:
            del self._experts.__dict__["forward"]


def experts_width(experts: Any) -> int:
    """Neurons of all experts of a layer."""
    return int(experts.num_experts) * int(experts.down_proj.shape[-1])


def routing_of(experts: torch.nn.Module) -> ExpertRouting:
    """The one router's ear of an experts module, made on first use."""
    found = experts.__dict__.get("forward")
    return found if isinstance(found, ExpertRouting) else ExpertRouting(experts)


def tell(act: torch.nn.Module, routing: ExpertRouting) -> None:
    """Let an activation module know where its rows come from, for :func:`routing_for`."""
    act.__dict__[_ATTRIBUTE] = routing


def routing_for(act: torch.nn.Module) -> ExpertRouting | None:
    """What an activation module was told; None in a dense model."""
    found = act.__dict__.get(_ATTRIBUTE)
    assert found is None or isinstance(found, ExpertRouting)
    return found
