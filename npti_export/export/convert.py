"""A transformers directory as a GGUF, by llama.cpp's own converter ``convert_hf_to_gguf.py``.

The converter knows every tokenizer and tensor layout of its llama.cpp, and is kept up with it; a second one would only
lag behind. It is not part of any package that this one could depend on, so it has to be found.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from npti_export.architectures import bakes_once_converted
from npti_export.errors import ArchitectureError, ModelError, shortened
from npti_export.gguf.requantise import refuse_full_disk
from npti_export.models import ModelSource, model_type_ahead, weight_files
from npti_export.processes import ending, run_captured
from npti_export.progress import Progress

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP_DIR"
_COMMANDS = (SCRIPT, "llama-convert-hf-to-gguf")  # as packages install it; the second is in llama.cpp's pyproject.toml
_PARTS = "conversion"  # the folder that the script imports, since May 2026 (llama.cpp pull request 17114)
_TOKENIZER = "sentencepiece"  # imported for every llama, whatever tokenizer it has; the rest comes with this package
_OUTTYPE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}  # safetensors dtype -> --outtype that keeps it as it is
_MLP_BIASES = tuple(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Conversion:
    """A directory that can be converted, with what was found out about it.

    Attributes:
        source: the directory.
        command: the converter, without its arguments.
        outtype: its ``--outtype``.
        elements: weights in tensors of two dimensions or more.
        nbytes: of the result, without its metadata.
    """

    source: ModelSource
    command: tuple[str, ...]
    outtype: str
    elements: int
    nbytes: int


def find_converter(given: Path | None) -> tuple[str, ...]:
    """The command of the converter: the given file, else in the folder that ``LLAMA_CPP_DIR`` names, else on PATH.

    Raises:
        ModelError: there is none, or what is named is not one; nothing else is tried then.
    """
    if given is not None:
        return _command(given / SCRIPT if given.is_dir() else given, "--converter")
    folder = os.environ.get(VARIABLE)
    if folder:
        try:
            place = Path(folder).expanduser()
        except RuntimeError as error:  # a home that nobody has
            raise ModelError(f"the environment variable {VARIABLE} is {shortened(folder)}: {error}") from error
        return _command(place / SCRIPT, f"the environment variable {VARIABLE}")
    for name in _COMMANDS:
        found = shutil.which(name)
        if found is not None:
            return _command(Path(found), "PATH")
    raise ModelError(
        f"a transformers model is made a GGUF by llama.cpp's {SCRIPT}, which was not found: git clone --depth 1 "
        f"https://github.com/ggml-org/llama.cpp and pass --converter llama.cpp/{SCRIPT} (or set {VARIABLE}), or bake "
        "into a GGUF of the model by --base FILE.gguf, or take --format peft or checkpoint"
    )


def _command(path: Path, named_by: str) -> tuple[str, ...]:
    """How to run a converter: by this Python, which has what it imports, unless it names an interpreter of its own."""
    try:
        with path.open("rb") as stream:
            text = stream.read(1 << 20)
    except OSError as error:
        raise ModelError(
            f"{path}: {named_by} leads there, and it cannot be read ({error.strerror}); name llama.cpp's {SCRIPT}"
        ) from error
    first = text.split(b"\n", 1)[0]
    own = first.startswith(b"#!") and b"/env " not in first  # a package manager's Python, or a wrapper in shell
    if os.access(path, os.X_OK) and (own or path.suffix != ".py"):
        return (str(path.absolute()),)
    if path.suffix != ".py":
        raise ModelError(f"{path}: is neither a .py file nor executable; name llama.cpp's {SCRIPT} ({named_by})")
    in_parts = b"from conversion import" in text
    if in_parts and not (path.resolve().parent / _PARTS).is_dir():
        raise ModelError(
            f"{path}: lacks the folder {_PARTS} that it imports from beside it; name the {SCRIPT} of a whole llama.cpp "
            f"source tree ({named_by})"
        )
    if (in_parts or _TOKENIZER.encode() in text) and importlib.util.find_spec(_TOKENIZER) is None:
        raise ModelError(
            f"{path}: llama.cpp's converter needs the Python package {_TOKENIZER}: pip install {_TOKENIZER}, which "
            "pip install 'npti-export[convert]' does, too"
        )
    return (sys.executable, str(path.absolute()))


def convertible(model: str | None) -> bool:
    """Whether a ``--model`` is a directory that the converter could make a GGUF for us; its weights are not read.

    Raises:
        ModelError: a repository that is not on the hub, or has no configuration.
    """
    return bakes_once_converted(model_type_ahead(model))


def check_family(source: ModelSource) -> None:
    """Raise unless a rule can be baked into the GGUF that a directory would become.

    Raises:
        ArchitectureError: llama.cpp loads no MLP biases for this family, or its activation is not SiLU.
    """
    source.check_compilable()
    if not bakes_once_converted(source.model_type):
        raise ArchitectureError(
            f"{source.name}: llama.cpp loads no MLP biases for {source.model_type}, so no rule can be baked into its "
            "GGUF; take --format peft" + (" or checkpoint" if source.architecture.checkpoint else "")
        )


def plan_conversion(source: ModelSource, command: tuple[str, ...], *, trust_remote_code: bool) -> Conversion:
    """Check a directory, and choose the type that keeps its weights as they are; reads headers only.

    Weights in one 16-bit type stay in it, those in float32 or in a mixture become float32, of which both 16-bit types
    are parts. For others (FP8 and the like) the converter chooses 16 bits by itself: ``auto``.

    Raises:
        ModelError: it has MLP biases, or brings code that the converter would run.
    """
    _refuse_code(source.path, trust_remote_code=trust_remote_code)
    kinds, elements = _matrices(source)
    known = {_OUTTYPE.get(kind, "auto") for kind in kinds}
    outtype = "auto" if "auto" in known else known.pop() if len(known) == 1 else "f32"
    return Conversion(source, command, outtype, elements, elements * (4 if outtype == "f32" else 2))


def _refuse_code(directory: Path, *, trust_remote_code: bool) -> None:
    """The converter loads tokenizers with ``trust_remote_code=True`` (conversion/base.py), whatever we were told."""
    if trust_remote_code:
        return
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            reason = shortened(str(error), 200)
            raise ModelError(f"{directory / name}: cannot be read ({reason}); download it again") from error
        if isinstance(content, dict) and "auto_map" in content:
            raise ModelError(
                f"{directory / name}: names code of its own (auto_map), which {SCRIPT} would run; pass "
                "--trust-remote-code if you trust it"
            )


def _matrices(source: ModelSource) -> tuple[set[str], int]:
    """The dtypes of the tensors with two dimensions or more, and how many weights these have."""
    from safetensors import SafetensorError, safe_open

    kinds: set[str] = set()
    elements = 0
    file = source.path
    try:
        for file, names in weight_files(source.path).items():
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys() if names is None else sorted(names):
                    if name.endswith(_MLP_BIASES):
                        raise ModelError(f"{file}: {name} is a bias of an MLP, which is not supported yet")
                    part = tensors.get_slice(name)
                    shape = part.get_shape()
                    if len(shape) > 1:
                        kinds.add(part.get_dtype())
                        elements += math.prod(shape)
    except (SafetensorError, OSError, ValueError) as error:  # a name in the index may be no text
        raise ModelError(f"{file}: is damaged ({shortened(str(error), 200)}); download it again") from error
    return kinds, elements


def float_name(conversion: Conversion) -> str:
    """What the GGUF of a directory is called."""
    source = conversion.source
    name = source.hub_id.rpartition("/")[2] if source.hub_id else source.path.resolve().name
    kept = os.fsdecode(os.fsencode(name)[:200])
    return f"{kept}.gguf" if conversion.outtype == "auto" else f"{kept}-{conversion.outtype.upper()}.gguf"


def convert(conversion: Conversion, folder: Path, progress: Progress) -> Path:
    """Convert into a folder; returns the file.

    Raises:
        ModelError: the converter failed, its own last lines are in the message; or it wrote nothing.
        DiskFullError: the disk filled up.
    """
    source = conversion.source
    plain = folder / "converted.gguf"  # the converter fills in what is in braces in a name
    progress.start(f"convert to GGUF ({conversion.outtype})", 1)
    arguments = [str(source.path.resolve()), "--outtype", conversion.outtype, "--outfile", str(plain)]
    try:
        code, said = run_captured([*conversion.command, *arguments])
    except OSError as error:
        raise ModelError(f"{conversion.command[0]}: cannot be run ({error.strerror})") from error
    if code != 0 or not plain.is_file():
        refuse_full_disk(plain)
        raise ModelError(f"{source.name}: {conversion.command[-1]} cannot convert it: {ending(code, said)}")
    target = folder / float_name(conversion)
    plain.rename(target)
    progress.advance(1)
    return target
