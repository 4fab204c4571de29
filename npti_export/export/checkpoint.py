"""Write a steered checkpoint: a directory that transformers and servers load as a plain llama."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.errors import ModelError, shortened
from npti_export.export import dense
from npti_export.export.as_llama import MULTIPLE, llama_config, padded_program
from npti_export.export.safetensors_stream import TORCH_DTYPES, OutTensor, write_safetensors
from npti_export.files import COMPANIONS
from npti_export.models import weight_files

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PretrainedConfig

_SHARD_BYTES = 5_000_000_000
_WRITTEN_DTYPES = ("F32", "F16", "BF16")
MLP_WEIGHTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Weight:
    """A tensor of the unsteered model.

    Attributes:
        name: in the checkpoint.
        shape: of the tensor.
        dtype: as safetensors calls it.
        read: gives it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint, laid out but not written: its configuration, and the tensors of each shard."""

    config: LlamaConfig
    program: MLPProgram
    shards: tuple[tuple[OutTensor, ...], ...]

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)


def directory_weights(directory: Path) -> list[list[Weight]]:
    """The weights of a transformers directory, by file, not read yet.

    Raises:
        ModelError: weights that are no floats.
    """
    from safetensors import safe_open

    shards = []
    for path, wanted in weight_files(directory).items():
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if wanted is None or name in wanted]  # noqa: SIM118 (not a dict)
            shapes = {name: tensors.get_slice(name) for name in names}
            shard = [
                Weight(name, tuple(shapes[name].get_shape()), shapes[name].get_dtype(), _reader(path, name))
                for name in names
                if not name.endswith("rotary_emb.inv_freq")  # older checkpoints; computed by every current class
            ]
        for weight in shard:
            if weight.dtype not in _WRITTEN_DTYPES:
                raise ModelError(f"{path}: tensor {weight.name} is {weight.dtype}; take the model in 16 or 32 bits")
        shards.append(shard)
    return shards


def model_weights(model: Any, dtype: str | None = None) -> list[list[Weight]]:
    """The weights of a model in memory, such as one that was read from a GGUF.

    Args:
        model: a transformers causal language model.
        dtype: a torch dtype's name that they are cast to; None keeps theirs.
    """
    import torch

    target = getattr(torch, dtype) if dtype else None
    names = {getattr(torch, name): code for code, name in TORCH_DTYPES.items()}
    tied = bool(model.config.tie_word_embeddings)
    shards: list[list[Weight]] = [[]]
    size = 0
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        size += tensor.nbytes
        if size > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.nbytes
        code = names[target or tensor.dtype]
        shards[-1].append(Weight(name, tuple(tensor.shape), code, _caster(tensor, target)))
    return shards


def plan_checkpoint(
    config: PretrainedConfig, weights: list[list[Weight]], program: MLPProgram, multiple: int = MULTIPLE
) -> CheckpointPlan:
    """Lay out the steered checkpoint: the same shards, wider MLPs, and the biases that go with them.

    Args:
        config: of the unsteered model, see :func:`npti_export.export.as_llama.check_expressible`.
        weights: of the unsteered model, by shard.
        program: as many layers as the model has.
        multiple: of the added width.

    Raises:
        ModelError: a tensor is missing, left over or of another shape than the configuration says.
    """
    padded = padded_program(program, multiple)
    wide = llama_config(config, padded)
    adds_o_bias = bool(wide.attention_bias) and not getattr(config, "attention_bias", False)
    expected = _expected(wide)
    shards = []
    for shard in weights:
        planned: list[OutTensor] = []
        for weight in shard:
            layer = _layer(weight.name, padded)
            if layer and weight.name.endswith(MLP_WEIGHTS) and len(weight.shape) != 2:
                raise ModelError(f"tensor {weight.name} is {shortened(weight.shape)} and no matrix; it is damaged")
            planned.append(_wide(weight, layer) if layer and weight.name.endswith(MLP_WEIGHTS) else _same(weight))
            if layer and weight.name.endswith(MLP_WEIGHTS):
                planned.append(_bias(weight, padded.width, layer))
            if adds_o_bias and weight.name.endswith("self_attn.o_proj.weight"):
                planned.append(_zeros(weight.name.replace("weight", "bias"), weight.shape[0], weight.dtype))
        shards.append(tuple(planned))
    _check({one.name: one.shape for shard in shards for one in shard}, expected, bool(wide.tie_word_embeddings))
    return CheckpointPlan(wide, padded, tuple(shards))


def write_checkpoint(plan: CheckpointPlan, directory: Path) -> None:
    """Write weights, their index and ``config.json`` into an existing directory."""
    count = len(plan.shards)
    places: dict[str, str] = {}
    for number, shard in enumerate(plan.shards, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_safetensors(shard, directory / name)
        places |= {tensor.name: name for tensor in shard}
    if count > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(places.items()))}
        _write_json(directory / "model.safetensors.index.json", index)
    dtype = _main_dtype(plan)
    _write_json(
        directory / "config.json", plan.config.to_diff_dict() | {"dtype": dtype} | _older_names(plan.config, dtype)
    )


def _main_dtype(plan: CheckpointPlan) -> str:
    """The dtype of most bytes."""
    sizes: Counter[str] = Counter()
    for shard in plan.shards:
        for tensor in shard:
            sizes[tensor.dtype] += tensor.nbytes
    return TORCH_DTYPES[sizes.most_common(1)[0][0]]


def copy_beside(source: Path, directory: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, chat template, generation settings, licence."""
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def _older_names(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Fields under the names that readers before transformers 5 know.

    Several runtimes read ``rope_theta`` and ``rope_scaling`` only, and silently take 10000 where it is missing.
    """
    rope = dict(config.rope_parameters)
    fields: dict[str, Any] = {"torch_dtype": dtype, "rope_theta": rope.pop("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    return fields


def _expected(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import LlamaForCausalLM

    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    except Exception as error:  # of a configuration that was taken for one until it is used, such as odd frequencies
        reason = shortened(str(error).strip() or type(error).__name__, 200)
        raise ModelError(f"config.json: transformers makes no model of it ({reason}); download it again") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    optional = {"lm_head.weight"} if tied else set()
    for name in sorted(expected.keys() - found.keys() - optional):
        raise ModelError(f"tensor {name} is in none of the model's files; the download is incomplete")
    for name in sorted(found.keys() - expected.keys()):
        raise ModelError(f"tensor {name} is unknown to a llama; this model cannot be written as a steered checkpoint")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ModelError(f"tensor {name} is {shape}, and the configuration says {expected[name]}; it is damaged")


def _layer(name: str, program: MLPProgram) -> LayerProgram | None:
    match = re.match(r"model\.layers\.([0-9]{1,4})\.", name)
    if match is None:
        return None
    index = int(match[1])
    return program.layers[index] if index < len(program.layers) else None


def _same(weight: Weight) -> OutTensor:
    return OutTensor(weight.name, weight.shape, weight.dtype, weight.read)


def _wide(weight: Weight, layer: LayerProgram) -> OutTensor:
    rows, columns = weight.shape
    down = weight.name.endswith("down_proj.weight")
    shape = (rows, columns + layer.units) if down else (rows + layer.units, columns)
    return OutTensor(weight.name, shape, weight.dtype, lambda: dense.widened(weight.name, weight.read(), layer))


def _bias(weight: Weight, width: int, layer: LayerProgram) -> OutTensor:
    import torch

    name = weight.name.removesuffix("weight") + "bias"
    dtype, rows = getattr(torch, TORCH_DTYPES[weight.dtype]), weight.shape[0]
    if name.endswith("up_proj.bias"):
        return _zeros(name, rows + layer.units, weight.dtype)
    if name.endswith("down_proj.bias"):
        return OutTensor(name, (rows,), weight.dtype, lambda: dense.down_bias(rows, layer, dtype, weight.read))
    return OutTensor(name, (width + layer.units,), weight.dtype, lambda: dense.gate_bias(width, layer, dtype))


def _zeros(name: str, length: int, dtype: str) -> OutTensor:
    import torch

    return OutTensor(name, (length,), dtype, lambda: torch.zeros(length, dtype=getattr(torch, TORCH_DTYPES[dtype])))


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    return read


def _caster(tensor: torch.Tensor, dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
    return lambda: tensor if dtype is None else tensor.to(dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # escaped, as transformers writes them: names from a damaged configuration may hold what UTF-8 has no bytes for
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
