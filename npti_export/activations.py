"""The non-linearities of gated MLPs, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npti_export.errors import ArchitectureError

SILU = ("silu", "swish")  # two names of the one activation for which a rule can be compiled
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


def activate(gate: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
    """``a`` of pre-activations, elementwise, in their own precision.

    Args:
        gate: any shape.
        name: as transformers calls it. GELU is the tanh form, which is what llama.cpp computes for it (ggml, vec.h).

    Raises:
        ArchitectureError: a non-linearity that is not known here.
    """
    with np.errstate(over="ignore"):  # exp(1000) is infinite, and the quotient the -0 that it should be; tanh is 1
        if name in SILU:
            a: npt.NDArray[np.float32] = gate / (1 + np.exp(-gate))
            return a
        if name in _GELU_TANH:
            inner = np.float32(np.sqrt(2 / np.pi)) * gate * (1 + np.float32(0.044715) * gate * gate)
            half: npt.NDArray[np.float32] = np.float32(0.5) * gate
            return half + half * np.tanh(inner)
    raise ArchitectureError(f"activation {name!r} is not known here; --runtime transformers knows it")
