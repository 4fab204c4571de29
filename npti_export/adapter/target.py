"""Where an adapter goes in a loaded model, and whether it belongs there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from npti_export.adapter.config import NptiConfig
from npti_export.architectures import Architecture, by_model_type
from npti_export.down_input import DOWN
from npti_export.errors import AdapterError, ArchitectureError
from npti_export.fingerprint import fingerprint
from npti_export.routing import experts_width
from npti_export.rule_io import read_provenance


@dataclass(frozen=True)
class Target:
    """The places of a model.

    Attributes:
        model: the transformers model, without wrappers of PEFT.
        decoder: the module inside that holds the layers.
        pattern: regular expression for the names of the activation modules, the layer's number as its first group.
        layers: name of the list of layers.
        names: of the activation modules, in the order of the layers.
        width: neurons in each layer's MLP.
        row: of the table of architectures, if the family is in it.
        mixture: whether each activation module serves all experts of its layer.
    """

    model: Any
    decoder: Any
    pattern: str
    layers: str
    names: tuple[str, ...]
    width: int
    row: Architecture | None
    mixture: bool = False

    def activations(self) -> list[nn.Module]:
        """The activation modules (or what wraps them), in the order of the layers."""
        return [self.model.get_submodule(name) for name in self.names]


def find_target(model: nn.Module, config: NptiConfig | None) -> Target:
    """Find the activation modules and check that an adapter is for this model.

    Args:
        model: a transformers model, maybe with adapters in it.
        config: of the adapter; None checks nothing.

    Raises:
        AdapterError: other sizes, another fingerprint, MLPs that do not call their activation module, or that have no
            down projection where the adapter needs one.
        ArchitectureError: a family that is not in the table, and no ``target_modules``.
    """
    inner = _unwrapped(model)
    model_type = str(getattr(inner.config, "model_type", None))
    pattern = None if config is None else config.target_modules
    row = _row(model_type, required=pattern is None)
    pattern = pattern or (row.act_pattern if row else "")
    found = [(match, name) for name, _ in inner.named_modules() if (match := re.fullmatch(pattern, name))]
    if not found:
        raise AdapterError(f"{model_type} model: no module is called {pattern}; set target_modules to what is")
    if any(match.re.groups == 0 for match, _ in found):
        raise AdapterError(f"target_modules {pattern!r}: must capture the layer's number, such as layers\\.(\\d+)\\.")
    names = tuple(name for _, name in sorted(found, key=lambda one: int(one[0][1])))
    layers = names[0][: found[0][0].start(1) - 1]
    decoder = inner.get_submodule(layers.rpartition(".")[0])
    width = int(getattr(inner.config, "intermediate_size", 0) or 0) or int((config and config.width) or 0)
    mixture = row is not None and row.mixture
    if mixture:
        width = _neurons(inner, names)
    target = Target(inner, decoder, pattern, layers, names, width, row, mixture)
    _refuse_deaf(target)
    if config is not None and config.constant:
        _refuse_without_down(target)
    if config is not None:
        _refuse_other_sizes(target, config)
        _refuse_other_model(target, config)
    return target


def _neurons(model: Any, names: tuple[str, ...]) -> int:
    """Neurons in each layer of a mixture of experts.

    Raises:
        AdapterError: some layers have no experts.
    """
    places = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if len(places) != model.config.num_hidden_layers:
        raise AdapterError(
            f"the model has {model.config.num_hidden_layers} layers, of which {len(places)} have experts; models with "
            "layers of both kinds cannot be steered yet"
        )
    return experts_width(places[0])


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "get_base_model"):  # a PeftModel
        model = model.get_base_model()
    return model


def _row(model_type: str, *, required: bool) -> Architecture | None:
    try:
        return by_model_type(model_type, "adapter")
    except ArchitectureError:
        if required:
            raise
        return None


def _refuse_other_sizes(target: Target, config: NptiConfig) -> None:
    for what, wanted, found in (
        ("layers", config.layers, len(target.names)),
        ("neurons a layer", config.width, target.width),
    ):
        if wanted is not None and wanted != found:
            raise AdapterError(
                f"the adapter is for a model of {wanted} {what}, this one has {found}; make an adapter for this model"
            )


def _refuse_other_model(target: Target, config: NptiConfig) -> None:
    """Compare fingerprints, in the dtype in which the model's norms are; norms kept off the device cannot be read."""
    if config.provenance is None or target.row is None:
        return
    provenance = config.provenance
    about = read_provenance(lambda: provenance, "adapter")
    final = target.row.final_norm.removesuffix(".weight").rpartition(".")[2]
    names = [f"{target.layers}.{index}.{norm}" for index in range(len(target.names)) for norm in target.row.norms]
    norms = [target.model.get_submodule(name).weight for name in names] + [target.decoder.get_submodule(final).weight]
    if any(norm.is_meta for norm in norms):
        return
    assert all(isinstance(norm, torch.Tensor) for norm in norms)
    dtype = str(norms[0].dtype).removeprefix("torch.")
    values = (norm.detach().float().cpu().numpy() for norm in norms)
    found = fingerprint(values, target.row.norm_offset).float32
    if found != about.fingerprint.of_dtype(dtype):
        raise AdapterError(
            f"the adapter was made for another model ({about.model}; fingerprint {about.fingerprint.float32[:12]}…, "
            f"this one has {found[:12]}…); make one for this model, or remove provenance from its adapter_config.json"
        )


def _refuse_without_down(target: Target) -> None:
    for name in target.names:
        mlp = target.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(getattr(mlp, DOWN, None), nn.Module):
            raise AdapterError(
                f"{name}: {type(mlp).__name__} has no {DOWN} beside it, at whose input the adapter's constants belong; "
                "bake this rule into a GGUF instead"
            )


def _refuse_deaf(target: Target) -> None:
    """An MLP that was replaced by a fused kernel may ignore its activation module: steering would do nothing, silently.

    Raises:
        AdapterError: the first layer's MLP, run on zeros, does not call its activation module.
    """
    name = target.names[0]
    mlp = target.model.get_submodule(name.rpartition(".")[0])
    weight = next((value for value in mlp.parameters() if value.ndim >= 2), None)
    if weight is None or weight.is_meta or not weight.is_floating_point() or not target.width:
        return
    heard: list[None] = []
    handle = target.model.get_submodule(name).register_forward_hook(lambda *_: heard.append(None))
    try:
        with torch.no_grad():
            x = torch.zeros(1, 1, target.model.config.hidden_size, device=weight.device, dtype=weight.dtype)
            if target.mixture:  # one token for the first expert
                mlp(x[0], torch.zeros(1, 1, dtype=torch.int64, device=x.device), x.new_ones(1, 1))
            else:
                mlp(x)
    finally:
        handle.remove()
    if not heard:
        raise AdapterError(
            f"{name}: is not called by its MLP ({type(mlp).__name__}, perhaps a fused kernel), so a rule would do "
            "nothing; load the model without kernel replacements"
        )
