"""One table of model families: what their gated MLP is called, and which outputs they support.

GGUF names are llama.cpp's (src/llama-arch.cpp), transformers names those of the ``modeling_*`` files. A new
family is a row here and a test. A row without ``gguf`` can be identified but not baked.
"""

from __future__ import annotations

from dataclasses import dataclass

from npti_export.errors import ArchitectureError


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        name: ours, for messages.
        model_types: ``model_type`` of the transformers configuration.
        gguf: ``general.architecture`` where llama.cpp loads optional biases of the MLP (``create_tensor`` with
            TENSOR_NOT_REQUIRED in its ``load_tensors``), so that extra neurons can be baked; else None.
        activation: the gate's non-linearity.
        layers: attribute path to the list of decoder layers in the transformers model.
        act: attribute path of the activation module inside a layer; its output is ``a`` of the method.
        norms: names of the per-layer norm weights in a transformers checkpoint, in the order of ``gguf_norms``.
        final_norm: name of the last norm's weight in a transformers checkpoint.
        gguf_norms: names of the per-layer norm weights in a GGUF.
    """

    name: str
    model_types: tuple[str, ...]
    gguf: str | None
    activation: str = "silu"
    layers: str = "model.layers"
    act: str = "mlp.act_fn"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "model.norm.weight"
    gguf_norms: tuple[str, ...] = ("attn_norm", "ffn_norm")


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", ("llama", "mistral"), gguf="llama"),
    Architecture("qwen2", ("qwen2",), gguf=None),
    Architecture("qwen3", ("qwen3",), gguf=None),
)

FFN_GATE, FFN_UP, FFN_DOWN = "blk.{}.ffn_gate", "blk.{}.ffn_up", "blk.{}.ffn_down"


def by_model_type(model_type: str, where: str) -> Architecture:
    """The row for a transformers ``model_type``.

    Raises:
        ArchitectureError: not in the table.
    """
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = ", ".join(name for row in ARCHITECTURES for name in row.model_types)
    raise ArchitectureError(f"{where}: architecture {model_type!r} is not supported; supported are {known}")


def by_gguf_name(architecture: str, where: str) -> Architecture:
    """The row whose GGUF architecture can be baked.

    Raises:
        ArchitectureError: not in the table, or llama.cpp loads no MLP biases for it.
    """
    for row in ARCHITECTURES:
        if row.gguf == architecture:
            return row
    known = ", ".join(row.gguf for row in ARCHITECTURES if row.gguf)
    raise ArchitectureError(
        f"{where}: GGUF architecture {architecture!r} cannot be baked; supported are {known} "
        "(SmolLM2, Llama, Mistral, TinyLlama, Yi and others are stored as llama)"
    )
