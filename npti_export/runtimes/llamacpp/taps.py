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

from npti_export.gguf.ggml import ggml
from npti_export.runtimes.llamacpp.library import tensor_values

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
        if self._error is not None:
            return ask  # wants the next node, and then has ggml drop the rest of the graph
        nodes = self.nodes
        if ask:
            return self._name(tensor) in nodes if nodes else False
        try:
            self._see(tensor, nodes[self._name(tensor)])
        except BaseException as error:  # nothing may unwind through C
            self.stop(error)
        return self._error is None  # False drops the rest of the graph in silence

    def _see(self, tensor: int, see: See) -> None:
        values = tensor_values(tensor, on_host=self._on_host)
        if see(values) and not self._on_host:
            ggml().ggml_backend_tensor_set(tensor, values.ctypes.data_as(ctypes.c_void_p), 0, values.nbytes)

    def stop(self, error: BaseException) -> None:
        """End the computation that is going on; what it gives, and what the KV cache then holds, means nothing."""
        self._error = error

    def raise_error(self) -> None:
        """Raise what went wrong inside the callback, once the decoding is over; another one may follow."""
        error, self._error = self._error, None
        if error is not None:
            raise error
