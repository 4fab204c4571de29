"""The published format of neuron files: one JSON file a pole, ``{"layer": [[layer, neuron, |delta|, p, a95], …]}``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from npti_export.errors import ProfileError, shortened
from npti_export.identify.select import pole_neurons
from npti_export.models import ModelShape
from npti_export.profile import FIELDS, NeuronProfile
from npti_export.traits import FACETS, SIGNS, Sign

_MOST = 1e30  # of a number, which becomes a float32
_PUBLISHED_NAME = re.compile(r"^(?P<trait>[A-Za-z]+?)(?P<reversed>_reversed)?(?P<suffix>_dict)?\.json$")


def published_pair(path: Path) -> tuple[str, Path, Path]:
    """The trait named by a published file name, and its ``+`` and ``-`` files.

    Raises:
        ProfileError: the name does not follow ``Trait_dict.json`` / ``Trait_reversed_dict.json``.
    """
    match = _PUBLISHED_NAME.match(path.name)
    if match is None or match["trait"].lower() not in FACETS:
        raise ProfileError(f"{path}: name it like the published files, for example Extraversion_dict.json")
    suffix = match["suffix"] or ""
    stem = match["trait"]
    return (
        stem.lower(),
        path.with_name(f"{stem}{suffix}.json"),
        path.with_name(f"{stem}_reversed{suffix}.json"),
    )


def read_published(path: Path, shape: ModelShape, trait: str | None) -> NeuronProfile:
    """Read a published pair, given either file, as a profile of a model of ``shape``.

    Neurons that the files do not name get a delta of 0: nothing more is known of them.

    Raises:
        ProfileError: half a pair, of another trait, malformed, or naming neurons that the model does not have.
    """
    named, plus, minus = published_pair(path)
    if trait is not None and named != trait:
        raise ProfileError(f"{path}: is a profile of {named}, not of {trait}")
    values = {name: np.zeros((shape.layers, shape.width), np.float32) for name in FIELDS}
    for own, other, a95, file in (
        ("p_plus", "p_minus", "a95_plus", plus),
        ("p_minus", "p_plus", "a95_minus", minus),
    ):
        if not file.is_file():
            raise ProfileError(f"{file}: missing; the published format is two files, one a pole")
        for layer, neuron, delta, probability, quantile in published_rows(file, shape):
            values[own][layer, neuron] = probability
            values[other][layer, neuron] = probability - delta
            values[a95][layer, neuron] = max(quantile, 0.0)
    origin = {"model": "published JSON", "file": path.name}
    p_plus, p_minus, a95_plus, a95_minus = (values[name] for name in FIELDS)
    return NeuronProfile(named, p_plus, p_minus, a95_plus, a95_minus, None, origin)


def published_rows(file: Path, shape: ModelShape | None) -> list[tuple[int, int, float, float, float]]:
    """The rows ``(layer, neuron, |delta|, p, a95)`` of one published file, checked against ``shape`` if given.

    Raises:
        ProfileError: not in the published format, or naming neurons that the model does not have.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{file}: not JSON ({shortened(str(error), 200)})") from error
    if not isinstance(content, dict) or not content:
        raise ProfileError(f'{file}: holds no neurons; expected {{"layer": [[layer, neuron, delta, p, a95], …]}}')
    rows = []
    for key, entries in content.items():
        for entry in entries if isinstance(entries, list) else [None]:
            if not (isinstance(entry, list) and len(entry) == 5 and all(_is_number(value) for value in entry)):
                raise ProfileError(
                    f"{file}: layer {shortened(key)} has an entry that is not [layer, neuron, delta, p, a95]: "
                    f"{shortened(entry)}"
                )
            if not (isinstance(entry[0], int) and isinstance(entry[1], int) and all(map(math.isfinite, entry[2:4]))):
                raise ProfileError(
                    f"{file}: layer {shortened(key)} has an entry whose numbers make no sense: {shortened(entry)}"
                )
            layer, neuron = entry[0], entry[1]
            if str(layer) != key or min(layer, neuron) < 0:
                raise ProfileError(
                    f"{file}: layer {shortened(key)} has an entry of another layer or a negative number: "
                    f"{shortened(entry)}"
                )
            if shape is not None and not (layer < shape.layers and neuron < shape.width):
                raise ProfileError(f"{file}: names neuron {neuron} of layer {layer}, but the model has {shape}")
            rows.append((layer, neuron, float(entry[2]), float(entry[3]), float(entry[4])))
    if not rows:
        raise ProfileError(f"{file}: holds no neurons")
    return rows


def _is_number(value: object) -> bool:
    # -inf is how the published code writes a quantile of a neuron that is almost never active
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and (value == -math.inf or abs(value) < _MOST)
    )


def encode_published(profile: NeuronProfile, *, threshold: float, at_least: int) -> list[bytes]:
    """The ``+`` and the ``-`` file of a profile.

    Raises:
        ProfileError: a pole has no neuron.
    """
    contents = [_published_content(profile, sign, threshold, at_least) for sign in SIGNS]
    return [json.dumps(content, indent=1).encode() for content in contents]


def _published_content(
    profile: NeuronProfile, sign: Sign, threshold: float, at_least: int
) -> dict[str, list[list[float]]]:
    own = profile.p_plus if sign == "+" else profile.p_minus
    layers, neurons = pole_neurons(profile, sign, threshold, at_least, None)
    content: dict[str, list[list[float]]] = {}
    for layer, neuron in zip(layers.tolist(), neurons.tolist(), strict=True):
        delta = abs(float(profile.delta[layer, neuron]))
        row = [layer, neuron, delta, float(own[layer, neuron]), float(profile.a95(sign)[layer, neuron])]
        content.setdefault(str(layer), []).append(row)
    return content
