"""The GGUF to bake into, where it has to be made first: converted from a directory, quantised, or both.

What is made lies in a temporary folder beside the output, for as long as the job lasts: ``strip`` takes it out of the
result again, so nothing is gained by keeping it. A converted GGUF is the model of the whole job, of identification and
verification too: the neurons are then counted, and the rule judged, in the very weights that are baked, and no second
float copy is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from npti_export.architectures import Layout, check_ragged, converted_name, gguf_family
from npti_export.errors import ModelError, OutputError
from npti_export.export.convert import (
    Conversion,
    check_family,
    convert,
    convertible,
    find_converter,
    plan_conversion,
)
from npti_export.export.gguf import check_base
from npti_export.files import check_place, target_of, translate_os_errors
from npti_export.gguf.imatrix import ImportanceMatrix, read_imatrix
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.requantise import (
    check_float,
    least_bytes,
    matrix_elements,
    matrix_sizes,
    parse_file_type,
    quantise_file,
    quantised_name,
)
from npti_export.gguf.shards import read_model
from npti_export.loader import Timings
from npti_export.models import ModelSource, gguf_source
from npti_export.progress import Progress
from npti_export.temporaries import BASE, temporary_beside


@dataclass(frozen=True)
class BasePlan:
    """A base file to be made; everything that can be checked was.

    Attributes:
        origin: a GGUF, or a directory to convert.
        file_type: what to quantise it to, see :data:`npti_export.gguf.requantise.FILE_TYPES`; None leaves it as it is.
        fingerprint: of the model, which the result must have, too.
        nbytes: that the files on the way to it, and the steered one, take together on the disk at most at a time;
            llama.cpp's choice of better types for some tensors comes on top.
        imatrix: how much each column counts when it is quantised; None: as llama.cpp weighs them without.
    """

    origin: Path | Conversion
    file_type: str | None
    fingerprint: str
    nbytes: int
    imatrix: ImportanceMatrix | None = None


def check_request(
    model: str | None, base: Path | None, converter: Path | None, requantize: str | None, imatrix: Path | None = None
) -> ImportanceMatrix | None:
    """What is wrong with the options alone, before a model is downloaded or read.

    Returns:
        The importance matrix, if one is named.

    Raises:
        ModelError: an unknown type, a directory to be made a GGUF and no converter, or a damaged importance matrix.
        OutputError: a converter where there is nothing to convert, or a matrix where nothing is quantised.
    """
    if requantize is not None:
        parse_file_type(requantize, matrix=imatrix is not None)
    elif imatrix is not None:
        raise OutputError("--imatrix weighs what --requantize TYPE rounds; give a type, or leave --imatrix out")
    if base is not None and converter is not None:
        raise OutputError("--converter makes the GGUF to bake into, and --base brings one; give one of the two")
    if base is None and convertible(model):
        find_converter(converter)
    return None if imatrix is None else read_imatrix(imatrix)


def plan_base(
    source: ModelSource,
    base: GGUFFile | None,
    *,
    converter: Path | None,
    requantize: str | None,
    trust_remote_code: bool,
    imatrix: ImportanceMatrix | None = None,
) -> BasePlan | None:
    """What has to be made before a rule can be baked; None where ``base`` is it already.

    Args:
        source: the model.
        base: the GGUF to bake into; None if it is to be converted from the model's directory.
        converter: a file, or None to look for one.
        requantize: a type, or None.
        trust_remote_code: whether code that comes with the model may run.
        imatrix: for ``requantize``.

    Raises:
        NptiError: it cannot be made, or the result could not be baked.
    """
    file_type = None if requantize is None else parse_file_type(requantize, matrix=imatrix is not None)
    if base is None:
        check_family(source)  # before anyone is sent to fetch a converter
        if imatrix is not None:
            imatrix.check_for(_sizes_to_come(source), source.name)
        command = find_converter(converter)
        conversion = plan_conversion(source, command, trust_remote_code=trust_remote_code)
        if file_type is None:
            return BasePlan(conversion, None, source.fingerprint, 2 * conversion.nbytes)
        small = least_bytes(conversion.elements, file_type)
        most = small + max(conversion.nbytes, small)
        return BasePlan(conversion, file_type, source.fingerprint, most, imatrix)
    if converter is not None:
        raise OutputError(f"--converter converts a transformers directory, and {base.path} is a GGUF; leave it out")
    if file_type is None:
        return None
    check_base(base)
    check_float(base, file_type)
    if imatrix is not None:
        imatrix.check_for(matrix_sizes(base), str(base.path))
    small = least_bytes(matrix_elements(base), file_type)
    return BasePlan(base.path, file_type, source.fingerprint, 2 * small, imatrix)


def check_layout(source: ModelSource, base: GGUFFile | None, layout: Layout) -> None:
    """Raise if a ragged file is wanted and cannot be made, before anything is converted or quantised for it.

    Args:
        source: the model.
        base: the GGUF to bake into; None if it is to be converted from the model's directory.
        layout: of the recipe.

    Raises:
        ArchitectureError: llama.cpp loads no MLP biases for this family, or takes no width for each layer of it.
        NptiError: see :func:`npti_export.export.gguf.check_base`.
    """
    if layout == "uniform":
        return
    if base is not None:
        check_base(base, layout)
    else:
        check_family(source)
        check_ragged(gguf_family(str(converted_name(source.model_type)), source.name), source.name)


def _sizes_to_come(source: ModelSource) -> dict[str, int]:
    """Columns of the matrices whose sizes are known before a directory is converted; see :func:`matrix_sizes`."""
    inputs = dict.fromkeys(("ffn_gate", "ffn_up", "attn_q", "attn_k", "attn_v"), source.shape.hidden)
    inputs["ffn_down"] = source.shape.width
    return {f"blk.{layer}.{stem}.weight": size for layer in range(source.shape.layers) for stem, size in inputs.items()}


@contextmanager
def made_base(plan: BasePlan, out: Path, progress: Progress, timings: Timings) -> Iterator[Path]:
    """Make a planned file beside ``out``; it is removed at the end of the block, however that comes.

    Raises:
        ModelError: a program of llama.cpp failed, or what it made is not the same model.
        DiskFullError: not enough room, known before the first byte or met on the way.
    """
    check_place(out, plan.nbytes)  # whether it may be replaced was asked before
    with translate_os_errors(out):
        temporary = temporary_beside(target_of(out), folder=True, suffix=BASE)
    folder = temporary.path
    try:
        path = (
            plan.origin if isinstance(plan.origin, Path) else _converted(plan.origin, plan, folder, progress, timings)
        )
        if plan.file_type is not None:
            path = _quantised(path, plan.file_type, plan, folder, progress, timings)
        yield path
    finally:
        temporary.remove()


def _converted(conversion: Conversion, plan: BasePlan, folder: Path, progress: Progress, timings: Timings) -> Path:
    with timings.measure("convert"):
        path = convert(conversion, folder, progress)
    _check_same(path, plan, conversion.source.name)
    return path


def _quantised(path: Path, file_type: str, plan: BasePlan, folder: Path, progress: Progress, timings: Timings) -> Path:
    target = folder / quantised_name(path.name, file_type)
    if plan.imatrix is not None:  # now that every matrix of a converted file is known
        plan.imatrix.check_for(matrix_sizes(read_model(path)), path.name)
    with timings.measure("quantise"):
        quantise_file(path, target, file_type, progress, matrix=plan.imatrix)
    if path.parent == folder:  # the float file of a conversion has served
        path.unlink()
    _check_same(target, plan, path.name)
    return target


def _check_same(path: Path, plan: BasePlan, name: str) -> None:
    if gguf_source(path).fingerprint != plan.fingerprint:
        raise ModelError(
            f"{path.name}: what llama.cpp made of {name} is not the same model (their norm weights differ); its "
            "converter may be too old for it: take a current one, or a GGUF of the model as --base"
        )
