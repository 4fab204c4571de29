"""What a family multiplies the output of its MLPs by before it joins the residual stream."""

from __future__ import annotations

import math

from npti_export.errors import GGUFError
from npti_export.gguf.reader import GGUFFile, layer_count

_MINICPM_DEPTH = 1.4  # over the square root of the layers, where an older file does not say (src/models/minicpm.cpp)


def residual_scale(header: GGUFFile) -> float:
    """The factor, 1 for most families.

    Raises:
        GGUFError: the file gives something that is no number.
    """
    key = f"{header.architecture}.residual_scale"
    default = _MINICPM_DEPTH / math.sqrt(layer_count(header)) if header.architecture == "minicpm" else 1.0
    entry = header.by_key.get(key)
    if entry is None or header.architecture not in ("granite", "minicpm"):
        return default
    value = None if entry.array is not None else entry.value
    if not isinstance(value, float) or not math.isfinite(value):
        raise GGUFError(f"{header.path}: {key} is not a number; the file is damaged")
    return value or 1.0  # llama.cpp leaves a scale of zero out (src/models/granite.cpp)
