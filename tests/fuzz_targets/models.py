"""Folders of transformers models, and chat templates."""

import json

import numpy as np
from safetensors.numpy import save

from fuzz_targets.target import HIDDEN, LAYERS, WIDTH, Target, plain
from npti_export.chat_template import check_template
from npti_export.export.convert import find_converter, plan_conversion
from npti_export.models import model_type_ahead, resolve_model


def _model(path):
    ahead = model_type_ahead(str(path.parent))
    source = resolve_model(str(path.parent))
    assert source.model_type == ahead
    assert 1 <= source.shape.layers <= LAYERS  # files may hold more than a configuration uses
    assert source.shape.hidden == HIDDEN
    assert source.shape.width > 0
    plan_conversion(source, ("convert_hf_to_gguf.py",), trust_remote_code=False)


def _model_folder(file):
    def prepare(folder):
        config = {
            "model_type": "llama",
            "num_hidden_layers": LAYERS,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "hidden_act": "silu",
            "num_attention_heads": 4,
            "vocab_size": 40,
        }
        rng = np.random.default_rng(0)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {
            f"model.layers.{layer}.{norm}.weight": rng.normal(size=HIDDEN).astype(np.float32)
            for layer in range(LAYERS)
            for norm in norms
        }
        tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((40, HIDDEN), np.float32)
        weights = "model-00001-of-00001.safetensors"
        contents = {
            "config.json": json.dumps(config, indent=1).encode(),
            "tokenizer_config.json": b'{"chat_template": "{{ messages[0].content }}", "bos_token": "<s>"}',
            "README.md": b"---\nlicense: mit\n---\n# A model\n",
            weights: save(tensors),
            "model.safetensors.index.json": json.dumps({"weight_map": dict.fromkeys(tensors, weights)}).encode(),
        }
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        return [contents[file]]

    return prepare


def _template(path):
    check_template(path.read_bytes().decode("utf-8", "replace"), str(path))


def _converter(path):
    """A script that is run as a program of its own, or by this Python."""
    command = find_converter(path)
    assert command[-1] == str(path.absolute())


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_SCRIPT = "#!/usr/bin/env python3\nfrom __future__ import annotations\nimport argparse\n"

TARGETS = {
    "config.json": Target("json", "config.json", _model_folder("config.json"), _model),
    "tokenizer_config": Target("json", "tokenizer_config.json", _model_folder("tokenizer_config.json"), _model),
    "weight-index": Target(
        "json", "model.safetensors.index.json", _model_folder("model.safetensors.index.json"), _model
    ),
    "weights": Target(
        "safetensors", "model-00001-of-00001.safetensors", _model_folder("model-00001-of-00001.safetensors"), _model
    ),
    "converter": Target("text", "c.py", plain(_SCRIPT, f"{_SCRIPT}from conversion import main\n"), _converter),
    "model-card": Target("text", "README.md", _model_folder("README.md"), _model),
    "chat-template": Target("text", "t.jinja", plain(CHATML), _template),
}
