"""A llama forward pass in float64 numpy, written from the architecture's definition, with the induction rule in place.

Also of llama's relatives: qwen2 (biases of q, k, v; rotary pairs half a head apart), granite and minicpm (scales), deci
(a width for each layer, 0 for none), MLPs with biases, and experts.

It shares no code with the package and reads weights with gguf-py (but see :func:`open_gguf`), so that runtimes,
compiler and writer are all measured against something independent.
"""

from types import SimpleNamespace

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from npti_export.gguf.reader import read_gguf

Q2_0 = 42  # ggml.h; gguf-py 0.19 has no such member


def open_gguf(path):
    """gguf-py's reader, or where it does not know the types (Q2_0), its view of ours, which is tested against it."""
    try:
        return GGUFReader(path)
    except ValueError:
        header = read_gguf(path)
        data = np.memmap(path, np.uint8, "r")
        rows = lambda one: data[one.offset : one.offset + one.nbytes].reshape(one.rows, -1)  # noqa: E731
        kind = lambda one: Q2_0 if one.type_id == Q2_0 else GGMLQuantizationType(one.type_id)  # noqa: E731
        return SimpleNamespace(
            fields={one.key: SimpleNamespace(contents=lambda value=one.value: value) for one in header.keys},
            tensors=[
                SimpleNamespace(
                    name=one.name,
                    shape=one.shape,
                    tensor_type=kind(one),
                    data=rows(one).view(np.float32).reshape(one.shape[::-1]) if one.type_id == 0 else rows(one),
                )
                for one in header.tensors
            ],
        )


def plain_dequantize(rows, kind):
    """What gguf-py says, and for types it lacks what ggml-common.h says: an f16 scale, then codes of few bits."""
    if kind == Q2_0:  # blocks of 64: two bits each, lowest first, standing for -1, 0, 1, 2
        blocks = rows.reshape(len(rows), -1, 18)
        codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.float32) - 1
    elif kind == GGMLQuantizationType.Q1_0:  # blocks of 128: one bit each, lowest first, standing for -1, 1
        blocks = rows.reshape(len(rows), -1, 18)
        codes = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    else:
        return dequantize(rows, kind)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    return (codes.reshape(*scales.shape[:2], -1) * scales).reshape(len(rows), -1)


class ReferenceLlama:
    def __init__(self, path):
        reader = open_gguf(path)
        self.tensors = {
            tensor.name: plain_dequantize(tensor.data, tensor.tensor_type)
            .astype(np.float64)
            .reshape([int(one) for one in tensor.shape[::-1]])
            for tensor in reader.tensors
        }
        family = reader.fields["general.architecture"].contents()

        def get(key, *default):
            field = reader.fields.get(f"{family}.{key}")
            return default[0] if field is None and default else field.contents()

        self.halves = family == "qwen2"
        self.residual, self.embedding = get("residual_scale", 1.0), get("embedding_scale", 1.0)
        self.logit = get("logit_scale", 1.0)
        self.layers, self.heads, self.kv_heads = (
            get("block_count"),
            get("attention.head_count"),
            get("attention.head_count_kv"),
        )
        self.used = get("expert_used_count", 0)
        self.eps, self.base = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base")

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.tensors[name]

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def rope(self, x):
        """GGUF llama weights are stored for adjacent pairs (x[2j], x[2j+1]), qwen2's for (x[j], x[j + size/2])."""
        length, _, size = x.shape
        angle = np.arange(length)[:, None] * self.base ** (-np.arange(0, size, 2) / size)[None]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = (
            (slice(size // 2), slice(size // 2, size)) if self.halves else (slice(0, size, 2), slice(1, size, 2))
        )
        even, odd = x[..., first], x[..., second]
        out = np.empty_like(x)
        out[..., first], out[..., second] = even * cos - odd * sin, even * sin + odd * cos
        return out

    def attention(self, x, layer):
        length, blk = len(x), f"blk.{layer}"
        q = self.rope(self.linear(x, f"{blk}.attn_q").reshape(length, self.heads, -1))
        k = self.rope(self.linear(x, f"{blk}.attn_k").reshape(length, self.kv_heads, -1))
        v = self.linear(x, f"{blk}.attn_v").reshape(length, self.kv_heads, -1)
        group = self.heads // self.kv_heads
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores += np.triu(np.full((length, length), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return self.linear(np.einsum("hqk,khd->qhd", scores, v).reshape(length, -1), f"{blk}.attn_output")

    def experts(self, x, layer, shift, clamp):
        """One token and one expert after the other; shift and clamp are [experts, neurons]."""
        blk, y = f"blk.{layer}", np.zeros_like(x)
        gate_rows, up_rows = (self.tensors[f"{blk}.ffn_{name}_exps.weight"] for name in ("gate", "up"))
        for token, routed in enumerate(x @ self.tensors[f"{blk}.ffn_gate_inp.weight"].T):
            chosen = np.argsort(-routed)[: self.used]
            weights = np.exp(routed[chosen] - routed.max())
            for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
                gate = gate_rows[expert] @ x[token]
                a = gate * 0.5 * (1 + np.tanh(gate / 2))
                a = np.where(clamp[expert], np.minimum(a, 0), a) + shift[expert]
                down = self.tensors[f"{blk}.ffn_down_exps.weight"][expert]
                y[token] += weight * (down @ (a * (up_rows[expert] @ x[token])))
        return y

    def mlp(self, x, layer, shift, clamp, seen):
        blk = f"blk.{layer}"
        if self.used:
            sizes = self.tensors[f"{blk}.ffn_gate_exps.weight"].shape[:2]
            return self.experts(x, layer, shift.reshape(sizes), clamp.reshape(sizes))
        gate = self.linear(x, f"{blk}.ffn_gate")
        width = gate.shape[1]
        a = gate * 0.5 * (1 + np.tanh(gate / 2))  # silu, without overflow
        if seen is not None:
            seen.append(a.copy())
        for neuron in np.flatnonzero(clamp):
            a[:, neuron] = np.minimum(a[:, neuron], 0)
        a = a + shift[:width]
        return self.linear(a * self.linear(x, f"{blk}.ffn_up"), f"{blk}.ffn_down")

    def logits(self, tokens, shift=None, clamp=None, seen=None, behind=None):
        """[tokens, vocabulary]; ``seen`` collects the activations a of each layer, [tokens, width], ``behind`` the
        residual stream behind it, [tokens, hidden]."""
        x = self.tensors["token_embd.weight"][list(tokens)] * self.embedding
        gates = ("ffn_gate.weight", "ffn_gate_exps.weight")
        width = max(one[..., 0].size for name, one in self.tensors.items() if name.endswith(gates))
        nothing = np.zeros((self.layers, width))
        shift = nothing if shift is None else shift
        clamp = nothing if clamp is None else clamp
        for layer in range(self.layers):
            if f"blk.{layer}.ffn_norm.weight" not in self.tensors:
                continue  # deci: llama.cpp leaves out the whole layer
            x = x + self.residual * self.attention(self.norm(x, f"blk.{layer}.attn_norm.weight"), layer)
            normed = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            x = x + self.residual * self.mlp(normed, layer, shift[layer], clamp[layer], seen)
            if behind is not None:
                behind.append(x)
        return self.norm(x, "output_norm.weight") @ self.tensors["token_embd.weight"].T / self.logit


def kl(p_logits, q_logits):
    """Mean KL(p || q) over rows, the plainest way."""
    total = 0.0
    for p_row, q_row in zip(np.asarray(p_logits, float), np.asarray(q_logits, float), strict=True):
        p = np.exp(p_row - p_row.max())
        q = np.exp(q_row - q_row.max())
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    return total / len(p_logits)
