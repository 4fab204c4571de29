"""npti-export: give a language model a fixed personality.

Importing this package makes PEFT and transformers load ``npti`` adapters; it is cheap, as what needs torch is imported
when it is used or when ``peft`` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrapt.importer import register_post_import_hook

from npti_export.version import __version__

if TYPE_CHECKING:
    from npti_export.adapter.config import NptiConfig
    from npti_export.adapter.control import set_strength
    from npti_export.attachment import Attachment, attach, response_mask

__all__ = ["Attachment", "NptiConfig", "__version__", "attach", "response_mask", "set_strength"]

_LAZY = {
    "Attachment": "npti_export.attachment",
    "NptiConfig": "npti_export.adapter.config",
    "attach": "npti_export.attachment",
    "response_mask": "npti_export.attachment",
    "set_strength": "npti_export.adapter.control",
}

register_post_import_hook("npti_export.adapter.registration:register", "peft")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'npti_export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
