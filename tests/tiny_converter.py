"""A converter of tiny llama checkpoints with the command line of llama.cpp's: a script, run as a process of its own.

Norms as float32, matrices in --outtype; rows of q and k from halves to pairs, as ggml's rotary embedding wants them.
"""

import argparse
import json
import logging
from pathlib import Path

import gguf
import safetensors.torch

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "auto"])
args = parser.parse_args()
logging.basicConfig(level=logging.INFO)
logging.info("Loading model: %s", args.model.name)

config = json.loads((args.model / "config.json").read_text())
tokenizer = json.loads((args.model / "tokenizer.json").read_text())
weights = safetensors.torch.load_file(args.model / "model.safetensors")
kind = gguf.GGMLQuantizationType[args.outtype.upper()]
heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

writer = gguf.GGUFWriter(args.outfile, "llama")
writer.add_name("converted")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(10000.0)
writer.add_rope_dimension_count(config["hidden_size"] // heads)
writer.add_vocab_size(config["vocab_size"])

names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
names.update(special)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list([names[number] for number in range(config["vocab_size"])])
writer.add_token_types([3 if number in special else 1 for number in range(config["vocab_size"])])
merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
writer.add_token_merges(merges)
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_add_bos_token(False)
template = args.model / "chat_template.jinja"
if template.exists():
    writer.add_chat_template(template.read_text())


def paired(rows, count):
    size = rows.shape[0] // count
    return rows.reshape(count, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)


PLACES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
pairs = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")]
pairs += [
    (f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}")
    for layer in range(config["num_hidden_layers"])
    for theirs, ours in PLACES.items()
]
for theirs, ours in pairs:
    if f"{theirs}.weight" not in weights:
        continue
    values = weights[f"{theirs}.weight"].float().numpy()
    if ours.endswith(("attn_q", "attn_k")):
        values = paired(values, heads if ours.endswith("q") else kv_heads)
    logging.info("%s, %s", ours, values.shape)
    if values.ndim == 1:
        writer.add_tensor(f"{ours}.weight", values)
    else:
        writer.add_tensor(f"{ours}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
