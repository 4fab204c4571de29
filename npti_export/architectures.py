"""Two tables of model families: what their gated MLP is called in transformers, and what in llama.cpp.

Names of the first table are those of transformers' ``modeling_*`` files, names of the second llama.cpp's: tensors from
src/llama-arch.cpp, graph nodes from the ``cb`` calls of src/models and of ``build_ffn`` in src/llama-graph.cpp. A new
family is a row here and a test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from npti_export.errors import ArchitectureError, shortened

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_GLM_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        name: ours, for messages.
        model_types: ``model_type`` of the transformers configuration.
        checkpoint: can be written as a ``LlamaForCausalLM``, whose MLP may have biases: its layers compute what
            llama's do, with the same tensor names, or with biases of q, k and v that ``attention_bias`` holds.
        layers: attribute path to the list of decoder layers in the transformers model.
        act: attribute path of the activation module inside a layer; its output is ``a`` of the method. It must be
            elementwise, and a module of its own in each layer. Where it belongs to an ``experts`` module, the layer is
            a mixture, see :mod:`npti_export.routing`.
        down: attribute path of the down projection inside a layer; a mixture has none of its own.
        norms: names of the per-layer norm weights in a transformers checkpoint, in the order of the ``norms`` of its
            :class:`GGUFFamily`.
        final_norm: name of the last norm's weight in a transformers checkpoint.
        norm_offset: what the model adds to a norm weight before it multiplies; GGUF files hold the sum.
    """

    name: str
    model_types: tuple[str, ...]
    checkpoint: bool = False
    layers: str = "model.layers"
    act: str = "mlp.act_fn"
    down: str = "mlp.down_proj"
    norms: tuple[str, ...] = _TWO_NORMS
    final_norm: str = "model.norm.weight"
    norm_offset: float = 0.0

    @property
    def mixture(self) -> bool:
        """Whether the MLPs are experts."""
        return self.act.endswith("experts.act_fn")

    @property
    def act_pattern(self) -> str:
        """A regular expression for the names of the activation modules, the layer's number as its only group."""
        tail = self.layers.rpartition(".")[2]
        return rf"(?:.*\.)?{re.escape(tail)}\.(\d+)\.{re.escape(self.act)}"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", ("llama",), checkpoint=True),
    Architecture("mistral", ("mistral",), checkpoint=True),
    Architecture("ministral", ("ministral3",)),
    Architecture("qwen2", ("qwen2",), checkpoint=True),
    Architecture("qwen3", ("qwen3",)),
    Architecture("gemma", ("gemma",), norm_offset=1.0),
    Architecture("gemma2", ("gemma2", "gemma3_text"), norms=_FOUR_NORMS, norm_offset=1.0),
    Architecture("phi3", ("phi3",), act="mlp.activation_fn"),
    Architecture("granite", ("granite",)),
    Architecture("olmo2", ("olmo2", "exaone4"), norms=_FOUR_NORMS[1:2] + _FOUR_NORMS[3:]),
    Architecture("smollm3", ("smollm3",)),
    Architecture("stablelm", ("stablelm",)),
    Architecture("cohere", ("cohere", "cohere2"), norms=_TWO_NORMS[:1]),
    Architecture("glm4", ("glm4",), act="mlp.activation_fn", norms=_GLM_NORMS),
    Architecture("seed_oss", ("seed_oss",)),
    Architecture("ernie4_5", ("ernie4_5",)),
    Architecture("hunyuan", ("hunyuan_v1_dense",)),
    Architecture("mixtral", ("mixtral",), act="mlp.experts.act_fn"),
    Architecture("qwen3_moe", ("qwen3_moe",), act="mlp.experts.act_fn"),
    Architecture("olmoe", ("olmoe",), act="mlp.experts.act_fn"),
)

Activation = Literal["silu", "gelu_pytorch_tanh"]
_NO_BIASES = "llama.cpp loads no biases for its MLPs, which extra neurons need"
_EXPERTS = "its MLPs are experts, for which llama.cpp loads no biases, which extra neurons need"
_NOT_SILU = "its activation is GELU, and a rule is compiled into extra neurons for SiLU only"


@dataclass(frozen=True)
class GGUFFamily:
    """One family of GGUF files, as the llama.cpp that llama-cpp-python 0.3.36 bundles runs it.

    Graph nodes are given without the ``-N`` of their layer.

    Attributes:
        name: ``general.architecture``.
        model_type: of the transformers configuration, which is recorded in artifacts; where transformers has no such
            class, the name that the model's own code uses.
        bake: what a steered file is: ``itself`` where llama.cpp loads optional biases of the MLP
            (``create_tensor`` with TENSOR_NOT_REQUIRED) and passes them to ``build_ffn``, ``llama`` where the same
            computation can be written as that architecture, None where neither is so.
        ragged: whether the same computation can be written as ``deci`` (:data:`RAGGED`), which takes a width a layer.
        activation: name of the gate's non-linearity. llama.cpp's GELU is the tanh approximation.
        fused: the up projection holds the gate's rows in front of its own, and the gate's node both.
        gate: node of the gate's output before the non-linearity, ``[rows, n_ff]``, or ``[rows, 2 n_ff]`` where fused.
            A gate with a bias has another one, its name with ``_b`` behind it.
        mlp_input: node that the gate reads, ``[rows, n_embd]``.
        mlp_output: node of the down projection's output, its bias included, before any norm or scale,
            ``[rows, n_embd]``.
        norms: names of the per-layer norm weights in the file, in the order of :attr:`Architecture.norms`.
        why_not: where ``bake`` is None, the reason.
        mixture: its MLPs are experts. Then ``gate`` is ``[n_ff, experts per token]`` for each row, and there are the
            nodes of :mod:`npti_export.runtimes.llamacpp.experts`, too.
    """

    name: str
    model_type: str
    bake: Literal["itself", "llama"] | None = None
    ragged: bool = False
    activation: Activation = "silu"
    fused: bool = False
    gate: str = "ffn_gate"
    mlp_input: str = "ffn_norm"
    mlp_output: str = "ffn_out"
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    why_not: str = _NO_BIASES
    mixture: bool = False

    @property
    def product(self) -> str:
        """Node of the down projection's input, ``[rows, n_ff]``, in dense models (``build_ffn``)."""
        return {"silu": "ffn_swiglu", "gelu_pytorch_tanh": "ffn_geglu"}[self.activation]

    @property
    def architecture(self) -> Architecture:
        """The row of the first table; for a model that transformers has no class for, one that only has its name."""
        rows = (row for row in ARCHITECTURES if self.model_type in row.model_types)
        return next(rows, Architecture(self.name, (self.model_type,)))


_FOUR = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_POST = (
    "post_attention_norm",
    "post_ffw_norm",
)  # olmo2 and exaone4 norm what attention and MLP put out, not their input
GGUF_FAMILIES: tuple[GGUFFamily, ...] = (
    GGUFFamily("llama", "llama", bake="itself", ragged=True),
    GGUFFamily("mistral3", "ministral3", bake="itself"),  # may scale queries by their position
    GGUFFamily("granite", "granite", bake="itself"),  # scales the MLP's output, in an unnamed node after ffn_out
    GGUFFamily("minicpm", "minicpm", bake="itself"),  # the same
    GGUFFamily("deci", "deci", bake="itself", ragged=True),
    GGUFFamily("qwen2", "qwen2", bake="llama", ragged=True),
    GGUFFamily("qwen3", "qwen3"),
    GGUFFamily("gemma", "gemma", activation="gelu_pytorch_tanh", why_not=_NOT_SILU),
    GGUFFamily("gemma2", "gemma2", activation="gelu_pytorch_tanh", norms=_FOUR, why_not=_NOT_SILU),
    GGUFFamily("gemma3", "gemma3_text", activation="gelu_pytorch_tanh", norms=_FOUR, why_not=_NOT_SILU),
    GGUFFamily("phi3", "phi3", fused=True, gate="ffn_up"),
    GGUFFamily("olmo2", "olmo2", mlp_input="ffn_inp", norms=_POST),
    GGUFFamily("smollm3", "smollm3"),
    GGUFFamily("stablelm", "stablelm"),
    GGUFFamily("internlm2", "internlm2"),
    GGUFFamily("command-r", "cohere", mlp_input="attn_norm", norms=("attn_norm",)),
    GGUFFamily("cohere2", "cohere2", mlp_input="attn_norm", norms=("attn_norm",)),
    GGUFFamily("exaone", "exaone"),
    GGUFFamily("exaone4", "exaone4", mlp_input="ffn_inp", norms=_POST),
    GGUFFamily("glm4", "glm4", fused=True, gate="ffn_up", norms=_FOUR),
    GGUFFamily("seed_oss", "seed_oss", mlp_input="attn_post_norm", norms=("attn_norm", "post_attention_norm")),
    GGUFFamily("ernie4_5", "ernie4_5"),
    GGUFFamily("hunyuan-dense", "hunyuan_v1_dense"),
)
GGUF_MIXTURES: tuple[GGUFFamily, ...] = tuple(
    GGUFFamily(name, model, gate="ffn_moe_gate", mlp_output="ffn_moe_out", why_not=_EXPERTS, mixture=True)
    for name, model in (("llama", "mixtral"), ("qwen3moe", "qwen3_moe"), ("olmoe", "olmoe"))
)

Layout = Literal["uniform", "ragged"]  # all layers as wide as the widest, or each as wide as it must be
RAGGED = "deci"  # the family whose files say how wide each layer is (src/models/deci.cpp)
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


def gguf_family(architecture: str, where: str, *, mixture: bool = False) -> GGUFFamily:
    """The row for a ``general.architecture`` of dense models or of mixtures of experts.

    Raises:
        ArchitectureError: not in the table.
    """
    table = GGUF_MIXTURES if mixture else GGUF_FAMILIES
    for row in table:
        if row.name == architecture:
            return row
    known = ", ".join(row.name for row in table)
    if mixture:
        raise ArchitectureError(
            f"{where}: mixtures of experts of the GGUF architecture {shortened(architecture)} are not supported; "
            f"supported are those of {known}, and dense models"
        )
    raise ArchitectureError(
        f"{where}: GGUF architecture {shortened(architecture)} is not supported; supported are {known} "
        "(SmolLM2, Llama, Mistral, TinyLlama, Yi and others are stored as llama)"
    )


_CONVERTED_AS = {"mistral": "llama"}  # where llama.cpp's converter gives the file another family's name


def converted_name(model_type: str | None) -> str | None:
    """The ``general.architecture`` of the GGUF that llama.cpp's converter makes of a ``model_type`` that bakes."""
    return _CONVERTED_AS.get(model_type or "", model_type)


def bakes_once_converted(model_type: str | None) -> bool:
    """Whether the GGUF that llama.cpp's converter makes of a ``model_type`` is of a family that can be baked."""
    name = converted_name(model_type)
    return any(row.model_type == name and row.bake is not None for row in GGUF_FAMILIES)


def check_ragged(family: GGUFFamily, where: str) -> None:
    """Raise if a steered GGUF of this family cannot have a width for each layer.

    Raises:
        ArchitectureError: it says for which that works.
    """
    if not family.ragged:
        able = ", ".join(row.name for row in GGUF_FAMILIES if row.ragged)
        raise ArchitectureError(
            f"{where}: --layout ragged: llama.cpp takes a width for each layer from {RAGGED} files only, and those "
            f"cannot say all that {family.name} computes; it works for {able}; take --layout uniform for this one"
        )


def check_bakeable(family: GGUFFamily, where: str) -> None:
    """Raise if no steered GGUF of this family can be made.

    Raises:
        ArchitectureError: it says why, and what can be made instead.
    """
    if family.bake is None:
        able = ", ".join(row.name for row in GGUF_FAMILIES if row.bake)
        raise ArchitectureError(
            f"{where}: extra neurons cannot be added to a GGUF of {family.name}: {family.why_not}; "
            f"it works for {able}; for this one take --format peft on the transformers model, or "
            "--format control-vector"
        )
