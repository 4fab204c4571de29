"""The wrapper around one activation module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from npti_export.adapter.config import NptiConfig
from npti_export.down_input import DownInput
from npti_export.errors import AdapterError
from npti_export.positions import ResponsePositions
from npti_export.routing import ExpertRouting
from npti_export.rule_io import Where, check_strength, check_where
from npti_export.steer import NOT_LOADED, LayerSteering, Share


class NptiLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """Stands where ``mlp.act_fn`` stood: ``where(clamp, min(a, 0), a) + strength * shift`` of its output ``a``.

    Constants are added to the input of ``mlp.down_proj`` by a hook there, once an adapter has some.

    Args:
        base_layer: the activation module, or another tuner's wrapper of it.

    Attributes:
        npti_shift: per adapter ``[width]`` float32, whatever the model's dtype: rounded to bfloat16 it would cost
            as much fidelity as a quantised file.
        npti_constant: per adapter that has one ``[width]`` float32, likewise.
        npti_clamp: per adapter ``[width]`` uint8, 1 for a clamped neuron.
        npti_strength: per adapter.
        npti_where: per adapter ``all`` or ``response``.
        positions: follows the model's passes, if an adapter steers the response only.
        npti_routing: in a mixture of experts, says whose activation it is given.
        down: the hook at the down projection, if an adapter has constants.
    """

    adapter_layer_names = ("npti_shift", "npti_constant")
    other_param_names = ("npti_clamp", "npti_strength", "npti_where")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.npti_shift = nn.ParameterDict()
        self.npti_constant = nn.ParameterDict()
        self.npti_clamp = BufferDict(persistent=True)
        self.npti_strength: dict[str, float] = {}
        self.npti_where: dict[str, Where] = {}
        self.positions: ResponsePositions | None = None
        self.npti_routing: ExpertRouting | None = None
        self.down: DownInput | None = None
        self.steering = LayerSteering()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(
        self, adapter_name: str, config: NptiConfig, width: int, device: torch.device, mlp: nn.Module
    ) -> None:
        """Make room for an adapter: zeros for a new one, placeholders for one whose weights are to be loaded."""
        fresh = config.init_weights
        shift = torch.full((width,), 0.0 if fresh else float("nan"), dtype=torch.float32, device=device)
        if config.constant:
            self.npti_constant[adapter_name] = nn.Parameter(shift.clone(), requires_grad=not config.inference_mode)
            self.down = self.down or DownInput(mlp, self)
        clamp = torch.full((width,), 0 if fresh else NOT_LOADED, dtype=torch.uint8, device=device)
        self.npti_shift[adapter_name] = nn.Parameter(shift, requires_grad=not config.inference_mode)
        self.npti_clamp[adapter_name] = clamp
        self.npti_strength[adapter_name] = check_strength(config.strength)
        self.npti_where[adapter_name] = check_where(config.where)

    def shares(self, adapters: list[str] | None = None) -> list[Share]:
        """The parts of the active (or the named) adapters in this layer."""
        names = self._active_adapter if adapters is None else adapters
        if isinstance(names, str):
            names = [names]
        # Straight to the dictionaries: this runs for each layer and token, and Module's own look-ups take microseconds.
        shift, clamp, constant = (
            cast(Any, self._modules["npti_shift"])._parameters,
            cast(Any, self._modules["npti_clamp"])._buffers,
            cast(Any, self._modules["npti_constant"])._parameters,
        )
        strength, where = self.npti_strength, self.npti_where
        return [
            Share(name, shift[name], clamp[name], strength[name], where[name], constant.get(name))
            for name in names
            if name in strength
        ]

    def active_shares(self) -> list[Share]:
        """See :class:`npti_export.down_input.HasShares`."""
        return [] if self._disable_adapters else self.shares()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``x`` is the gate projection's output ``[…, width]``."""
        a: torch.Tensor = cast(nn.Module, self._modules["base_layer"])(x, *args, **kwargs)
        routing = self.npti_routing
        if routing is not None:
            if not self.steers:
                return a
            return self.steering.of_expert(a, self.shares(), routing.rows_of(a), self.positions)
        if self.down is not None and not torch.compiler.is_compiling():
            self.down.place()
        if self._disable_adapters:
            return a
        return self.steering(a, self.shares(), self.positions)

    @property
    def steers(self) -> bool:
        """Whether an adapter is at work here."""
        return not self._disable_adapters and any(share.strength for share in self.shares())

    def follow(self, positions: ResponsePositions) -> None:
        """Learn which positions are the response's, if an adapter here steers these only."""
        if self.positions is None and "response" in self.npti_where.values():
            self.positions = positions
            positions.retain()

    def listen(self, routing: ExpertRouting | None) -> None:
        """Learn whose activation it is given, in a mixture of experts."""
        self.npti_routing = routing
        if routing is not None:
            routing.retain()

    def let_go(self) -> None:
        """The inverse of :meth:`follow`."""
        if self.positions is not None:
            self.positions.release()
            self.positions = None

    def leave_down(self) -> None:
        """The down projection is as before."""
        if self.down is not None:
            self.down.remove()
            self.down = None

    def delete_adapter(self, adapter_name: str) -> None:
        """See :class:`peft.tuners.tuners_utils.BaseTunerLayer`."""
        super().delete_adapter(adapter_name)
        if "response" not in self.npti_where.values():
            self.let_go()
        if not len(self.npti_constant):
            self.leave_down()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A rule cannot be merged into the weights in place.

        Raises:
            AdapterError: always; ``merge_and_unload`` gives a widened model.
        """
        raise AdapterError("a rule cannot be merged in place; merge_and_unload() gives a wider model that holds it")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NptiLayer:
        """Moves like any module, but a cast of the model leaves shifts and constants in float32, bit for bit."""
        kept = (self.npti_shift, self.npti_constant)
        exact = [{name: parameter.data for name, parameter in one.items()} for one in kept]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for one, values in zip(kept, exact, strict=True):
            for name, parameter in one.items():
                if parameter.dtype != torch.float32 and not parameter.is_meta:
                    parameter.data = values[name].to(parameter.device)
        return self
