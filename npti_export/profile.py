"""The neuron profile: what identification found out about one trait in one model."""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export import __version__
from npti_export.errors import ProfileError
from npti_export.files import atomic_output
from npti_export.identify.stats import ActivationStats
from npti_export.models import ModelShape, ModelSource
from npti_export.traits import FACETS, SIGNS, Sign

Matrix = npt.NDArray[np.float32]
_FIELDS = ("p_plus", "p_minus", "a95_plus", "a95_minus")
_PUBLISHED_NAME = re.compile(r"^(?P<trait>[A-Za-z]+?)(?P<reversed>_reversed)?(?P<suffix>_dict)?\.json$")


@dataclass(frozen=True)
class NeuronProfile:
    """Per neuron of one model: how it behaves under both poles of one trait.

    Attributes:
        trait: one of the Big Five.
        p_plus: ``[layers, width]`` float32, ``P(a > 0)`` under the ``+`` pole (paper: activation probability).
        p_minus: the same under the ``-`` pole.
        a95_plus: ``[layers, width]`` float32, a95 (the recipe's percentile of the activation) under ``+``.
        a95_minus: the same under ``-``.
        fingerprint: of the model, or None where the source did not say (the published JSON).
        origin: where it came from: model name, recipe, bench digest, token counts, tool version.
    """

    trait: str
    p_plus: Matrix
    p_minus: Matrix
    a95_plus: Matrix
    a95_minus: Matrix
    fingerprint: str | None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def delta(self) -> Matrix:
        """``p+ - p-``, ``[layers, width]``."""
        return self.p_plus - self.p_minus

    def a95(self, sign: Sign) -> Matrix:
        """a95 under one pole."""
        return self.a95_plus if sign == "+" else self.a95_minus

    def check_model(self, source: ModelSource, *, any_model: bool = False) -> None:
        """Raise unless this profile is of ``source``.

        Raises:
            ProfileError: other sizes, or another fingerprint and not ``any_model``.
        """
        layers, width = self.p_plus.shape
        if (layers, width) != (source.shape.layers, source.shape.width):
            raise ProfileError(
                f"the profile of {self.trait} is for {ModelShape(layers, width, 0)}, but {source.name} has "
                f"{source.shape}; identify {source.name} itself"
            )
        if self.fingerprint is not None and self.fingerprint != source.fingerprint and not any_model:
            raise ProfileError(
                f"the profile of {self.trait} was made from another model ({self.origin.get('model', 'unnamed')}) than "
                f"{source.name}; identify {source.name} itself, or pass --any-model to use it all the same"
            )


def profile_from_stats(
    trait: str,
    plus: ActivationStats,
    minus: ActivationStats,
    source: ModelSource,
    percentile: float,
    origin: dict[str, Any],
) -> NeuronProfile:
    """Turn the statistics of both poles into a profile.

    Raises:
        ProfileError: a pole has no response token.
    """
    values = (plus.probability(), minus.probability(), plus.quantile(percentile), minus.quantile(percentile))
    tokens = {"+": plus.tokens, "-": minus.tokens}
    described = {"model": source.name, "version": __version__, "tokens": tokens, **origin}
    p_plus, p_minus, a95_plus, a95_minus = (value.astype(np.float32) for value in values)
    return NeuronProfile(trait, p_plus, p_minus, a95_plus, a95_minus, source.fingerprint, described)


def save_profile(
    profile: NeuronProfile, path: Path, *, force: bool, threshold: float = 0.1, at_least: int = 0
) -> list[Path]:
    """Write a profile; the suffix decides the format.

    ``.safetensors`` holds all neurons. ``.json`` is the published format, ``{"layer": [[layer, neuron, |delta|, p,
    a95], …]}`` with one file a pole, of the neurons with ``|delta| >= threshold`` or among the ``at_least`` first.

    Returns:
        The files written.

    Raises:
        ProfileError: another suffix.
        OutputError: a file exists and ``force`` is not set.
    """
    if path.suffix == ".json":
        return _save_published(profile, path, force, threshold, at_least)
    profile_files(path, profile.trait)
    from safetensors.numpy import save

    described = {"trait": profile.trait, "fingerprint": profile.fingerprint, "origin": profile.origin}
    with atomic_output(path, force=force) as temporary:
        tensors = {name: np.ascontiguousarray(getattr(profile, name)) for name in _FIELDS}
        temporary.write_bytes(save(tensors, metadata={"npti.profile": json.dumps(described, sort_keys=True)}))
    return [path]


def load_profile(path: Path, shape: ModelShape, trait: str | None = None) -> NeuronProfile:
    """Read a profile in either format.

    Args:
        path: ``.safetensors``, or one of the two published JSON files (the other is found beside it).
        shape: of the model it is meant for; the published format does not say.
        trait: what it should be a profile of; None takes what the file (name) says.

    Raises:
        ProfileError: missing, damaged, of another trait, or naming neurons that the model does not have.
    """
    if not path.is_file():
        raise ProfileError(f"{path}: there is no such profile")
    profile = _load_published(path, shape, trait) if path.suffix == ".json" else read_profile(path)
    if trait is not None and profile.trait != trait:
        raise ProfileError(f"{path}: is a profile of {profile.trait}, not of {trait}")
    return profile


def read_profile(path: Path) -> NeuronProfile:
    """Read a ``.safetensors`` profile of any model.

    Raises:
        ProfileError: damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            described = json.loads(tensors.metadata()["npti.profile"])
            arrays = [tensors.get_tensor(name) for name in _FIELDS]
        p_plus, p_minus, a95_plus, a95_minus = arrays
        profile = NeuronProfile(
            described["trait"], p_plus, p_minus, a95_plus, a95_minus, described["fingerprint"], described["origin"]
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{path}: not a neuron profile, or damaged ({type(error).__name__}: {error})") from error
    if profile.trait not in FACETS:
        raise ProfileError(f"{path}: is a profile of an unknown trait {profile.trait!r}")
    for name, array in zip(_FIELDS, arrays, strict=True):
        if array.dtype != np.float32 or array.ndim != 2 or array.shape != arrays[0].shape:
            raise ProfileError(
                f"{path}: tensor {name} is {array.dtype} {array.shape}, not a float32 matrix like the others"
            )
        if not np.isfinite(array).all():
            raise ProfileError(f"{path}: tensor {name} holds values that are not finite; identify again")
    return profile


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


def _load_published(path: Path, shape: ModelShape, trait: str | None) -> NeuronProfile:
    named, plus, minus = published_pair(path)
    if trait is not None and named != trait:
        raise ProfileError(f"{path}: is a profile of {named}, not of {trait}")
    values = {name: np.zeros((shape.layers, shape.width), np.float32) for name in _FIELDS}
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
    p_plus, p_minus, a95_plus, a95_minus = (values[name] for name in _FIELDS)
    return NeuronProfile(named, p_plus, p_minus, a95_plus, a95_minus, None, origin)


def published_rows(file: Path, shape: ModelShape | None) -> list[tuple[int, int, float, float, float]]:
    """The rows ``(layer, neuron, |delta|, p, a95)`` of one published file, checked against ``shape`` if given.

    Raises:
        ProfileError: not in the published format, or naming neurons that the model does not have.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ProfileError(f'{file}: holds no neurons; expected {{"layer": [[layer, neuron, delta, p, a95], …]}}')
    rows = []
    for key, entries in content.items():
        for entry in entries if isinstance(entries, list) else [None]:
            if not (isinstance(entry, list) and len(entry) == 5 and all(_is_number(value) for value in entry)):
                raise ProfileError(
                    f"{file}: layer {key!r} has an entry that is not [layer, neuron, delta, p, a95]: {entry!r}"
                )
            if not (isinstance(entry[0], int) and isinstance(entry[1], int) and all(map(math.isfinite, entry[2:4]))):
                raise ProfileError(f"{file}: layer {key!r} has an entry whose numbers make no sense: {entry!r}")
            layer, neuron = entry[0], entry[1]
            if str(layer) != key or min(layer, neuron) < 0:
                raise ProfileError(
                    f"{file}: layer {key!r} has an entry of another layer or a negative number: {entry!r}"
                )
            if shape is not None and not (layer < shape.layers and neuron < shape.width):
                raise ProfileError(f"{file}: names neuron {neuron} of layer {layer}, but the model has {shape}")
            rows.append((layer, neuron, float(entry[2]), float(entry[3]), float(entry[4])))
    if not rows:
        raise ProfileError(f"{file}: holds no neurons")
    return rows


def _is_number(value: object) -> bool:
    # -inf is how the published code writes a quantile of a neuron that is almost never active
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _save_published(profile: NeuronProfile, path: Path, force: bool, threshold: float, at_least: int) -> list[Path]:

    files = profile_files(path, profile.trait)
    contents = [_published_content(profile, sign, threshold, at_least) for sign in SIGNS]
    with ExitStack() as stack:  # both or, if writing one fails, neither
        for file, content in zip(files, contents, strict=True):
            temporary = stack.enter_context(atomic_output(file, force=force))
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return files


def _published_content(
    profile: NeuronProfile, sign: Sign, threshold: float, at_least: int
) -> dict[str, list[list[float]]]:
    from npti_export.identify.select import pole_neurons

    own = profile.p_plus if sign == "+" else profile.p_minus
    layers, neurons = pole_neurons(profile, sign, threshold, at_least, None)
    content: dict[str, list[list[float]]] = {}
    for layer, neuron in zip(layers.tolist(), neurons.tolist(), strict=True):
        delta = abs(float(profile.delta[layer, neuron]))
        row = [layer, neuron, delta, float(own[layer, neuron]), float(profile.a95(sign)[layer, neuron])]
        content.setdefault(str(layer), []).append(row)
    return content


def profile_files(path: Path, trait: str) -> list[Path]:
    """The files that a profile saved under ``path`` goes to: one, or the published pair.

    Raises:
        ProfileError: a suffix or a name that no profile of ``trait`` can have.
    """
    if path.suffix == ".safetensors":
        return [path]
    if path.suffix != ".json":
        raise ProfileError(
            f"{path}: a profile is written as .safetensors or (published format) .json; change the suffix"
        )
    named, plus, minus = published_pair(path)
    if named != trait:
        raise ProfileError(f"{path}: would name a profile of {trait} after {named}; choose another name")
    return [plus, minus]
