"""What every GGUF of ours says about itself, under ``npti.``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from npti_export.export.gguf import record
from npti_export.gguf.writer import Value
from npti_export.rule_bytes import encode_rule
from npti_export.rule_io import Provenance, SavedRule, described
from npti_export.verify import Fidelity


def steering_metadata(saved: SavedRule, base: Path) -> dict[str, Value]:
    """The rule and where it came from; what verification measures is NaN until it is recorded.

    Args:
        saved: the rule.
        base: the unsteered file.
    """
    about = replace(saved.about, recipe="", fidelity={})
    placeholders: dict[str, Value] = {f"fidelity.{name}": float("nan") for name in Fidelity.__dataclass_fields__}
    return {
        "version": about.version,
        "trait": about.trait,
        **({} if about.gamma is None else {"gamma": about.gamma}),
        "recipe": saved.about.recipe,
        "model.fingerprint": about.fingerprint.float32,
        "base.name": ascii_name(base),
        "neurons.shift": saved.rule.shifted,
        "neurons.clamp": saved.rule.clamped,
        **({"neurons.constant": saved.rule.constants} if saved.rule.constants else {}),
        "provenance": json.dumps(described(replace(saved, about=about)), sort_keys=True, ensure_ascii=False),
        "rule": encode_rule(saved.rule),
        **placeholders,
    }


def record_fidelity(path: Path, about: Provenance) -> None:
    """Fill in what verification measured, in place of the NaNs."""
    record(path, {f"fidelity.{name}": value for name, value in about.fidelity.items()})


def ascii_name(path: Path) -> str:
    """A file's name with what is not ASCII escaped, fit for metadata whatever bytes the file system holds."""
    return path.name.encode("ascii", "backslashreplace").decode("ascii")
