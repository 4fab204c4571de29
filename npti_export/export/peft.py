"""Write a rule as a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path

from npti_export.rule_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SavedRule, adapter_tensors, described


def write_adapter(saved: SavedRule, directory: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing directory.

    Args:
        saved: the rule; its provenance and positions become part of the configuration.
        directory: where to.
    """
    from safetensors.numpy import save

    from npti_export.adapter.config import NptiConfig

    layers, width = saved.rule.shift.shape
    base = saved.about.base
    config = NptiConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=None if base is None or base.endswith(".gguf") else base,  # PEFT loads no GGUF
        inference_mode=True,
        layers=layers,
        width=width,
        constant=saved.rule.constant is not None,
        where=saved.where,
    )
    text = json.dumps(
        {**config.to_dict(), "provenance": described(saved)}, indent=2, sort_keys=True, ensure_ascii=False
    )
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    (directory / ADAPTER_WEIGHTS).write_bytes(save(adapter_tensors(saved), metadata={"format": "pt"}))
