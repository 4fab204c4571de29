"""A rule together with where it came from, as it is kept in adapters, steered checkpoints and steered GGUF files."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from npti_export.architectures import by_model_type
from npti_export.errors import AdapterError, OutputError, TraitError, shortened
from npti_export.fingerprint import Fingerprint
from npti_export.gguf.reader import GGUFFile, is_control_vector, read_gguf
from npti_export.gguf.shards import shard_paths
from npti_export.rule import SteeringRule
from npti_export.rule_bytes import MOST_NEURONS, RULE_SHA256, check_rule, decode_rule, encode_rule, rule_sha256
from npti_export.traits import parse_recorded
from npti_export.version import __version__

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKPOINT_FILE = "npti.json"
PEFT_TYPE = "NPTI"
SHIFT, CLAMP, CONSTANT = "npti_shift", "npti_clamp", "npti_constant"
Where = Literal["all", "response"]
_LONGEST_NAME = 200  # bytes; file systems take 255, and each part of a split model adds some


def check_strength(strength: Any) -> float:
    """The strength of an adapter as a float.

    Raises:
        AdapterError: not a finite number, or below zero.
    """
    try:
        value = float(strength)
    except (TypeError, ValueError, OverflowError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise AdapterError(
            f"strength {shortened(strength)}: give 0 (off) or more; for the other direction take the opposite pole"
        )
    return value


def check_where(where: Any) -> Where:
    """``all`` or ``response``.

    Raises:
        AdapterError: something else.
    """
    if where not in ("all", "response"):
        raise AdapterError(f"where={shortened(where)}: give 'all' or 'response'")
    return "response" if where == "response" else "all"


@dataclass(frozen=True)
class Provenance:
    """What a rule is, and for which model.

    Attributes:
        trait: poles and strengths, as the user gave them.
        gamma: strength of the shift that is folded into the rule; None where several were mixed.
        recipe: the resolved recipe as JSON.
        model: name of the model, for people.
        model_type: of its transformers configuration.
        fingerprint: of the model.
        base: hub id or place from which transformers can load the model.
        license: of the model, if known.
        version: of this tool.
        fidelity: what verification measured; empty before it.
    """

    trait: str
    gamma: float | None
    recipe: str
    model: str
    model_type: str
    fingerprint: Fingerprint
    base: str | None = None
    license: str | None = None
    version: str = __version__
    fidelity: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Provenance:
        """The inverse of :meth:`to_dict`; what a later version added is left out.

        Raises:
            ValueError: something is missing or of another type.
            TraitError: its traits are none.
        """
        from pydantic import TypeAdapter

        about: Provenance = TypeAdapter(cls).validate_python(values)
        for trait in about.trait.split() or [""]:
            parse_recorded(trait)
        return about


@dataclass(frozen=True)
class SavedRule:
    """A rule, its provenance, and the positions that it is meant for: ``all``, or those of the ``response``."""

    rule: SteeringRule
    about: Provenance
    where: Where = "all"


def artifact_format(path: Path) -> Literal["gguf", "peft", "checkpoint", "control-vector"]:
    """What kind of artifact a path is.

    Raises:
        AdapterError: none that holds a rule.
    """
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return "peft"
        if (path / CHECKPOINT_FILE).is_file():
            return "checkpoint"
        raise AdapterError(f"{path}: holds neither {ADAPTER_CONFIG} nor {CHECKPOINT_FILE}; it is not an output of ours")
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file or directory")
    with path.open("rb") as stream:
        found = stream.read(4) == b"GGUF"
    if found:
        return "control-vector" if is_control_vector(read_gguf(path)) else "gguf"
    raise AdapterError(
        f"{path}: holds no rule; give an adapter directory, a steered checkpoint directory or a steered GGUF "
        "(a profile becomes one with --profile and --trait)"
    )


def load_rule(path: Path) -> SavedRule:
    """The rule inside an adapter directory, a steered checkpoint directory, a steered GGUF or a control vector of ours.

    Raises:
        AdapterError: holds no rule, or a damaged one.
        GGUFError: not a readable GGUF.
    """
    kind = artifact_format(path)
    if kind == "peft":
        return _from_adapter(path)
    return _from_checkpoint(path) if kind == "checkpoint" else rule_of_gguf(read_gguf(path))


def rule_of_gguf(header: GGUFFile) -> SavedRule:
    """The rule that a GGUF was baked from.

    Raises:
        AdapterError: the file is not steered, or by a version that did not keep the rule.
    """
    stored, about = header.data("npti.rule"), header.text("npti.provenance")
    if stored is None and "npti.vector.kind" in header.by_key:
        raise AdapterError(f"{header.path}: holds a baked vector and no rule; it was measured when it was made")
    if stored is None or about is None:
        raise AdapterError(f"{header.path}: holds no steering rule (npti.rule); give a file made by npti-export")
    recipe = header.text("npti.recipe") or ""
    fidelity = {
        entry.key.removeprefix("npti.fidelity."): entry.shown
        for entry in header.keys
        if entry.key.startswith("npti.fidelity.")
    }
    provenance = read_provenance(lambda: json.loads(about) | {"recipe": recipe, "fidelity": fidelity}, str(header.path))
    rule = decode_rule(stored, str(header.path))
    check_rule(rule, json.loads(about), str(header.path))
    return SavedRule(rule, provenance)


def base_name(header: GGUFFile) -> str:
    """What the base of a steered GGUF was called: a file's name, without folders; of a long one the end.

    Raises:
        AdapterError: what is recorded is no name of a file.
    """
    recorded = header.text("npti.base.name") or header.path.name
    # What is not ASCII was escaped, so that a name may be longer than it was on the disk.
    name = Path(recorded).name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
    if not name.isprintable() or name in ("", ".."):
        raise AdapterError(f"{header.path}: npti.base.name is {shortened(recorded)}, no file's name; it is damaged")
    try:
        shard_paths(Path(name), len(header.parts))
    except OutputError:
        raise AdapterError(
            f"{header.path}: npti.base.name is {shortened(recorded)}, not the first of {len(header.parts)} files; "
            "it is damaged"
        ) from None
    return name


def described(saved: SavedRule) -> dict[str, Any]:
    """The provenance as it is written, with the checksum of the rule that is written beside it."""
    return saved.about.to_dict() | {RULE_SHA256: rule_sha256(saved.rule)}


def save_checkpoint_rule(saved: SavedRule, directory: Path) -> None:
    """Put the rule beside a steered checkpoint."""
    packed = base64.b64encode(encode_rule(saved.rule)).decode("ascii")
    text = json.dumps({"format": 1, "rule": packed, "provenance": described(saved)}, indent=2, ensure_ascii=False)
    (directory / CHECKPOINT_FILE).write_text(text + "\n", encoding="utf-8")


def adapter_tensors(saved: SavedRule) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of an adapter, dense, by their names in ``adapter_model.safetensors``.

    Per layer ``npti_shift`` ``[width]`` float32 and ``npti_clamp`` ``[width]`` uint8, 1 for a clamped neuron; where the
    rule has a constant also ``npti_constant`` ``[width]`` float32.
    """
    row, rule = by_model_type(saved.about.model_type, saved.about.model), saved.rule
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for layer in range(len(rule.shift)):
        prefix = f"base_model.model.{row.layers}.{layer}.{row.act}"
        tensors[f"{prefix}.{SHIFT}"] = rule.shift[layer]
        tensors[f"{prefix}.{CLAMP}"] = rule.clamp[layer].astype(np.uint8)
        if rule.constant is not None:
            tensors[f"{prefix}.{CONSTANT}"] = rule.constant[layer]
    return tensors


def _from_checkpoint(directory: Path) -> SavedRule:
    path = directory / CHECKPOINT_FILE
    content = _json(path)
    about = read_provenance(lambda: content["provenance"], str(path))
    try:
        packed = base64.b64decode(content["rule"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: its steering rule is damaged ({error}); make the checkpoint again") from error
    rule = decode_rule(packed, str(path))
    check_rule(rule, content["provenance"], str(path))
    return SavedRule(rule, about)


def _from_adapter(directory: Path) -> SavedRule:
    from safetensors import SafetensorError, safe_open

    config_path, weights = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    config = _json(config_path)
    if config.get("peft_type") != PEFT_TYPE:
        raise AdapterError(f"{config_path}: is a {str(config.get('peft_type'))[:40]} adapter, not one of npti-export")
    about = read_provenance(lambda: config["provenance"], str(config_path))
    try:
        with safe_open(weights, framework="np") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise AdapterError(f"{directory}: has no {ADAPTER_WEIGHTS}; the adapter is incomplete") from None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = shortened(str(error), 200)
        raise AdapterError(f"{weights}: is damaged ({reason}); download or make it again") from error
    return SavedRule(_stacked(tensors, config, about, str(weights)), about, check_where(config.get("where", "all")))


def _stacked(
    tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any], about: Provenance, where: str
) -> SteeringRule:
    """The rule of an adapter's tensors, after a check of every name and shape."""
    try:
        layers, width = int(config["layers"]), int(config["width"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{where}: its {ADAPTER_CONFIG} does not say how many layers and neurons: {shortened(str(error), 200)}"
        ) from error
    strength = check_strength(config.get("strength", 1.0))
    held = sum(tensor.size for tensor in tensors.values())
    widest = max((tensor.size for tensor in tensors.values()), default=0)
    if not 1 <= layers <= len(tensors) or not 1 <= width == widest or layers * width > min(held, MOST_NEURONS):
        raise AdapterError(
            f"{where}: holds {len(tensors)} tensors of {held} numbers, but its {ADAPTER_CONFIG} says "
            f"{shortened(layers)} layers of {shortened(width)} neurons; "
            "make the adapter again"
        )
    tensors = {from_layers(name): tensor for name, tensor in tensors.items()}
    zeros = np.zeros((layers, width), np.float32)
    rule = SteeringRule(zeros, zeros != 0, zeros if config.get("constant") is True else None)
    expected = {from_layers(name): like for name, like in adapter_tensors(SavedRule(rule, about)).items()}
    check_names(set(expected), set(tensors), where)
    for name, like in expected.items():
        tensor = tensors[name]
        if tensor.dtype.kind not in "fiub" or tensor.shape != like.shape or not np.isfinite(tensor).all():
            fault = "holds values that are not finite"
            if tensor.shape != like.shape or tensor.dtype.kind not in "fiub":
                fault = f"is {tensor.dtype} {shortened(tensor.shape)}"
            raise AdapterError(f"{where}: tensor {name} {fault}, not {like.shape} numbers; make the adapter again")

    def stacked(kind: str) -> np.ndarray[Any, Any]:
        return np.stack([tensors[name] for name in expected if name.endswith(kind)])

    shift, clamp = stacked(SHIFT).astype(np.float32), stacked(CLAMP).astype(np.bool_)
    constant = None if rule.constant is None else stacked(CONSTANT).astype(np.float32)
    if all(tensors[name].dtype == like.dtype for name, like in expected.items()):  # else somebody converted it
        check_rule(SteeringRule(shift, clamp, constant), config["provenance"], where)
    factor = np.float32(strength)
    clamp = clamp if strength else np.zeros_like(clamp)
    return SteeringRule(shift * factor, clamp, None if constant is None else constant * factor)


def from_layers(name: str) -> str:
    """A tensor's name from its layer's number on: what stands before depends on who wrapped the model."""
    match = re.search(r"[^.]+\.\d+\..*", name)
    return match[0] if match else name


def check_names(expected: set[str], found: set[str], where: str) -> None:
    """Raise if tensors are missing or left over.

    Raises:
        AdapterError: naming the first of them.
    """
    for what, names in (("is missing", expected - found), ("belongs to no layer of the model", found - expected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise AdapterError(
                f"{where}: tensor {shortened(min(names), 200)} {what}{more}; make the adapter for this model again"
            )


def read_provenance(read: Callable[[], dict[str, Any]], where: str) -> Provenance:
    """The provenance that ``read`` finds.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    try:
        return Provenance.from_dict(read())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, TraitError) as error:
        reason = shortened((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        raise AdapterError(f"{where}: does not say where its rule came from ({reason}); make it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read ({shortened(str(error), 200)}); make it again") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: is not a JSON object; make it again")
    return content
