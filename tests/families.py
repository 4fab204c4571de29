"""Tiny random GGUF files of every family, with a working tokenizer, written by gguf-py."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

VOCABULARY = 1024  # the default tokenizer's first tokens: its special tokens, the bytes and the first merges
HEADS, KV_HEADS = 4, 2
FOLLOWING = 389  # of a model that is decided: from one token to the next that it says; prime to VOCABULARY
_FOUR = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_POST = ("post_attention_norm", "post_ffw_norm")
_GRANITE = {"logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 3.0}


@dataclass(frozen=True)
class Layout:
    """What a family's file has beside llama's or instead of it, as llama.cpp's loader of the family demands."""

    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    qk_norms: str = ""  # "head": one weight for each dimension of a head; "all": of all heads
    qkv_bias: bool = False
    norm_bias: bool = False
    fused: bool = False  # ffn_up holds the gate, too
    fused_qkv: bool = False
    kv_heads: int = KV_HEADS
    output: bool = False
    layer_norm: bool = False
    keys: dict = field(default_factory=dict)


LAYOUTS = {
    "llama": Layout(),
    "mistral3": Layout(),
    "granite": Layout(keys=_GRANITE),
    "minicpm": Layout(keys=_GRANITE),
    "deci": Layout(),
    "qwen2": Layout(qkv_bias=True),
    "qwen3": Layout(qk_norms="head"),
    "gemma": Layout(),
    "gemma2": Layout(_FOUR, keys={"attention.sliding_window": 512}),
    "gemma3": Layout(_FOUR, qk_norms="head", keys={"attention.sliding_window": 512}),
    "phi3": Layout(fused=True, fused_qkv=True, output=True),
    "olmo2": Layout(_POST, qk_norms="all", output=True),
    "smollm3": Layout(),
    "stablelm": Layout(norm_bias=True, output=True, layer_norm=True),
    "internlm2": Layout(output=True),
    "command-r": Layout(("attn_norm",), layer_norm=True, keys={"logit_scale": 0.5}),
    "cohere2": Layout(("attn_norm",), layer_norm=True, keys={"logit_scale": 0.5, "attention.sliding_window": 512}),
    "exaone": Layout(),
    "exaone4": Layout(_POST, qk_norms="head"),
    "glm4": Layout(_FOUR, fused=True),
    "seed_oss": Layout(("attn_norm", "post_attention_norm")),
    "ernie4_5": Layout(),
    "hunyuan-dense": Layout(qk_norms="head"),
}


# Mixtures of experts, by the name of their architecture; EXPERTS of EXPERT_ROWS neurons, EXPERTS_USED a token.
MIXTURES = {
    "llama": Layout(),
    "qwen3moe": Layout(qk_norms="head", output=True, keys={"expert_feed_forward_length": 32}),
    "olmoe": Layout(qk_norms="all", kv_heads=HEADS, output=True),
}
EXPERTS, EXPERTS_USED, EXPERT_ROWS = 6, 2, 32


def cut_tokenizer(model):
    """The tokenizer of a GGUF, cut to VOCABULARY tokens."""
    from gguf import GGUFReader

    fields = GGUFReader(model).fields
    get = lambda key: fields[f"tokenizer.{key}"].contents()  # noqa: E731
    tokens = get("ggml.tokens")[:VOCABULARY]
    known = set(tokens)
    merges = [merge for merge in get("ggml.merges") if merge.replace(" ", "") in known]
    return {
        "tokens": tokens,
        "types": get("ggml.token_type")[:VOCABULARY],
        "merges": merges,
        "template": get("chat_template"),
    }


class TinyWriter:
    """Writes random tensors in one type, single ones in another by their names; the same seed gives the same model."""

    def __init__(self, path, family, kind, seed, kinds=(), **split):
        from gguf import GGUFWriter

        self.writer = GGUFWriter(path, family, **split)
        self.kind, self.kinds = kind, dict(kinds)
        self.rng = np.random.default_rng(seed)

    def add(self, name, values):
        """In the file's own type, K-quants through ggml."""
        from gguf import GGMLQuantizationType

        from npti_export.gguf.blocks import quantise

        kind = GGMLQuantizationType[self.kinds.get(name, self.kind)]
        if kind == GGMLQuantizationType.F32:
            self.writer.add_tensor(name, values)
        elif kind == GGMLQuantizationType.F16:
            self.writer.add_tensor(name, values.astype(np.float16))
        else:
            rows = quantise(values.reshape(-1, values.shape[-1]), int(kind))
            self.writer.add_tensor(name, rows.reshape(*values.shape[:-1], -1), raw_dtype=kind)

    def matrix(self, name, rows, columns, scale=1.0):
        self.add(name, (self.rng.normal(size=(rows, columns)) * scale / np.sqrt(columns)).astype(np.float32))

    def matrices(self, name, count, rows, columns, scale=1.0):
        """One for each expert."""
        self.add(name, (self.rng.normal(size=(count, rows, columns)) * scale / np.sqrt(columns)).astype(np.float32))

    def vector(self, name, size, mean=1.0):
        """Norms and biases are always F32."""
        self.writer.add_tensor(name, (mean + 0.1 * self.rng.normal(size=size)).astype(np.float32))


def _add_keys(tiny, tokenizer, layout, hidden, width, layers, template, alignment):
    writer = tiny.writer
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name(f"tiny {tiny.kind}")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(layout.kv_heads)
    if layout.layer_norm:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // HEADS)
    for key, value in layout.keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{writer.arch}.{key}", value)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    writer.add_token_merges(tokenizer["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(tokenizer["template"])


def _add_attention(tiny, blk, layout, hidden):
    kv = hidden * layout.kv_heads // HEADS
    if layout.fused_qkv:
        tiny.matrix(f"{blk}.attn_qkv.weight", hidden + 2 * kv, hidden)
    else:
        tiny.matrix(f"{blk}.attn_q.weight", hidden, hidden)
        tiny.matrix(f"{blk}.attn_k.weight", kv, hidden)
        tiny.matrix(f"{blk}.attn_v.weight", kv, hidden)
    tiny.matrix(f"{blk}.attn_output.weight", hidden, hidden)
    if layout.qkv_bias:
        for name, size in (("q", hidden), ("k", kv), ("v", kv)):
            tiny.vector(f"{blk}.attn_{name}.bias", size, mean=0.0)
    if layout.qk_norms:
        head = hidden // HEADS
        tiny.vector(f"{blk}.attn_q_norm.weight", hidden if layout.qk_norms == "all" else head)
        tiny.vector(f"{blk}.attn_k_norm.weight", kv if layout.qk_norms == "all" else head)


def _add_mlp(tiny, blk, layout, hidden, width, biases):
    if layout.fused:
        tiny.matrix(f"{blk}.ffn_up.weight", 2 * width, hidden)
    else:
        tiny.matrix(f"{blk}.ffn_gate.weight", width, hidden, 1.5)
        tiny.matrix(f"{blk}.ffn_up.weight", width, hidden)
    tiny.matrix(f"{blk}.ffn_down.weight", hidden, width)
    for stem in biases:
        tiny.vector(f"{blk}.{stem}.bias", hidden if stem == "ffn_down" else width, mean=0.2)


def _add_experts(tiny, blk, hidden):
    tiny.writer.add_tensor(
        f"{blk}.ffn_gate_inp.weight", tiny.rng.normal(size=(EXPERTS, hidden)).astype(np.float32) / np.float32(8)
    )
    tiny.matrices(f"{blk}.ffn_gate_exps.weight", EXPERTS, EXPERT_ROWS, hidden, 1.5)
    tiny.matrices(f"{blk}.ffn_up_exps.weight", EXPERTS, EXPERT_ROWS, hidden)
    tiny.matrices(f"{blk}.ffn_down_exps.weight", EXPERTS, hidden, EXPERT_ROWS)


def write_tiny(
    path,
    tokenizer,
    kind="F32",
    hidden=64,
    width=96,
    layers=3,
    seed=0,
    template=True,
    alignment=None,
    family="llama",
    biases=(),
    kinds=(),
    split=0,
    small_first_shard=False,
    experts=False,
    rope_freqs=False,
    attention_biases=False,
    keys=(),
    decided=False,
):
    """A random model of a family; MLP and attention weights in ``kind``, K-quants through ggml.

    ``experts`` makes it a mixture. ``rope_freqs`` stretches the rotation of each pair of dimensions, as Llama 3.1 does;
    ``attention_biases`` gives q, k, v and the attention's output biases; ``keys`` are pairs of a key of the family,
    without its prefix, and an integer or a list of such.

    ``kinds`` gives single tensors another type, by their names.

    ``decided``: what it says next depends on the last token and is never a near tie, so that any runtime, arithmetic
    and processor gives the same answers; what its neurons do depends on all tokens, as ever.

    ``width`` is a number or a tuple with one for each layer; ``biases`` names projections that get one, such as
    ``ffn_gate``, whether or not llama.cpp loads them; ``split`` is how many tensors go into a file, the first of which
    is returned.
    """
    splits = {"split_max_tensors": split, "small_first_shard": small_first_shard} if split else {}
    tiny, layout = TinyWriter(path, family, kind, seed, kinds, **splits), (MIXTURES if experts else LAYOUTS)[family]
    if experts:
        width = EXPERT_ROWS
        tiny.writer.add_expert_count(EXPERTS)
        tiny.writer.add_expert_used_count(EXPERTS_USED)
    widths = width if isinstance(width, tuple) else (width,) * layers
    for key, value in keys:
        add = tiny.writer.add_array if isinstance(value, tuple) else tiny.writer.add_uint32
        add(f"{family}.{key}", value)
    _add_keys(tiny, tokenizer, layout, hidden, list(width) if widths is width else width, layers, template, alignment)

    def norm(name):
        tiny.vector(f"{name}.weight", hidden)
        if layout.norm_bias:
            tiny.vector(f"{name}.bias", hidden, mean=0.0)

    embedding = tiny.rng.normal(size=(VOCABULARY, hidden)).astype(np.float32) * np.float32(2.0 if decided else 0.25)
    tiny.writer.add_tensor("token_embd.weight", embedding)
    if rope_freqs:
        tiny.writer.add_tensor("rope_freqs.weight", np.geomspace(1, 8, hidden // HEADS // 2).astype(np.float32))
    for layer in range(layers):
        blk = f"blk.{layer}"
        first, *others = layout.norms
        norm(f"{blk}.{first}")
        _add_attention(tiny, blk, layout, hidden)
        if attention_biases:
            kv = hidden * layout.kv_heads // HEADS
            for name, size in (("q", hidden), ("k", kv), ("v", kv), ("output", hidden)):
                tiny.vector(f"{blk}.attn_{name}.bias", size, mean=0.2)
        if widths[layer]:
            for name in others:
                norm(f"{blk}.{name}")
            if experts:
                _add_experts(tiny, blk, hidden)
            else:
                _add_mlp(tiny, blk, layout, hidden, widths[layer], biases)
    norm("output_norm")
    if decided:  # a token's own embedding prevails in the stream, and asks for the token that follows it in one cycle
        tiny.writer.add_tensor("output.weight", np.roll(embedding, FOLLOWING, axis=0))
    elif layout.output:
        tiny.matrix("output.weight", VOCABULARY, hidden)
    tiny.writer.write_header_to_file()
    tiny.writer.write_kv_data_to_file()
    tiny.writer.write_tensors_to_file()
    tiny.writer.close()
    return next(Path(path).parent.glob(f"{Path(path).stem}-00001-of-*.gguf")) if split else Path(path)
