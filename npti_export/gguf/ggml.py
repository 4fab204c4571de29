"""The ggml that llama-cpp-python bundles, without a compiler: its C functions by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from npti_export.errors import ModelError


@contextmanager
def loading() -> Iterator[None]:
    """Within the block llama.cpp is loaded; what stops that is told as a fault of its installation.

    Raises:
        ModelError: its libraries are missing, damaged or of another machine.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"llama.cpp cannot be loaded ({error}); install llama-cpp-python again, on a disk that is sound"
        ) from error


@cache
def ggml() -> Any:
    """The library ``ggml-base``, with the types of what is called set; signatures from ggml.h and ggml-backend.h."""
    with loading():
        import llama_cpp._ctypes_extensions as loader
        import llama_cpp._ggml as bundled

        library: Any = loader.load_shared_library("ggml-base", bundled.libggml_base_path)
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (size, [ctypes.c_int, pointer, pointer, count, count, count, pointer]),
        "ggml_get_name": (ctypes.c_char_p, [pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_nelements": (count, [pointer]),
        "ggml_nrows": (count, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
