"""Write a rule as a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path

from npti_export.rule_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SavedRule, adapter_tensors
from npti_export.steer import Where


def write_adapter(saved: SavedRule, directory: Path, *, where: Where = "all") -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing directory.

    Args:
        saved: the rule; its provenance becomes part of the configuration.
        directory: where to.
        where: the positions that the adapter steers when it is loaded.
    """
    from safetensors.numpy import save

    from npti_export.adapter.config import NptiConfig

    layers, width = saved.rule.shift.shape
    config = NptiConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=saved.about.base,
        inference_mode=True,
        layers=layers,
        width=width,
        where=where,
        provenance=saved.about.to_dict(),
    )
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    (directory / ADAPTER_WEIGHTS).write_bytes(save(adapter_tensors(saved), metadata={"format": "pt"}))
