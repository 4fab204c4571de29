"""Quantise a float GGUF by llama.cpp's own quantiser, as its program ``llama-quantize`` does.

The types are those of llama.cpp (``QUANT_OPTIONS`` in tools/quantize/quantize.cpp, ``llama_ftype`` in llama.h). Which
of them need an importance matrix is said by ``tensor_requires_imatrix`` in src/llama-quant.cpp: IQ3_XXS and below, and
IQ3_XS and Q2_K_S through what they mix in. Most others are nearer with one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from npti_export.errors import DiskFullError, ModelError
from npti_export.files import translate_os_errors
from npti_export.gguf import quantiser
from npti_export.gguf.blocks import block_shape, is_float, type_id_of, type_name
from npti_export.gguf.imatrix import ImportanceMatrix, listed
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.shards import read_model
from npti_export.processes import ending, run_captured
from npti_export.progress import Progress
from npti_export.runtimes.llamacpp.library import usable_cores
from npti_export.temporaries import temporary_beside

# name -> (llama_ftype, the ggml type that most of its tensors get)
FILE_TYPES: dict[str, tuple[int, str]] = {
    "IQ1_S": (24, "IQ1_S"),
    "IQ1_M": (31, "IQ1_M"),
    "IQ2_XXS": (19, "IQ2_XXS"),
    "IQ2_XS": (20, "IQ2_XS"),
    "IQ2_S": (28, "IQ2_XS"),
    "IQ2_M": (29, "IQ2_S"),
    "Q2_K_S": (21, "Q2_K"),
    "Q2_K": (10, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "IQ3_XXS": (23, "IQ3_XXS"),
    "IQ3_XS": (22, "IQ3_XXS"),
    "IQ3_S": (26, "IQ3_S"),
    "IQ3_M": (27, "IQ3_S"),
    "IQ4_XS": (30, "IQ4_XS"),
    "IQ4_NL": (25, "IQ4_NL"),
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "Q8_0": (7, "Q8_0"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # quantize.cpp's
NEED_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS")
IGNORE_MATRIX = ("Q8_0", "F16", "BF16")  # ggml-quants.c, quantize_q8_0: "not used"
_REFUSED = {
    **dict.fromkeys(("Q1_0", "Q2_0", "TQ1_0", "TQ2_0"), "is a type in which no extra neurons can be written"),
    "MXFP4_MOE": "is for mixtures of experts, which cannot be baked",
    "NVFP4": "is not written by llama.cpp's quantiser",
    "F32": "makes a file larger and no more exact",
    "COPY": "changes nothing",
}
_FLOAT_ENDING = re.compile(r"[-_.](?:f32|fp32|float32|f16|fp16|float16|bf16|bfloat16)$", re.IGNORECASE)
_STEP = re.compile(r"^\[\s*\d+/\s*\d+\]")  # the quantiser's line of one tensor
_UNKNOWN = re.compile(r"did not find weights for (\S+)")  # of a tensor that the importance matrix lacks
_NOT_COUNTED = ("token_embd.weight", "output.weight")  # by llama-imatrix, unless it is told --process-output
_NEARLY_NOTHING = 1 << 20  # bytes free on a disk that just filled up


def parse_file_type(text: str, *, matrix: bool = False) -> str:
    """The name in :data:`FILE_TYPES` that a user means, in any case, llama.cpp's aliases included.

    Args:
        text: what the user said.
        matrix: whether there is an importance matrix.

    Raises:
        ModelError: no such type, one that cannot be had, or one that does not go with or without a matrix; the good
            ones are listed.
    """
    name = text.strip().upper()
    name = _ALIASES.get(name, name)
    reason = _REFUSED.get(name, "is no type of llama.cpp's quantiser") + ";"
    unfit = IGNORE_MATRIX if matrix else NEED_MATRIX
    if name in FILE_TYPES and name not in unfit:
        return name
    if name in unfit:
        reason = "needs an importance matrix; give the model's own by --imatrix FILE, or"
    if name in unfit and matrix:
        reason = "takes no heed of an importance matrix; leave --imatrix out, or"
    good = ", ".join(one for one in FILE_TYPES if one not in unfit)
    raise ModelError(f"--requantize {text}: {reason} take one of {good}")


def check_float(header: GGUFFile, file_type: str) -> None:
    """Raise unless quantising is a first loss, and one at all.

    Raises:
        ModelError: a tensor is quantised already, or every matrix has the wanted type.
    """
    for tensor in header.tensors:
        if not is_float(tensor.type_id):
            raise ModelError(
                f"{header.path}: is quantised already ({tensor.name} is {type_name(tensor.type_id)}), and "
                "--requantize would lose quality twice; take an F32, F16 or BF16 file of the model, or leave it out"
            )
    if {type_name(tensor.type_id) for tensor in header.tensors if len(tensor.shape) > 1} == {file_type}:
        raise ModelError(f"{header.path}: is {file_type} already; leave --requantize out")


def quantised_name(name: str, file_type: str) -> str:
    """The file name of a model of this name in a type: ``model-F16.gguf`` becomes ``model-Q4_K_M.gguf``."""
    stem = _FLOAT_ENDING.sub("", name.removesuffix(".gguf"))
    kept = os.fsdecode(os.fsencode(stem)[:200])  # file names end at 255 bytes
    return f"{kept}-{file_type}.gguf"


def matrix_elements(header: GGUFFile) -> int:
    """Weights that quantising changes: those of tensors with two dimensions or more."""
    return sum(math.prod(tensor.shape) for tensor in header.tensors if len(tensor.shape) > 1)


def matrix_sizes(header: GGUFFile) -> dict[str, int]:
    """Columns of each tensor with two dimensions or more, those of all its experts together: ``ne[0] * ne[2]``."""
    return {
        tensor.name: tensor.row_length * math.prod(tensor.shape[2:3])
        for tensor in header.tensors
        if len(tensor.shape) > 1
    }


def least_bytes(elements: int, file_type: str) -> int:
    """Bytes that so many weights take in a type at least; what llama.cpp keeps in better types comes on top.

    That it takes IQ2_S for a few tensors of IQ3_XXS is made up for by embeddings and attention outputs in better ones.
    """
    block, nbytes = block_shape(type_id_of(FILE_TYPES[file_type][1]), file_type)
    return elements // block * nbytes


def quantise_file(
    source: Path,
    target: Path,
    file_type: str,
    progress: Progress,
    *,
    threads: int = 0,
    of_quantised: bool = False,
    matrix: ImportanceMatrix | None = None,
) -> None:
    """Write ``source`` to ``target`` in another type.

    The same input gives the same bytes, whatever the number of threads. Which tensors get better types than the name
    says, and which fall back because their rows are no multiple of 256, is llama.cpp's affair.

    Args:
        source: a GGUF that passed :func:`check_float`.
        target: to be written; what is there of it after a failure is the caller's to remove.
        file_type: a name in :data:`FILE_TYPES`.
        progress: told of each tensor, and of those that ``matrix`` has nothing about.
        threads: 0 takes every core that this process may use.
        of_quantised: whether ``source`` may be quantised.
        matrix: one that can be of ``source``, see :meth:`ImportanceMatrix.check_for`.

    Raises:
        ModelError: llama.cpp refused, its own last lines are in the message; or the file of ``matrix`` changed.
        DiskFullError: the disk filled up.
    """
    header = read_model(source)
    progress.start(f"quantise to {file_type}", len(header.tensors))
    unknown: list[str] = []

    def on_line(line: str) -> None:
        if _STEP.match(line):
            progress.advance(1)
        elif (found := _UNKNOWN.search(line)) and found[1] not in _NOT_COUNTED:
            unknown.append(found[1])

    number = str(FILE_TYPES[file_type][0])
    command = [sys.executable, str(quantiser.__file__), str(source), str(target), number]
    command += [str(threads or usable_cores()), str(int(of_quantised))]
    # The library is found where this process found it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with _handed_over(matrix, matrix_sizes(header), target) as more:
        code, said = run_captured([*command, *more], environment=dict(environment), on_line=on_line)
    if code != 0:
        refuse_full_disk(target)
        raise ModelError(f"{source}: llama.cpp cannot quantise it to {file_type}: {ending(code, said)}")
    if matrix is not None and unknown:
        progress.note(f"{matrix.path.name} has nothing about {listed(unknown)}: quantised without")


@contextmanager
def _handed_over(matrix: ImportanceMatrix | None, names: Iterable[str], target: Path) -> Iterator[list[str]]:
    """The arguments by which the quantiser gets a matrix, in a temporary folder beside ``target``."""
    if matrix is None:
        yield []
        return
    from safetensors.numpy import save

    data = save(matrix.importance(names), {"metadata": json.dumps(matrix.metadata)})
    with translate_os_errors(target):
        folder = temporary_beside(target, folder=True)
    try:
        path = folder.path / "importance.safetensors"
        with translate_os_errors(target):
            path.write_bytes(data)
        yield [str(path)]
    finally:
        folder.remove()


def refuse_full_disk(target: Path) -> None:
    """Raise if a program that failed to write ``target`` filled up its disk.

    Raises:
        DiskFullError: next to nothing is free there.
    """
    if shutil.disk_usage(target.parent).free < _NEARLY_NOTHING:
        raise DiskFullError(
            f"{target.parent.parent}: the disk is full; nothing was left behind, make room and run the command again"
        )
