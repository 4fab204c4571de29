"""One table of model families: what their gated MLP is called, and which outputs they support.

GGUF names are llama.cpp's (src/llama-arch.cpp), transformers names those of the ``modeling_*`` files. A new
family is a row here and a test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from npti_export.errors import ArchitectureError, shortened

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        name: ours, for messages.
        model_types: ``model_type`` of the transformers configuration.
        gguf: ``general.architecture`` where llama.cpp loads optional biases of the MLP (``create_tensor`` with
            TENSOR_NOT_REQUIRED in its ``load_tensors``), so that extra neurons can be baked; else None.
        checkpoint: can be written as a ``LlamaForCausalLM``, whose MLP may have biases: its layers compute what
            llama's do, with the same tensor names, or with biases of q, k and v that ``attention_bias`` holds.
        layers: attribute path to the list of decoder layers in the transformers model.
        act: attribute path of the activation module inside a layer; its output is ``a`` of the method. It must be
            elementwise, and a module of its own in each layer.
        norms: names of the per-layer norm weights in a transformers checkpoint, in the order of ``gguf_norms``.
        final_norm: name of the last norm's weight in a transformers checkpoint.
        gguf_norms: names of the per-layer norm weights in a GGUF.
    """

    name: str
    model_types: tuple[str, ...]
    gguf: str | None = None
    checkpoint: bool = False
    layers: str = "model.layers"
    act: str = "mlp.act_fn"
    norms: tuple[str, ...] = _TWO_NORMS
    final_norm: str = "model.norm.weight"
    gguf_norms: tuple[str, ...] = ("attn_norm", "ffn_norm")

    @property
    def act_pattern(self) -> str:
        """A regular expression for the names of the activation modules, the layer's number as its only group."""
        tail = self.layers.rpartition(".")[2]
        return rf"(?:.*\.)?{re.escape(tail)}\.(\d+)\.{re.escape(self.act)}"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", ("llama",), gguf="llama", checkpoint=True),
    Architecture("mistral", ("mistral",), gguf="llama", checkpoint=True),
    Architecture("qwen2", ("qwen2",), checkpoint=True),
    Architecture("qwen3", ("qwen3",)),
    Architecture("gemma", ("gemma",)),
    Architecture("gemma2", ("gemma2", "gemma3_text"), norms=_FOUR_NORMS),
    Architecture("phi3", ("phi3",), act="mlp.activation_fn"),
    Architecture("granite", ("granite",)),
    Architecture("olmo2", ("olmo2",), norms=_FOUR_NORMS[1:2] + _FOUR_NORMS[3:]),
    Architecture("smollm3", ("smollm3",)),
)

SILU = ("silu", "swish")  # two names of the one activation for which a rule can be compiled
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
    raise ArchitectureError(f"{where}: architecture {shortened(model_type)} is not supported; supported are {known}")


def by_gguf_name(architecture: str, where: str) -> Architecture:
    """The row whose GGUF architecture can be baked.

    Raises:
        ArchitectureError: not in the table, or llama.cpp loads no MLP biases for it.
    """
    for row in ARCHITECTURES:
        if row.gguf == architecture:
            return row
    known = ", ".join(sorted({row.gguf for row in ARCHITECTURES if row.gguf}))
    raise ArchitectureError(
        f"{where}: GGUF architecture {shortened(architecture)} cannot be baked; supported are {known} "
        "(SmolLM2, Llama, Mistral, TinyLlama, Yi and others are stored as llama)"
    )
