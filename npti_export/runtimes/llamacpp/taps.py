"""Looking at neurons while llama.cpp computes: its evaluation callback, without a compiler.

ggml asks for every node of the graph whether it is wanted, and hands a wanted one over when it is computed
(ggml-backend.h, ``ggml_backend_sched_eval_callback``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.runtimes.llamacpp.library import ggml, tensor_values

Floats = npt.NDArray[np.float32]
See = Callable[[Floats], bool]
"""Takes a node ``[rows, row length]`` and says whether it changed it in place, to be written back."""


class Tap:
    """The callback of one context. While :attr:`nodes` is empty, it wants nothing and costs next to nothing.

    Attributes:
        nodes: what to do with a node, by the name that llama.cpp gives it (``ffn_gate-0``).
    """

    def __init__(self, *, on_host: bool) -> None:
        import llama_cpp

        self.nodes: Mapping[bytes, See] = {}
        self._on_host = on_host
        self._error: BaseException | None = None
        self.callback: Any = llama_cpp.ggml_backend_sched_eval_callback(self._call)
        self._name = ggml().ggml_get_name

    def _call(self, tensor: int, ask: bool, _data: Any) -> bool:
        nodes = self.nodes
        if not nodes:
            return not ask
        if ask:
            return self._name(tensor) in nodes
        try:
            if self._error is None:
                self._see(tensor, nodes[self._name(tensor)])
        except BaseException as error:  # Ctrl-C, too: nothing may unwind through C
            self._error = error
        return True  # False would drop the rest of the graph in silence

    def _see(self, tensor: int, see: See) -> None:
        values = tensor_values(tensor, on_host=self._on_host)
        if see(values) and not self._on_host:
            ggml().ggml_backend_tensor_set(tensor, values.ctypes.data_as(ctypes.c_void_p), 0, values.nbytes)

    def raise_error(self) -> None:
        """Raise what went wrong inside the callback, once the decoding is over."""
        error, self._error = self._error, None
        if error is not None:
            raise error
