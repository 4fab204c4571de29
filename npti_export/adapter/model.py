"""The tuner: finds the activation modules, checks that the adapter is for this model, wraps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from npti_export.adapter.config import NptiConfig
from npti_export.adapter.layer import NptiLayer
from npti_export.adapter.merge import merged_model
from npti_export.adapter.target import Target, find_target
from npti_export.attached import AttachedActivation
from npti_export.errors import AdapterError
from npti_export.positions import positions_of
from npti_export.routing import routing_of
from npti_export.rule_io import CLAMP, CONSTANT, SHIFT, check_names, from_layers


class NptiModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """PEFT's side of an ``npti`` adapter; see :class:`npti_export.adapter.config.NptiConfig` for its settings."""

    prefix = "npti_"
    tuner_layer_cls = NptiLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the activation modules, after a check that leaves the model untouched if it fails.

        Raises:
            AdapterError: another model, or an MLP that does not call its activation module.
            ArchitectureError: a family that is not in the table, and no ``target_modules``.
        """
        self._target = find_target(model, self.peft_config[adapter_name])
        if any(isinstance(module, AttachedActivation) for module in self._target.activations()):
            raise AdapterError("a rule is attached to this model: detach it first, or attach this adapter, too")
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _follow_positions(self._target)

    def set_strength(self, strength: float, adapter_name: str | None = None) -> None:
        """See :func:`npti_export.adapter.control.set_strength`."""
        from npti_export.adapter.control import set_strength

        set_strength(self.model, strength, adapter_name)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """A stock model with a wider MLP that holds the rule of the active (or named) adapters.

        Saving and reloading it keeps the steering. It shares the other weights with this model, which should not be
        used any more.

        Raises:
            ArchitectureError: transformers has no class for this family whose MLP has biases.
            AdapterError: an adapter steers the response only, another tuner's adapter is in the model, or a name is
                not one of its adapters.
        """
        target = find_target(self.model, None)
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(f"merge_and_unload: there is no adapter {name!r}")
        return merged_model(target, list(names), self.unload)

    def _prepare_adapter_config(self, peft_config: NptiConfig, model_config: dict[str, Any]) -> NptiConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = self._target.pattern
        return peft_config

    def _create_and_replace(
        self,
        peft_config: NptiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        device = next((weight.device for weight in parent.parameters()), torch.device("cpu"))
        if not isinstance(target, NptiLayer):
            wrapper = NptiLayer(target)
            wrapper.listen(routing_of(parent) if self._target.mixture else None)
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        width = self._target.width
        device = torch.device("cpu") if device.type == "meta" else device
        target.update_layer(adapter_name, peft_config, width, device, parent)
        cast(Any, target).set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # an activation has no weight whose device or state could be taken over
        if isinstance(child, NptiLayer):
            child.let_go()
            if child.npti_routing is not None:
                child.npti_routing.release()
                child.npti_routing = None
            child.leave_down()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("adapter_names: npti adapters steer all rows of a batch alike; use set_adapter")
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: NptiConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Ours alone: a LoRA beside it may have the same adapter name."""
        return {key: value for key, value in state_dict.items() if key.endswith(_endings(adapter_name))}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NptiConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Every tensor of the file must be of this model, and none may be missing; PEFT itself would only warn.

        Names are compared from the list of layers on: a model inside two PeftModels has a longer name than the file's.
        """
        endings = _endings(adapter_name)
        expected = {key: value for key, value in model.state_dict().items() if key.endswith(endings)}
        places = {from_layers(key.removesuffix(f".{adapter_name}")): key for key in expected}
        mapped = {places.get(from_layers(key), key): value for key, value in state_dict.items()}
        where = f"adapter {adapter_name!r}"
        check_names(set(expected), set(mapped), where)
        for name, tensor in mapped.items():
            if tensor.shape != expected[name].shape:
                raise AdapterError(
                    f"{where}: tensor {name} is {tuple(tensor.shape)}, in the model it is "
                    f"{tuple(expected[name].shape)}; make the adapter for this model"
                )
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{where}: tensor {name} holds values that are not finite; make the adapter again")
        return mapped


def _endings(adapter_name: str) -> tuple[str, ...]:
    """What the names of an adapter's tensors in a model end with."""
    return tuple(f".{kind}.{adapter_name}" for kind in (SHIFT, CLAMP, CONSTANT))


def _follow_positions(target: Target) -> None:
    """Let layers with an adapter for the response only know which positions these are."""
    layers = [module for module in target.activations() if isinstance(module, NptiLayer)]
    if any("response" in layer.npti_where.values() for layer in layers):
        for layer in layers:
            layer.follow(positions_of(target.model, target.decoder))
