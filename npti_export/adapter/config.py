"""What ``adapter_config.json`` says of an adapter of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from npti_export.rule_bytes import RULE_SHA256
from npti_export.rule_io import PEFT_TYPE, check_strength, check_where


@dataclass
class NptiConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Configuration of an ``npti`` adapter.

    Args:
        layers: decoder layers of the model that it is for; None accepts any number.
        width: neurons in each layer's MLP; None accepts any.
        constant: whether it adds something to the input of ``down_proj``, too.
        strength: multiplies shifts and constants; 0 switches the adapter off, clamps included.
        where: ``all`` positions (what baked files do) or those of the ``response`` only (what the paper's code does).
        target_modules: regular expression for the names of the activation modules, with the layer's number as its
            first group; None takes it from the table of architectures.
        provenance: trait, recipe and fingerprint, see :class:`npti_export.rule_io.Provenance`. None accepts any model.
        init_weights: begin with zeros, as for a new adapter; a saved adapter waits for its weights instead.

    Raises:
        AdapterError: a strength below zero, or another ``where``.
    """

    layers: int | None = None
    width: int | None = None
    constant: bool = False
    strength: float = 1.0
    where: str = "all"
    target_modules: str | None = None
    provenance: dict[str, Any] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE)
        check_strength(self.strength)
        check_where(self.where)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: an adapter read from a file has weights that must come from that file.

        These may have been trained or rounded since, so the checksum of those that it was made with is left out.
        """
        values = {**super().to_dict(), "init_weights": False}
        if isinstance(values["provenance"], dict):
            values["provenance"].pop(RULE_SHA256, None)  # of a copy
        return values
