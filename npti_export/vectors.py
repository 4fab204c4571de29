"""Plain vectors that steer: control vectors of llama.cpp and repeng, and constants at the input of down projections."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.architectures import ARCHITECTURES, converted_name
from npti_export.errors import VectorError, shortened
from npti_export.export.control_vector import read_directions
from npti_export.gguf.reader import CONTROL_VECTOR, GGUFFile, read_gguf
from npti_export.models import ModelSource

Floats = npt.NDArray[np.float32]
TENSOR = "constant"  # of a safetensors file, and the list of a JSON file


@dataclass(frozen=True)
class SteeringVector:
    """What is added, whatever the token; one of the two is None.

    Attributes:
        directions: ``[layers - 1, hidden]`` float32, added to the residual stream behind each layer from the second on.
        constant: ``[layers, width]`` float32, added to the input of each down projection.
        fingerprint: of the model that it is for, where the file says so.
        family: of that model, likewise: a ``general.architecture``, or a ``model_type`` of transformers.
    """

    directions: Floats | None = None
    constant: Floats | None = None
    fingerprint: str | None = None
    family: str | None = None

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return "constant" if self.directions is None else "control vector"


def read_vector(path: Path, source: ModelSource, *, any_model: bool) -> SteeringVector:
    """Read a control vector (GGUF), or a constant (``.safetensors``, ``.json``), for a model.

    A constant's safetensors file holds one float32 tensor ``constant`` ``[layers, width]``; its metadata may name the
    model's ``fingerprint``. Its JSON file is ``{"layers": L, "width": W, "constant": [[layer, neuron, value], …]}``,
    with an optional ``"fingerprint"``; what is not listed is 0.

    Args:
        path: the file.
        source: the model.
        any_model: accept what says that it is for another model of the same shape.

    Raises:
        GGUFError: a damaged control vector, or one for other sizes.
        VectorError: no such file, or one that is damaged or for another model.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise VectorError(f"{path}: cannot be read ({error.strerror})") from error
    if magic == b"GGUF":
        header = read_gguf(path)
        directions = read_directions(path, source.shape.layers, source.shape.hidden)
        found = SteeringVector(directions, None, header.text("npti.model.fingerprint"), _hint(header))
    elif path.suffix == ".safetensors":
        found = _from_safetensors(path)
    elif path.suffix == ".json":
        found = _from_json(path)
    else:
        raise VectorError(f"{path}: is no vector; give a control vector (GGUF), or a constant as .safetensors or .json")
    _check(path, found, source, any_model=any_model)
    return found


def _hint(header: GGUFFile) -> str | None:
    """The family: cvector-generator writes ``general.architecture``, repeng the ``model_type`` of transformers."""
    return header.text(f"{CONTROL_VECTOR}.model_hint")


def _from_safetensors(path: Path) -> SteeringVector:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stored:
            names, about = list(stored.keys()), stored.metadata() or {}
            if names != [TENSOR]:
                held = ", ".join(sorted(names)[:3])
                raise VectorError(f"{path}: holds {shortened(held)}, not one tensor called {TENSOR}; write it as that")
            values = stored.get_tensor(TENSOR)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise VectorError(f"{path}: is damaged ({shortened(str(error), 200)}); make it again") from error
    if values.ndim != 2 or values.dtype != np.float32:
        raise VectorError(
            f"{path}: {TENSOR} is {values.dtype} {shortened(values.shape)}, not a float32 matrix [layers, width]; "
            "write it as that"
        )
    return SteeringVector(None, values, about.get("fingerprint"))


def _from_json(path: Path) -> SteeringVector:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VectorError(f"{path}: cannot be read ({shortened(str(error), 200)}); make it again") from error
    known = ("layers", "width", TENSOR, "fingerprint")
    if not isinstance(content, dict) or not set(content) <= set(known) or not set(known[:3]) <= set(content):
        raise VectorError(f"{path}: is not an object of {', '.join(known[:3])} (and fingerprint); see the README")
    layers, width, rows, fingerprint = content["layers"], content["width"], content[TENSOR], content.get("fingerprint")
    if not (_whole(layers, 1 << 9) and _whole(width, 1 << 24) and layers * width < 1 << 25):
        raise VectorError(
            f"{path}: layers and width are {shortened(layers)} and {shortened(width)}; give the model's numbers"
        )
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise VectorError(f"{path}: fingerprint is not a text; leave it out")
    values, seen = np.zeros((layers, width), np.float32), np.zeros((layers, width), np.bool_)
    for row in rows if isinstance(rows, list) else [rows]:
        place = tuple(row[:2]) if isinstance(row, list) and len(row) == 3 else ()
        fits = len(place) == 2 and _below(place[0], layers) and _below(place[1], width)
        if not fits or isinstance(row[2], bool) or not isinstance(row[2], int | float) or seen[place]:
            raise VectorError(
                f"{path}: {shortened(row)} is not [layer, neuron, value] of {layers} layers of {width} neurons, each "
                "named once; mend it"
            )
        values[place], seen[place] = _as_float32(row[2]), True
    return SteeringVector(None, values, fingerprint)


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _below(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _as_float32(value: float) -> np.float32:
    """A number of any size, infinite where it is too large."""
    try:
        with np.errstate(over="ignore"):
            return np.float32(value)
    except OverflowError:
        return np.float32(np.inf)


def _check(path: Path, found: SteeringVector, source: ModelSource, *, any_model: bool) -> None:
    shape = source.shape
    if found.constant is not None and found.constant.shape != (shape.layers, shape.width):
        layers, width = found.constant.shape
        raise VectorError(
            f"{path}: is for {layers} layers of {width} neurons, and {source.name} has {shape.layers} of "
            f"{shape.width}; take the model that it was made for"
        )
    values = found.directions if found.constant is None else found.constant
    if values is None or not np.isfinite(values).all():
        raise VectorError(f"{path}: holds values that are not finite; make it again")
    if any_model:
        return
    if found.fingerprint is not None and found.fingerprint != source.fingerprint:
        raise VectorError(
            f"{path}: was made for another model (fingerprint {shortened(found.fingerprint[:12])}…) than {source.name} "
            f"({source.fingerprint[:12]}…); take that one, or pass --any-model to use it all the same"
        )
    if found.family is not None and found.family not in _names(source):
        raise VectorError(
            f"{path}: was made for a model of {shortened(found.family)}, and {source.name} is one of "
            f"{_names(source)[0]}; take that one, or pass --any-model to use it all the same"
        )


def _names(source: ModelSource) -> list[str]:
    """What the model's family is called: in GGUF files, and as the ``model_type`` of those that become such files."""
    assert source.family is not None
    types = [name for row in ARCHITECTURES for name in row.model_types]
    return [
        source.family.name,
        source.family.model_type,
        *(name for name in types if converted_name(name) == source.family.name),
    ]
