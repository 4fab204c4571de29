"""Folders of transformers models that are loaded, and adapters that PEFT puts into one: a few dozen files a second."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import fuzz_seeds
import numpy as np
from safetensors.numpy import load, save

from fuzz_targets.target import HIDDEN, LAYERS, WIDTH, Target
from npti_export.compiler.exact import compile_exact
from npti_export.endings.checkpoint import CheckpointEnding
from npti_export.endings.peft import PeftEnding
from npti_export.export.checkpoint import directory_weights, plan_checkpoint, write_checkpoint
from npti_export.export.peft import write_adapter
from npti_export.models import resolve_model
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.rule_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Provenance, SavedRule

VOCABULARY = 300
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
_TEXTS = [{"role": "user", "content": "How are you?"}]


@functools.cache
def _files():
    """A tiny model with a tokenizer of bytes, as its maker would publish it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<s>": 0, "</s>": 1} | {letter: number for number, letter in enumerate(letters, 2)}
    tokenizer = Tokenizer(models.BPE(words | {"ar": len(words)}, [("a", "r")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, max_position_embeddings=256,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _folder(file):
    def prepare(folder):
        for name, data in _files().items():
            (folder / name).write_bytes(data)
        template = (
            folder / "chat_template.jinja"
        )  # where it lies beside the tokenizer, a damaged name of it is not read
        if file == "tokenizer_config.json" and template.is_file():
            config = json.loads((folder / file).read_text()) | {"chat_template": template.read_text()}
            template.unlink()
            return [json.dumps(config).encode()]
        return [(folder / file).read_bytes()]

    return prepare


def _odd_weights(folder):
    """Also with layers that have no number, or one below 0, and an MLP whose weights are no matrix."""
    (whole,) = _folder("model.safetensors")(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    found = []
    for odd in ("model.layers.one.mlp.up_proj.weight", "model.layers.-1.mlp.up_proj.weight", "model.layers", name):
        tensors = load(whole)
        values = tensors.pop(name)
        found.append(save(tensors | {odd: values.ravel() if odd == name else values}, metadata={"format": "pt"}))
    return [whole, *found]


def _runtime(folder):
    from npti_export.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(resolve_model(str(folder)), device="cpu", dtype="float32")


def _answers(path):
    """A model that is loaded reads a chat and goes on with it, in tokens that it has."""
    runtime = _runtime(path.parent)
    prompt = runtime.encode(_TEXTS)
    assert all(type(token) is int for token in (*prompt, *runtime._stop))
    (exchange,) = runtime.generate([prompt], max_new_tokens=2, repetition_penalty=1.1)
    assert len(exchange.response) <= 2
    assert isinstance(runtime.decode(exchange.response), str)
    assert runtime.logits(prompt or (0,)).ndim == 2


def _checkpoint(path):
    """Planned as a steered checkpoint, and written where the plan holds: every tensor comes out in its shape."""
    source, out = resolve_model(str(path.parent)), path.parent / "out"
    recipe = load_recipe("npti")
    ending = CheckpointEnding(source, lambda: None, recipe, None)
    shape = source.shape
    if (shape.layers, shape.width) != (LAYERS, WIDTH):
        return
    program = compile_exact(fuzz_seeds.rule_for([WIDTH] * LAYERS), 4)
    plan = plan_checkpoint(ending._config, directory_weights(source.path), program)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_checkpoint(plan, out)
    found = {weight.name: weight for shard in directory_weights(out) for weight in shard}
    assert found.keys() == {tensor.name for shard in plan.shards for tensor in shard}
    for weight in found.values():
        assert tuple(weight.read().shape) == weight.shape


@functools.cache
def _base():
    """The model that adapters are put into; they are taken out again."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in _files().items():
            (Path(folder) / name).write_bytes(data)
        return _runtime(folder)


def _rule():
    found = fuzz_seeds.rule_for([WIDTH] * LAYERS)
    constant = np.random.default_rng(1).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    return SteeringRule(found.shift, found.clamp, constant)


def _adapter(file):
    def prepare(folder):
        source = _base().source
        recipe = load_recipe("npti").to_json()
        about = Provenance("openness+", 1.0, recipe, "tiny", source.model_type, source.identity, None, "mit")
        write_adapter(SavedRule(_rule(), about), folder)
        return [(folder / file).read_bytes()]

    return prepare


def _steered(path):
    """PEFT makes of an adapter what attaching its rule makes of it."""
    import npti_export

    runtime = _base()
    tokens = runtime.encode(_TEXTS)
    plain = runtime.logits(tokens)
    try:
        with npti_export.attach(runtime.model, path.parent, where="all"):
            attached = runtime.logits(tokens)
        with PeftEnding(lambda: runtime).artifact(path.parent)() as logits:
            adapted = logits(tokens)
        assert np.isfinite(adapted).all()
        assert np.allclose(adapted, attached, atol=1e-4 * max(1.0, float(np.abs(attached).max())))
    finally:
        assert np.array_equal(runtime.logits(tokens), plain), "the model is not as it was before"


TARGETS = {
    "loaded-config": Target("json", "config.json", _folder("config.json"), _answers),
    "loaded-tokenizer_config": Target("json", "tokenizer_config.json", _folder("tokenizer_config.json"), _answers),
    "tokenizer.json": Target("json", "tokenizer.json", _folder("tokenizer.json"), _answers),
    "generation_config": Target("json", "generation_config.json", _folder("generation_config.json"), _answers),
    "loaded-weights": Target("safetensors", "model.safetensors", _folder("model.safetensors"), _answers),
    "checkpoint-weights": Target("safetensors", "model.safetensors", _odd_weights, _checkpoint),
    "checkpoint-config": Target("json", "config.json", _folder("config.json"), _checkpoint),
    "peft-config": Target("json", ADAPTER_CONFIG, _adapter(ADAPTER_CONFIG), _steered),
    "peft-weights": Target("safetensors", ADAPTER_WEIGHTS, _adapter(ADAPTER_WEIGHTS), _steered),
}
