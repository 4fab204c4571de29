"""Run as a script: llama.cpp's quantiser in a process of its own.

A process, because the library prints what it likes, aborts on what it does not, and does not hear Ctrl-C. It is run by
its path and imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

# Rows are quantised one by one, so this bounds memory and changes no byte.
BUFFER_BYTES = 256 << 20


def quantise(source: str, target: str, file_type: int, threads: int, of_quantised: bool, matrix: str | None) -> int:
    """Quantise a GGUF by ``llama_model_quantize`` (llama.h); returns its code, 0 for success.

    ``matrix`` is a safetensors file: the importance of the columns of each tensor, float32, by the tensor's name, and
    under ``metadata`` the keys to write about it, as JSON.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    parameters.allow_requantize = of_quantised
    parameters.max_buf_size = BUFFER_BYTES
    if matrix is not None:
        arrays, keys = _read_matrix(matrix)
        parameters.imatrix = _entries(arrays)  # ctypes keeps what is assigned alive, but not what it points to
        parameters.kv_overrides = _overrides(keys)
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    return int(code)


def _read_matrix(path: str) -> tuple[dict[str, Any], dict[str, str | int]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["metadata"])  # noqa: SIM118


def _entries(arrays: dict[str, Any]) -> Any:
    """An array of ``llama_model_imatrix_data`` (llama.h), ended by one without a name; it points into ``arrays``."""
    from llama_cpp import llama_model_imatrix_data

    found = (llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(found, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return found


def _overrides(keys: dict[str, str | int]) -> Any:
    """An array of ``llama_model_kv_override`` (llama.h), ended by one without a key."""
    import llama_cpp

    found = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(found, keys.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            override.tag, override.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return found


if __name__ == "__main__":
    _, _source, _target, _type, _threads, _flag, *_rest = sys.argv
    sys.exit(quantise(_source, _target, int(_type), int(_threads), bool(int(_flag)), _rest[0] if _rest else None))
