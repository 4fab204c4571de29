"""Change attached adapters while they run."""

from __future__ import annotations

from torch import nn

from npti_export.adapter.config import NptiConfig
from npti_export.adapter.layer import NptiLayer
from npti_export.errors import AdapterError
from npti_export.rule_io import check_strength


def set_strength(model: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Set the strength of an adapter that is loaded through PEFT or transformers.

    Args:
        model: where it is loaded.
        strength: 0 switches it off (bitwise the base model), 1 is what it was made with; multiplies the shifts.
        adapter_name: which; None means all ``npti`` adapters.

    Raises:
        AdapterError: no such adapter, or a strength below zero.
    """
    value = check_strength(strength)
    changed = False
    for module in model.modules():
        for name, config in module.__dict__.get("peft_config", {}).items():
            if isinstance(config, NptiConfig) and adapter_name in (None, name):
                config.strength = value  # so that save_pretrained keeps it
        if isinstance(module, NptiLayer):
            for name in list(module.npti_strength) if adapter_name is None else [adapter_name]:
                if name in module.npti_strength:
                    module.npti_strength[name] = value
                    changed = True
    if not changed:
        raise AdapterError(f"no npti adapter {adapter_name or ''} in this model; load one first".replace("  ", " "))
