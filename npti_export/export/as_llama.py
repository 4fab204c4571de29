"""A model as the ``LlamaForCausalLM`` that computes the same: the one stock class whose MLP may have biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npti_export.activations import SILU
from npti_export.architectures import ARCHITECTURES, by_model_type
from npti_export.compiler.program import MLPProgram
from npti_export.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig

# Of the added width: divisible for tensor parallelism and for every quantisation of llama.cpp; the second for both with
# blocks of 32 only, where the width was limited.
MULTIPLE, LEAST_MULTIPLE = 256, 32
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip


def check_expressible(config: PretrainedConfig, where: str) -> None:
    """Raise unless a steered checkpoint of this model can be written, from its configuration alone.

    Raises:
        ArchitectureError: another family, activation or attention than llama's, biases of its own, quantised weights.
    """
    row = by_model_type(str(config.model_type), where)
    if not row.checkpoint:
        able = ", ".join(name for one in ARCHITECTURES if one.checkpoint for name in one.model_types)
        raise ArchitectureError(
            f"{where}: a steered checkpoint of {config.model_type} cannot be written, as no stock class has biases in "
            f"its MLP; it works for {able}, and --format peft works for this one"
        )
    faults = {
        f"its activation is {config.hidden_act}": config.hidden_act not in SILU,
        "it has MLP biases of its own": getattr(config, "mlp_bias", False),
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        "its layers attend through a sliding window": _slides(config),
    }
    for fault, found in faults.items():
        if found:
            raise ArchitectureError(
                f"{where}: {fault}, which a steered checkpoint cannot hold; --format peft works for it"
            )


def _slides(config: PretrainedConfig) -> bool:
    if config.model_type == "qwen2" and not getattr(config, "use_sliding_window", False):
        return False
    return getattr(config, "sliding_window", None) is not None


def llama_config(config: PretrainedConfig, program: MLPProgram) -> LlamaConfig:
    """The configuration of the widened model.

    Args:
        config: of the model, see :func:`check_expressible`; a llama one keeps everything it says.
        program: padded, all layers equally wide.
    """
    from transformers import LlamaConfig

    values: dict[str, Any]
    if config.model_type == "llama":
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    else:
        values = {key: getattr(config, key) for key in _KEPT if hasattr(config, key)}
        values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values["attention_bias"] = config.model_type == "qwen2"
    values |= {"intermediate_size": program.width + program.layers[0].units, "mlp_bias": True, "hidden_act": "silu"}
    values.pop("quantization_config", None)
    return LlamaConfig(**values, architectures=["LlamaForCausalLM"])


def padded_program(program: MLPProgram, multiple: int = MULTIPLE) -> MLPProgram:
    """The program with every layer as wide as the widest, in steps of ``multiple``."""
    extra = program.extra_width(multiple)
    return MLPProgram(program.width, tuple(layer.padded(extra) for layer in program.layers))
