"""What a file is, and where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npti_export.dial.adapters import check_adapters
from npti_export.dial.index import load_dial, server_command
from npti_export.errors import ModelError
from npti_export.export.gguf import PREFIX
from npti_export.files import DIAL_INDEX
from npti_export.gguf.blocks import type_name
from npti_export.gguf.reader import CONTROL_VECTOR, is_control_vector
from npti_export.gguf.shards import read_model
from npti_export.profile import SAFETENSORS_SUFFIXES
from npti_export.rule_io import artifact_format, load_rule


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe a GGUF (steered or not), an adapter, a steered checkpoint or a profile, as a flat JSON-able dictionary.

    Raises:
        NptiError: neither of these, or damaged.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".json":
        return _published(path)
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if magic == b"GGUF":
        return _gguf(path)
    if path.suffix in SAFETENSORS_SUFFIXES:
        return _profile(path)
    raise ModelError(f"{path}: neither a GGUF nor a profile")


def _directory(path: Path) -> dict[str, Any]:
    if (path / DIAL_INDEX).is_file():
        dial = load_dial(path)
        check_adapters(path, dial)
        overlaps = sum(one.kind == "overlap" for one in dial.adapters)
        return {
            "kind": "dial",
            "base": dial.base,
            "poles": ", ".join(dial.poles),
            "adapters": f"{len(dial.adapters)}, of which {overlaps} for what poles clamp in common",
            "mixed": dial.mixed,
            "server": server_command(dial),
        }
    saved = load_rule(path)
    layers, width = saved.rule.shift.shape
    about = saved.about.to_dict()
    return {
        "kind": "PEFT adapter" if artifact_format(path) == "peft" else "steered checkpoint",
        "shape": f"{layers} layers of {width} neurons",
        "shifted": saved.rule.shifted,
        "clamped": saved.rule.clamped,
        **({"constants": saved.rule.constants} if saved.rule.constants else {}),
        **about,
    }


def _gguf(path: Path) -> dict[str, Any]:
    header = read_model(path)
    steering = {entry.key: entry.shown for entry in header.keys if entry.key.startswith(PREFIX)}
    if is_control_vector(header):
        return {"kind": "control vector", "for": header.text(f"{CONTROL_VECTOR}.model_hint"), **steering}
    sizes = [header.by_key.get(f"{header.architecture}.{key}") for key in ("block_count", "feed_forward_length")]
    types = sorted({type_name(tensor.type_id) for tensor in header.tensors})
    return {
        "kind": header.text(f"{PREFIX}kind") or ("steered GGUF" if steering else "GGUF, not steered by npti-export"),
        "name": header.text("general.name"),
        "architecture": header.architecture,
        "layers": sizes[0].shown if sizes[0] else None,
        "mlp width": sizes[1].shown if sizes[1] else None,
        "tensor types": ", ".join(types),
        "bytes": header.size,
        **({"files": len(header.shards)} if header.shards else {}),
        **steering,
    }


def _profile(path: Path) -> dict[str, Any]:
    from npti_export.profile import read_profile

    profile = read_profile(path)
    layers, width = profile.p_plus.shape
    return {
        "kind": "neuron profile",
        "trait": profile.trait,
        "shape": f"{layers} layers of {width} neurons",
        "delta >= 0.1": int((profile.delta >= 0.1).sum()),
        "delta <= -0.1": int((profile.delta <= -0.1).sum()),
        "fingerprint": profile.fingerprint,
        **profile.origin,
    }


def _published(path: Path) -> dict[str, Any]:
    from npti_export.published import published_rows

    rows = published_rows(path, None)
    layers = sorted({row[0] for row in rows})
    deltas = [row[2] for row in rows]
    return {
        "kind": "neuron profile of one pole, published JSON format",
        "neurons": len(rows),
        "layers": f"{layers[0]} to {layers[-1]}",
        "delta": f"{min(deltas):.3f} to {max(deltas):.3f}",
    }
