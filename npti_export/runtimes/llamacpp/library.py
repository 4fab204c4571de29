"""The C libraries inside llama-cpp-python: what they log, the tensors that they show, the cores that they get."""

from __future__ import annotations

import collections
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.gguf.ggml import ggml, loading

_KEPT_LINES = 400
_SHOWN_LINES = 3
_LOG_ERROR = 4  # ggml.h, enum ggml_log_level
_log: collections.deque[tuple[int, str]] = collections.deque(maxlen=_KEPT_LINES)


@cache
def llama() -> Any:
    """The module ``llama_cpp``, its log going to :func:`log_tail` instead of the terminal."""
    with loading():
        import llama_cpp

    llama_cpp.llama_log_set(_listener(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()  # llama.h: once, before anything else
    return llama_cpp


@cache
def _listener() -> Any:
    import llama_cpp

    def listen(level: int, text: bytes, _data: Any) -> None:
        _log.append((level, text.decode("utf-8", "replace").strip()))

    return llama_cpp.llama_log_callback(listen)


@contextmanager
def logged() -> Iterator[None]:
    """Within the block, :func:`log_tail` tells of this block only."""
    _log.clear()
    yield


def log_tail() -> str:
    """The last errors that llama.cpp logged, else its last lines, in one line."""
    lines = [text for level, text in _log if level == _LOG_ERROR and text] or [text for _, text in _log if text]
    return "; ".join(list(dict.fromkeys(lines))[-_SHOWN_LINES:]) or "it logged nothing"


def tensor_values(tensor: int, *, on_host: bool) -> npt.NDArray[np.float32]:
    """A computed graph node as ``[rows, row length]`` float32.

    Args:
        tensor: its address.
        on_host: whether its data is this process's memory: then a writable view, else a copy.

    Raises:
        ModelError: it does not hold float32 in rows.
    """
    library = ggml()
    elements, rows = library.ggml_nelements(tensor), library.ggml_nrows(tensor)
    if library.ggml_nbytes(tensor) != 4 * elements:
        name = library.ggml_get_name(tensor).decode()
        raise ModelError(f"llama.cpp computes {name} in another type than float32; it cannot be looked at")
    if on_host:
        view = (ctypes.c_float * elements).from_address(library.ggml_get_data(tensor))
        return np.frombuffer(view, np.float32).reshape(rows, -1)
    values = np.empty((rows, elements // rows), np.float32)
    library.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
    return values


@contextmanager
def interruptible(stop: Callable[[BaseException], None]) -> Iterator[None]:
    """Let signals such as Ctrl-C interrupt a block that computes in C and calls back into Python.

    Python runs a signal's handler in front of the next line of Python code, which is that of a callback, and what is
    raised there is lost in ctypes (printed, not raised). So within the block ``stop`` is given what a handler raises.
    Does nothing outside the main thread, where no handler runs.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def arrive(number: int, frame: Any) -> None:
        try:
            handlers[number](number, frame)
        except BaseException as error:
            stop(error)

    try:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, arrive)
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """For C that only logs through Python and cannot be stopped, :func:`interruptible` at its end."""
    caught: list[BaseException] = []
    with interruptible(caught.append):
        yield
    if caught:
        raise caught[0]


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
