"""The neuron profile: what identification found out about one trait in one model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.checked import digest_of
from npti_export.errors import ProfileError, shortened
from npti_export.files import atomic_output
from npti_export.models import ModelShape, ModelSource
from npti_export.stats import ActivationStats
from npti_export.traits import FACETS, Sign, is_own_name
from npti_export.version import __version__

Matrix = npt.NDArray[np.float32]
SAFETENSORS_SUFFIXES = (".safetensors", "")  # a bare name is as good
FIELDS = ("p_plus", "p_minus", "a95_plus", "a95_minus")
MOMENTS = ("mean_plus", "mean_minus", "deviation")
MATCHED = ("matched_plus", "matched_minus")


@dataclass(frozen=True)
class NeuronProfile:
    """Per neuron of one model: how it behaves under both poles of one trait.

    Attributes:
        trait: one of the Big Five, or the name of a trait of the user's own.
        p_plus: ``[layers, width]`` float32, ``P(a > 0)`` under the ``+`` pole (paper: activation probability).
        p_minus: the same under the ``-`` pole.
        a95_plus: ``[layers, width]`` float32, a95 (the recipe's percentile of the activation) under ``+``.
        a95_minus: the same under ``-``.
        fingerprint: of the model, or None where the source did not say (the published JSON).
        origin: where it came from: model name, recipe, bench digest, token counts, tool version.
        mean_plus: ``[layers, width]`` float32, mean of the down projection's input under ``+``; None where the source
            did not say (mixtures of experts, the published JSON, profiles of earlier versions), as are the next two.
        mean_minus: the same under ``-``.
        deviation: its standard deviation, pooled over both poles.
        matched_plus: ``[layers, width]`` float32, see :mod:`npti_export.identify.matched`; None where nobody asked.
        matched_minus: the same towards ``-``.
    """

    trait: str
    p_plus: Matrix
    p_minus: Matrix
    a95_plus: Matrix
    a95_minus: Matrix
    fingerprint: str | None
    origin: dict[str, Any] = field(default_factory=dict)
    mean_plus: Matrix | None = None
    mean_minus: Matrix | None = None
    deviation: Matrix | None = None
    matched_plus: Matrix | None = None
    matched_minus: Matrix | None = None

    @property
    def delta(self) -> Matrix:
        """``p+ - p-``, ``[layers, width]``."""
        return self.p_plus - self.p_minus

    def a95(self, sign: Sign) -> Matrix:
        """a95 under one pole."""
        return self.a95_plus if sign == "+" else self.a95_minus

    def matched(self, sign: Sign) -> Matrix | None:
        """The matched constant towards one pole, if it was asked for."""
        return self.matched_plus if sign == "+" else self.matched_minus

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
    more: dict[str, Matrix] = {}
    if plus.product is not None and minus.product is not None:
        (mean_plus, one), (mean_minus, other) = plus.moments(), minus.moments()
        pooled = np.sqrt((one * plus.tokens + other * minus.tokens) / (plus.tokens + minus.tokens))
        more = dict(zip(MOMENTS, (one.astype(np.float32) for one in (mean_plus, mean_minus, pooled)), strict=True))
    return NeuronProfile(trait, p_plus, p_minus, a95_plus, a95_minus, source.fingerprint, described, **more)


def encode_profile(profile: NeuronProfile) -> bytes:
    """A ``.safetensors`` profile, all neurons of both poles; the same for the same profile.

    Raises:
        ProfileError: a value is not finite.
    """
    from safetensors.numpy import save

    described = {"trait": profile.trait, "fingerprint": profile.fingerprint, "origin": profile.origin}
    held = [name for name in (*FIELDS, *MOMENTS, *MATCHED) if getattr(profile, name) is not None]
    tensors = {name: np.ascontiguousarray(getattr(profile, name)) for name in held}
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ProfileError(f"the profile of {profile.trait} is not written: its {name} holds what is not finite")
    described["sha256"] = digest_of(tensors)
    data: bytes = save(tensors, metadata={"npti.profile": json.dumps(described, sort_keys=True)})
    return data


def write_profile(profile: NeuronProfile, path: Path, *, force: bool) -> None:
    """Write a ``.safetensors`` profile.

    Raises:
        ProfileError: a value is not finite.
        OutputError: the file exists and ``force`` is not set.
    """
    with atomic_output(path, force=force) as temporary:
        temporary.write_bytes(encode_profile(profile))


def read_profile(path: Path) -> NeuronProfile:
    """Read a ``.safetensors`` profile of any model.

    Raises:
        ProfileError: damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            described = json.loads(tensors.metadata()["npti.profile"])
            there = set(tensors.keys())
            optional = [name for name in (*MOMENTS, *MATCHED) if name in there]
            arrays = {name: tensors.get_tensor(name) for name in (*FIELDS, *optional)}
        digest = digest_of(arrays)
        if described.get("sha256", digest) != digest:  # earlier ones have none
            raise ValueError("its checksum is another")
        trait, mark, origin = described["trait"], described["fingerprint"], described["origin"]
        if not (isinstance(mark, str | None) and isinstance(origin, dict)):
            raise TypeError("fingerprint is no text, or origin no object")
        profile = NeuronProfile(trait=trait, fingerprint=mark, origin=origin, **arrays)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = shortened(str(error), 200)
        raise ProfileError(f"{path}: not a neuron profile, or damaged ({type(error).__name__}: {reason})") from error
    if not (isinstance(profile.trait, str) and (profile.trait in FACETS or is_own_name(profile.trait))):
        raise ProfileError(f"{path}: is a profile of {shortened(profile.trait)}, which is no name of a trait")
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 2 or array.shape != arrays[FIELDS[0]].shape:
            raise ProfileError(
                f"{path}: tensor {name} is {array.dtype} {shortened(array.shape)}, not a float32 matrix like the others"
            )
        if not np.isfinite(array).all():
            raise ProfileError(f"{path}: tensor {name} holds values that are not finite; identify again")
        if name in FIELDS[:2] and array.size and not 0 <= array.min() <= array.max() <= 1:
            raise ProfileError(f"{path}: tensor {name} holds values that are no probabilities; identify again")
    return profile
