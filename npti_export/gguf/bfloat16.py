"""A bfloat16 copy of a quantised model, to count neurons on where the processor multiplies bfloat16.

llama.cpp decodes quantised weights value by value for each token; many sequences at once, which is what identification
runs, are faster in a float type that the hardware multiplies. The copy holds the dequantised weights, rounded to 8
bits, which is what transformers computes with by default on such a processor.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from npti_export.errors import DiskFullError
from npti_export.gguf.blocks import is_float
from npti_export.gguf.ggml import loading
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.requantise import quantise_file
from npti_export.progress import Progress

_NAME = "bfloat16.gguf"
_MOST_BYTES = 4 << 30  # larger copies would not fit beside other programs on a usual machine


def copy_bytes(header: GGUFFile) -> int:
    """Size of the copy, without its metadata."""
    return 2 * sum(math.prod(tensor.shape) for tensor in header.tensors)


def copy_pays(header: GGUFFile) -> bool:
    """Whether a copy makes identification faster: quantised, not too large, and the processor multiplies bfloat16.

    Measured on two kinds of quantised models with AVX512-BF16, see ``benchmarks/identify.py``.
    """
    if all(is_float(tensor.type_id) for tensor in header.tensors) or copy_bytes(header) > _MOST_BYTES:
        return False
    with loading():
        import llama_cpp

    return b"AVX512_BF16 = 1" in llama_cpp.llama_print_system_info()


def write_copy(header: GGUFFile, folder: Path, progress: Progress, *, threads: int) -> Path:
    """Write the copy by llama.cpp's own quantiser.

    Args:
        header: of the model.
        folder: where to; emptied by the caller.
        progress: told of each tensor.
        threads: 0 takes every core that this process may use.

    Raises:
        DiskFullError: known before the first byte.
        ModelError: llama.cpp refuses.
    """
    needed, free = copy_bytes(header) + header.data_start, shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{folder}: a bfloat16 copy of the model needs {needed / 1e6:.0f} MB but only {free / 1e6:.0f} MB are "
            "free; make room, set TMPDIR, or identify on the file as it is with --weights file"
        )
    path = folder / _NAME
    quantise_file(header.path, path, "BF16", progress, threads=threads, of_quantised=True)
    return path


def shared_copy(header: GGUFFile, folder: Path, progress: Progress, *, threads: int) -> Path:
    """The same for several processes at once: the first one writes it, the others wait for it.

    Raises:
        DiskFullError, ModelError: see :func:`write_copy`.
    """
    from filelock import FileLock

    path = folder / "shared" / _NAME
    with FileLock(folder / "shared.lock"):  # the system lets go of it where its holder is killed
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                write_copy(header, Path(unfinished), progress, threads=threads)
                path.parent.mkdir(exist_ok=True)
                (Path(unfinished) / _NAME).rename(path)
    return path
