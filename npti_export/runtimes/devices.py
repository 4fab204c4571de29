"""Where torch computes, and in what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from npti_export.errors import ModelError

if TYPE_CHECKING:
    import torch

MAP = "map"  # of --device: layers are spread over what there is


def pick_device() -> str:
    """The best torch device of this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str) -> torch.device:
    """The device of that name (``auto`` and ``map``: the best one), after a try.

    Raises:
        ModelError: this machine or this build of torch does not have it.
    """
    import torch

    try:
        device = torch.device(pick_device() if name in ("auto", MAP) else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--device {name}: cannot be used here ({reason}); try --device auto") from error
    return device


def described(name: str) -> str:
    """What answers by the device of that name depend on: its kind, and of GPUs which ones.

    Raises:
        ModelError: this machine or this build of torch does not have it.
    """
    import torch

    device = usable_device(name)
    if device.type != "cuda":
        return device.type
    places = range(torch.cuda.device_count()) if name == MAP else [device.index or 0]
    kinds = sorted({torch.cuda.get_device_name(place) for place in places})
    return " ".join(["cuda", *([MAP] if name == MAP else []), *kinds])


def pick_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that is right for identification on a device."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``float32``."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def entrance(model: Any) -> torch.device:
    """Where a model takes its token ids.

    Layers that lie in memory or on disk for want of room are computed on the first device all the same (accelerate's
    ``dispatch_model``).
    """
    import torch

    places = list(getattr(model, "hf_device_map", {"": model.device}).values())
    first = next((place for place in places if place not in ("cpu", "disk")), "cpu")
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)


@contextmanager
def in_place(*modules: torch.nn.Module) -> Iterator[None]:
    """Within the block, weights that lie elsewhere for want of room are there to be read."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield
