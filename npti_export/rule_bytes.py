"""A rule as bytes, and the checksum of its values that is kept beside it: a bit that flips is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npti_export.checked import digest_of
from npti_export.errors import AdapterError, ProfileError, shortened
from npti_export.rule import SteeringRule

RULE_SHA256 = "rule_sha256"  # in the provenance as it is written; never carried over to what another rule is written to
# tensors of an encoded rule and their types; the second row is there only where the rule has a constant
_SPARSE = {"shift_index": np.int32, "shift_value": np.float32, "clamp_index": np.int32, "shape": np.int32}
_SPARSE_CONSTANT = {"constant_index": np.int32, "constant_value": np.float32}
MOST_NEURONS = 1 << 25  # of a rule, all layers together; Llama 405B has 6.7 million


def encode_rule(rule: SteeringRule) -> bytes:
    """The rule without its zeros, as the bytes of a safetensors file."""
    from safetensors.numpy import save

    index = np.flatnonzero(rule.shift)
    tensors = {
        "shift_index": index.astype(np.int32),
        "shift_value": rule.shift.ravel()[index],
        "clamp_index": np.flatnonzero(rule.clamp).astype(np.int32),
        "shape": np.array(rule.shift.shape, np.int32),
    }
    if rule.constant is not None and rule.constants:
        index = np.flatnonzero(rule.constant)
        tensors |= {"constant_index": index.astype(np.int32), "constant_value": rule.constant.ravel()[index]}
    return save(tensors)


def decode_rule(data: bytes, where: str) -> SteeringRule:
    """The inverse of :func:`encode_rule`.

    Raises:
        AdapterError: not such bytes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        has_constant = not _SPARSE_CONSTANT.keys().isdisjoint(tensors)
        for name, dtype in (_SPARSE | (_SPARSE_CONSTANT if has_constant else {})).items():
            if tensors[name].dtype != dtype or tensors[name].ndim != 1:
                raise ValueError(f"{name} is not a row of {np.dtype(dtype).name}")
        index, values, clamped, shape = (tensors[name] for name in _SPARSE)
        layers, width = shape.tolist()
        neurons = layers * width
        if min(layers, width) < 1 or neurons > MOST_NEURONS:
            raise ValueError(f"{layers} layers of {width} neurons cannot be")
        if ((clamped < 0) | (clamped >= neurons)).any():
            raise ValueError("neurons and values do not match")
        clamp = np.zeros((layers, width), np.bool_)
        clamp.ravel()[clamped] = True
        constant = _filled((layers, width), *(tensors[name] for name in _SPARSE_CONSTANT)) if has_constant else None
        return SteeringRule(_filled((layers, width), index, values), clamp, constant)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, ProfileError) as error:
        reason = shortened(str(error), 200)
        raise AdapterError(f"{where}: its steering rule is damaged ({reason}); make the file again") from error


def _filled(
    shape: tuple[int, int], index: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A matrix of zeros but for some values.

    Raises:
        ValueError: not one value for each place, or a place outside.
    """
    result = np.zeros(shape, np.float32)
    if len(values) != len(index) or ((index < 0) | (index >= result.size)).any():
        raise ValueError("neurons and values do not match")
    result.ravel()[index] = values
    return result


def rule_sha256(rule: SteeringRule) -> str:
    """SHA-256 of a rule's values, the same in whatever way they are kept."""
    values = {"shape": np.array(rule.shift.shape, "<i4"), "shift": _plain(rule.shift), "clamp": rule.clamp}
    if rule.constant is not None and rule.constants:  # one of zeros is not always kept
        values["constant"] = _plain(rule.constant)
    return digest_of(values)


def check_rule(rule: SteeringRule, provenance: Mapping[str, Any], where: str) -> None:
    """Raise unless a rule is the one that its provenance was written with, as far as that says so.

    Raises:
        AdapterError: it is another.
    """
    recorded = provenance.get(RULE_SHA256)
    if recorded is not None and recorded != rule_sha256(rule):
        raise AdapterError(
            f"{where}: its steering rule is not the one that was written ({RULE_SHA256} in its provenance is that of "
            "another), so it is damaged; make it again, or remove that entry if you changed the rule on purpose"
        )


def _plain(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As little-endian float32 without negative zeros, which an encoded rule does not keep."""
    result: np.ndarray[Any, Any] = (values + np.float32(0)).astype("<f4")
    return result
