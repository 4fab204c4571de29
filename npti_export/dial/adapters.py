"""Are the files of a dial what its requests take them for?"""

from __future__ import annotations

from pathlib import Path

from npti_export.dial.index import Adapter, Dial
from npti_export.errors import AdapterError
from npti_export.gguf.reader import read_gguf

_ALPHA = "adapter.lora.alpha"


def check_adapters(folder: Path, dial: Dial, *, some_missing: bool = False) -> None:
    """Raise unless llama-server takes scales for these files as the dial means them.

    With an alpha it would multiply each tensor's scale by alpha over the rank of that tensor (src/llama-adapter.h,
    ``get_scale``), which no scale of a request makes right again: ranks differ from layer to layer.

    Args:
        folder: where they are.
        dial: its index.
        some_missing: whether it may lack files, as where only requests are made.

    Raises:
        AdapterError: a file that is missing, no LoRA, or has an alpha.
        GGUFError: a damaged file.
    """
    for one in dial.adapters:
        path = folder / one.file
        if path.exists() or not some_missing:
            _check(path, one)


def _check(path: Path, adapter: Adapter) -> None:
    if not path.exists():
        raise AdapterError(f"{path}: is missing, and is the {adapter.kind} of {' and '.join(adapter.traits)} here")
    header = read_gguf(path)
    if header.text("general.type") != "adapter" or header.text("adapter.type") != "lora":
        raise AdapterError(f"{path}: is no LoRA adapter; make the dial again")
    alpha = header.by_key.get(_ALPHA)
    if alpha is not None and alpha.value != 0:
        raise AdapterError(
            f"{path}: {_ALPHA} is {alpha.shown}, so llama.cpp would scale each layer by that over its own rank, and "
            "strengths would be wrong; make the dial again"
        )
