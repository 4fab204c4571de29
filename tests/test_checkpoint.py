"""Steered checkpoints: written, loaded by stock transformers, compared with the rule; and merged in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tolerances
import torch
from conftest import random_rule
from families import VOCABULARY
from peft import LoraConfig, PeftModel, get_peft_model
from plain_rule import logits, plain_rule
from reference import ReferenceLlama, kl
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import npti_export
from npti_export.compiler.exact import compile_exact
from npti_export.errors import AdapterError, ArchitectureError, ModelError
from npti_export.export.as_llama import check_expressible
from npti_export.export.checkpoint import (
    copy_beside,
    directory_weights,
    model_weights,
    plan_checkpoint,
    write_checkpoint,
)
from npti_export.export.peft import write_adapter
from npti_export.models import resolve_model
from npti_export.rule_io import Provenance, SavedRule

IDS = torch.arange(5, 45).reshape(2, 20)
FAMILIES = {
    "llama": {},
    "llama rope3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 128,
    },
    "llama tied": {"tie_word_embeddings": True},
    "llama attention_bias": {"attention_bias": True},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2 tied": {"tie_word_embeddings": True},
}


def make_family(name, directory, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name.split()[0],
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
            **FAMILIES.get(name, {}),
            **more,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        if "norm" in key:
            torch.nn.init.normal_(parameter, 1, 0.1)
    model.save_pretrained(directory, max_shard_size="200KB")
    return model


def write(directory, rule, out):
    config = AutoConfig.from_pretrained(directory)
    check_expressible(config, str(directory))
    plan = plan_checkpoint(config, directory_weights(directory), compile_exact(rule, 4))
    out.mkdir()
    write_checkpoint(plan, out)
    copy_beside(directory, out)
    return plan


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_transformers_loads_it_and_it_is_the_rule(name, tmp_path):
    model, rule = make_family(name, tmp_path / "base"), random_rule(3, 96)
    base = logits(model, IDS)
    with plain_rule(model, rule):
        want = logits(model, IDS)
    write(tmp_path / "base", rule, tmp_path / "out")
    steered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(steered) is LlamaForCausalLM
    assert steered.dtype == torch.float32
    got = logits(steered, IDS)
    close, far = (kl(want.flatten(0, 1), one.flatten(0, 1)) for one in (got, base))
    assert close < tolerances.KL_TINY_FLOAT
    assert far > 100 * close


def test_against_float64(tiny, tiny_checkpoint, tmp_path):
    rule = random_rule(3, 96)
    write(tiny_checkpoint, rule, tmp_path / "out")
    steered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference, tokens = ReferenceLlama(tiny), IDS[0].tolist()
    want = reference.logits(tokens, rule.shift, rule.clamp)
    got = logits(steered, IDS[:1])[0]
    assert kl(want, got) < tolerances.KL_TINY_FLOAT
    assert kl(want, reference.logits(tokens)) > 100 * kl(want, got)


def test_a_shift_alone_is_exact(tiny_checkpoint, tmp_path):
    rule = random_rule(3, 96)
    rule.clamp[:] = False
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with plain_rule(model, rule):
        want = logits(model, IDS)
    write(tiny_checkpoint, rule, tmp_path / "out")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS)
    assert (got - want).abs().max() < tolerances.LOGITS_FLOAT32


def test_without_our_package(tiny_checkpoint, tmp_path):
    """A process that never imports us gives the same logits."""
    rule = random_rule(3, 96)
    write(tiny_checkpoint, rule, tmp_path / "out")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS)
    program = (
        "import sys, torch, numpy; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}).eval();"
        f"ids = torch.arange(5, 45).reshape(2, 20); torch.set_grad_enabled(False);"
        f"numpy.save({str(tmp_path / 'x.npy')!r}, m(ids).logits.numpy()); assert 'npti_export' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), got.numpy(), atol=tolerances.ADAPTER_FLOAT32)


def test_what_is_on_disk(tmp_path):
    """Shards as they were, an index, biases of all three projections, old bytes unchanged, fields for older readers."""
    make_family("qwen2", tmp_path / "base", dtype=torch.bfloat16)
    plan = write(tmp_path / "base", random_rule(3, 96), tmp_path / "out")
    extra = plan.program.layers[0].units
    assert extra % 256 == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) == len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    old = {}
    for path in (tmp_path / "base").glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            old |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as stored:
            tensor = stored.get_tensor(name)
        total += tensor.nbytes
        if name in old:
            rows = tuple(slice(size) for size in old[name].shape)
            assert torch.equal(tensor[rows], old[name]), name
        else:
            assert name.endswith(("proj.bias",))
            if "gate" not in name:
                assert not tensor.any(), name
    assert index["metadata"]["total_size"] == total
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 96 + extra)
    assert config["mlp_bias"] is config["attention_bias"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_sixteen_bits(tmp_path):
    """Everything stays in the model's own dtype; biases are rounded with the rest."""
    model = make_family("llama", tmp_path / "base", dtype=torch.bfloat16).float()
    rule = random_rule(3, 96)
    base = logits(model, IDS)
    with plain_rule(model, rule):
        want = logits(model, IDS)
    write(tmp_path / "base", rule, tmp_path / "out")
    steered = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert steered.dtype == torch.bfloat16
    got = logits(steered.float(), IDS)
    close, far = (kl(want.flatten(0, 1), one.flatten(0, 1)) for one in (got, base))
    assert close < tolerances.KL_TINY_BFLOAT16
    assert far > 100 * close


def test_from_a_model_in_memory(tiny_runtime, tmp_path):
    """As for a GGUF, whose weights transformers has dequantised; also cast to 16 bits."""
    rule = random_rule(3, 96)
    with plain_rule(tiny_runtime.model, rule):
        want = logits(tiny_runtime.model, IDS)
    for dtype, limit in ((None, tolerances.KL_TINY_FLOAT), ("float16", tolerances.KL_TINY_FLOAT)):
        out = tmp_path / str(dtype)
        out.mkdir()
        weights = model_weights(tiny_runtime.model, dtype)
        config = tiny_runtime.model.config
        write_checkpoint(plan_checkpoint(config, weights, compile_exact(rule, 4)), out)
        steered = AutoModelForCausalLM.from_pretrained(out)
        assert steered.dtype == (torch.float16 if dtype else torch.float32)
        assert kl(want.flatten(0, 1), logits(steered.float(), IDS).flatten(0, 1)) < limit


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("qwen3", {}, "of qwen3 cannot be written, .* it works for llama, mistral, qwen2, and --format peft"),
        ("gemma2", {"head_dim": 16}, "of gemma2 cannot be written"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("llama", {"mlp_bias": True}, "MLP biases of its own"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
    ],
)
def test_refused_by_configuration_alone(name, more, message):
    config = AutoConfig.for_model(name, **more)
    with pytest.raises(ArchitectureError, match=message):
        check_expressible(config, "model")


def test_damaged_weights(tiny_checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    program = compile_exact(random_rule(3, 96), 4)
    weights = directory_weights(tiny_checkpoint)
    with pytest.raises(ModelError, match=r"tensor \S+ is in none of the model's files"):
        plan_checkpoint(config, [shard[1:] for shard in weights], program)
    config.hidden_size = 32
    with pytest.raises(ModelError, match="the configuration says"):
        plan_checkpoint(config, weights, program)


def provenance_of(directory):
    source = resolve_model(str(directory))
    return Provenance("calm", 1.0, "{}", "tiny", source.model_type, source.identity, str(directory))


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload_survives_saving(name, dtype, tmp_path):
    make_family(name, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    base = logits(model, IDS).float()
    (tmp_path / "adapter").mkdir()
    write_adapter(SavedRule(random_rule(3, 96), provenance_of(tmp_path / "base")), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    adapted.set_strength(0.8)
    want = logits(adapted, IDS).float()
    merged = adapted.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    got = logits(merged, IDS).float()
    close, far = (kl(want.flatten(0, 1), one.flatten(0, 1)) for one in (got, base))
    assert close < (tolerances.KL_TINY_FLOAT if dtype == torch.float32 else tolerances.KL_TINY_BFLOAT16)
    assert far > 20 * close
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(again, IDS).float(), got)
    tokens = merged.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), tokens)


def test_merging_several(tiny_checkpoint, make_adapter):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    adapted = PeftModel.from_pretrained(model, make_adapter(random_rule(3, 96, seed=0)), adapter_name="a")
    adapted.load_adapter(make_adapter(random_rule(3, 96, seed=1)), adapter_name="b")
    adapted.base_model.set_adapter(["a", "b"])
    want = logits(adapted, IDS)
    merged = adapted.merge_and_unload(adapter_names=["a", "b"])
    assert kl(want.flatten(0, 1), logits(merged, IDS).flatten(0, 1)) < tolerances.KL_TINY_FLOAT


def test_what_cannot_be_merged(tiny_checkpoint, make_adapter, provenance, tmp_path):
    load = lambda: AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()  # noqa: E731
    directory = make_adapter(random_rule(3, 96))
    adapted = PeftModel.from_pretrained(load(), directory)
    npti_export.set_strength(adapted, 0)
    with pytest.raises(AdapterError, match="nothing to merge"):
        adapted.merge_and_unload()
    write_adapter(SavedRule(random_rule(3, 96), provenance, "response"), tmp_path)
    with pytest.raises(AdapterError, match="response only cannot be merged"):
        PeftModel.from_pretrained(load(), tmp_path).merge_and_unload()
    lora = get_peft_model(load(), LoraConfig(r=2, target_modules=["gate_proj"])).get_base_model()
    with pytest.raises(AdapterError, match="holds an adapter of another kind"):
        PeftModel.from_pretrained(lora, directory, adapter_name="calm").merge_and_unload()
    make_family("qwen3", tmp_path / "qwen3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    (tmp_path / "adapter").mkdir()
    write_adapter(SavedRule(random_rule(3, 96), provenance_of(tmp_path / "qwen3")), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    want = logits(adapted, IDS)
    with pytest.raises(ArchitectureError, match="qwen3 cannot be written"):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted, IDS), want)  # it still steers
