"""Every transformers family in the table, as a tiny random model on disk: found, loaded, counted, steered."""

import numpy as np
import pytest
import torch
from conftest import random_rule
from families import VOCABULARY
from peft import PeftModel
from plain_rule import logits, plain_rule

import npti_export
from npti_export.architectures import ARCHITECTURES
from npti_export.export.peft import write_adapter
from npti_export.models import resolve_model
from npti_export.rule_io import Provenance, SavedRule
from npti_export.runtimes.base import chat
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered

FAMILIES = [model_type for row in ARCHITECTURES if not row.mixture for model_type in row.model_types]


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, tiny_runtime):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path)
    tiny_runtime.tokenizer.save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert (source.shape.layers, source.shape.width) == (3, 96)
    return TransformersRuntime(source, device="cpu", dtype="float32")


def gate_projection(mlp):
    """Its output begins with g, whether or not up is fused into it."""
    return mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else mlp.gate_proj


def test_counts_are_those_of_the_gate_projection(family):
    """a = silu(g) is positive where the gate projection's output g is: read there, independently."""
    prompts = [family.encode(chat("Be calm.", text)) for text in ("Hello", "What do you see over there?")]
    exchanges = family.generate(prompts, max_new_tokens=10, repetition_penalty=1.1)
    counts, tokens = np.zeros((3, 96), int), 0
    for exchange in exchanges:
        gates = []
        hooks = [
            gate_projection(layer.mlp).register_forward_hook(
                lambda _module, _inputs, out, seen=gates: seen.append(out[0, :, :96].detach().numpy())
            )
            for layer in family.layers
        ]
        family.logits(exchange.tokens)
        for hook in hooks:
            hook.remove()
        place = slice(len(exchange.prompt), len(exchange.tokens) - 1)
        counts += np.array([(gate[place] > 0).sum(0) for gate in gates])
        tokens += len(exchange.response) - 1
    stats = family.activation_stats(exchanges)
    assert stats.tokens == tokens > 5
    np.testing.assert_array_equal(stats.active, counts)


def test_the_rule_changes_the_output_and_lets_go(family):
    tokens = family.encode(chat(None, "Hello"))
    before = family.logits(tokens)
    with steered(family.activations, random_rule(3, 96)):
        during = family.logits(tokens)
    assert np.abs(during - before).max() > 0.01
    np.testing.assert_array_equal(family.logits(tokens), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_the_rule(family, tmp_path, dtype):
    """Found by the table, loaded by PEFT, bitwise what the rule written into the MLP gives."""
    source, rule = family.source, random_rule(3, 96)
    about = Provenance("calm", 1.0, "{}", "tiny", source.model_type, source.identity, str(source.path))
    write_adapter(SavedRule(rule, about), tmp_path)
    model = family.model.to(dtype)
    ids = torch.arange(5, 25)[None]
    base = logits(model, ids)
    with plain_rule(model, rule):
        want = logits(model, ids)
    with npti_export.attach(model, tmp_path):
        assert torch.equal(logits(model, ids), want)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(adapted, ids), want)
    assert not torch.equal(base, want)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids), base)
