"""Run as a script: llama.cpp's quantiser in a process of its own.

A process, because the library prints what it likes, aborts on what it does not, and does not hear Ctrl-C. It is run by
its path and imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Rows are quantised one by one without an importance matrix, so this bounds memory and changes no byte.
BUFFER_BYTES = 256 << 20


def quantise(source: str, target: str, file_type: int, threads: int, of_quantised: bool) -> int:
    """Quantise a GGUF by ``llama_model_quantize`` (llama.h); returns its code, 0 for success."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    parameters.allow_requantize = of_quantised
    parameters.max_buf_size = BUFFER_BYTES
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    return int(code)


if __name__ == "__main__":
    sys.exit(quantise(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), bool(int(sys.argv[5]))))
