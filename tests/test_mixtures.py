"""Mixtures of experts in transformers: whose neurons are counted and steered, against one token after the other."""

import copy
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import random_rule
from families import VOCABULARY
from jobs import main_job, npti
from peft import PeftModel
from plain_rule import logits
from tolerances import ADAPTER_FLOAT32
from transformers import AutoModelForCausalLM

import npti_export
from npti_export.architectures import ARCHITECTURES
from npti_export.errors import AdapterError, ArchitectureError, ModelError
from npti_export.export.peft import write_adapter
from npti_export.models import resolve_model
from npti_export.rule_io import Provenance, SavedRule
from npti_export.runtimes.base import chat
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered

FAMILIES = [model_type for row in ARCHITECTURES if row.mixture for model_type in row.model_types]
LAYERS, EXPERTS, ROWS, USED = 3, 6, 32, 2
WIDTH = EXPERTS * ROWS
RULE = random_rule(LAYERS, WIDTH, per_layer=(40, 60))
IDS = torch.arange(5, 25)[None]


def save_tiny(path, model_type, tokenizer, **more):
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=ROWS,
        moe_intermediate_size=ROWS,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=USED,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, tiny_runtime):
    save_tiny(tmp_path / "model", request.param, tiny_runtime.tokenizer)
    source = resolve_model(str(tmp_path / "model"))
    assert (source.shape.layers, source.shape.width, source.shape.experts) == (LAYERS, WIDTH, EXPERTS)
    assert str(source.shape) == "3 layers of 6 experts of 32 neurons"
    return TransformersRuntime(source, device="cpu", dtype="float32")


def one_by_one(mlp, x, shift, clamp, rows):
    """The block of experts for each token by itself; only the router is the model's own."""
    experts, flat = mlp.experts, x.reshape(-1, x.shape[-1])
    _, weights, chosen = mlp.gate(flat)
    out = torch.zeros_like(flat)
    for token, (experts_of_token, weights_of_token) in enumerate(zip(chosen.tolist(), weights, strict=True)):
        for expert, weight in zip(experts_of_token, weights_of_token, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ flat[token]).split(ROWS)
            a = gate * torch.sigmoid(gate)
            if rows[token]:
                place = slice(expert * ROWS, (expert + 1) * ROWS)
                a = torch.where(torch.from_numpy(clamp[place]), a.clamp(max=0), a) + torch.from_numpy(shift[place])
            out[token] += weight * (experts.down_proj[expert] @ (a * up))
    return out.reshape(x.shape)


@contextmanager
def plain_rule(model, rule, rows):
    blocks = [layer.mlp for layer in model.model.layers]
    for index, mlp in enumerate(blocks):
        mlp.forward = lambda x, mlp=mlp, i=index: one_by_one(mlp, x, rule.shift[i], rule.clamp[i], rows)
    try:
        yield
    finally:
        for mlp in blocks:
            del mlp.forward


def wanted(model, rows=None, rule=RULE):
    with plain_rule(model, rule, [True] * IDS.numel() if rows is None else rows):
        return logits(model, IDS)


@pytest.fixture
def adapter(family, tmp_path):
    source = family.source
    about = Provenance("calm", 1.0, "{}", "tiny", source.model_type, source.identity, str(source.path))
    (tmp_path / "adapter").mkdir()
    write_adapter(SavedRule(RULE, about), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_counts_are_those_of_the_tokens_that_an_expert_gets(family):
    prompts = [family.encode(chat("Be calm.", text)) for text in ("Hello", "What do you see over there?")]
    exchanges = family.generate(prompts, max_new_tokens=10, repetition_penalty=1.1)
    active, routed = np.zeros((LAYERS, WIDTH), int), np.zeros((LAYERS, EXPERTS), int)
    values = [[[] for _ in range(WIDTH)] for _ in range(LAYERS)]
    for exchange in exchanges:
        inputs = []

        def keep(_module, x, _output, inputs=inputs):
            inputs.append(x[0][0].clone())

        hooks = [layer.mlp.register_forward_hook(keep) for layer in family.layers]
        family.logits(exchange.tokens)
        for hook in hooks:
            hook.remove()
        for layer, x in enumerate(inputs):
            mlp = family.layers[layer].mlp
            with torch.inference_mode():
                chosen = mlp.gate(x)[2]
            for token in range(len(exchange.prompt), len(exchange.tokens) - 1):
                for expert in chosen[token].tolist():
                    gate = mlp.experts.gate_up_proj[expert, :ROWS].detach().numpy() @ x[token].numpy()
                    routed[layer, expert] += 1
                    active[layer, expert * ROWS : (expert + 1) * ROWS] += gate > 0
                    for row, g in enumerate(gate.tolist()):
                        values[layer][expert * ROWS + row].append(g / (1 + np.exp(-g)))
    stats = family.activation_stats(exchanges)
    assert stats.tokens == sum(len(exchange.response) - 1 for exchange in exchanges) > 5
    np.testing.assert_array_equal(stats.routed, routed)
    np.testing.assert_array_equal(stats.active, active)
    assert stats.routed.sum() == LAYERS * USED * stats.tokens
    np.testing.assert_allclose(stats.probability(), active / stats.tokens)
    # the quantile is one of the values that were computed, not of zeros for tokens that went elsewhere
    found = stats.quantile(0.95)
    for layer in range(LAYERS):
        for neuron, seen in enumerate(values[layer]):
            largest = max([0.0, *seen])
            assert 0 <= found[layer, neuron] <= largest * 1.01 + 1e-6
            if seen and len(seen) <= 10:
                assert found[layer, neuron] == pytest.approx(largest, rel=0.08, abs=0.01)


def test_answers_are_counted_apart(family):
    prompts = [family.encode(chat("Be calm.", text)) for text in ("Hello", "What do you see over there?", "Why?")]
    (first, second), answers = family.observe(prompts, [0, 1, 1], max_new_tokens=6, repetition_penalty=1.1)
    np.testing.assert_array_equal(answers.active[0], first.active)
    np.testing.assert_array_equal(answers.active[1:].sum(0), second.active)
    assert (first + second).routed.sum() == LAYERS * USED * answers.tokens.sum()


def test_bfloat16_counts_nearly_the_same(family):
    prompts = [family.encode(chat(None, text)) for text in ("Hello", "What do you see over there?")]
    exchanges = family.generate(prompts, max_new_tokens=10, repetition_penalty=1.1)
    exact = family.activation_stats(exchanges)
    other = family.converted("bfloat16").activation_stats(exchanges)
    assert other.routed.sum() == exact.routed.sum()
    # the first layer only: from then on a token near the edge of two experts goes to the other one
    assert np.abs(other.routed[0] - exact.routed[0]).sum() <= 2
    assert np.abs(other.active[0] - exact.active[0]).mean() < 0.1 * exact.active[0].mean()


def test_the_rule_against_one_token_at_a_time(family):
    model, tokens = family.model, IDS[0].tolist()
    base, want = family.logits(tokens), wanted(model).numpy()[0]
    with steered(family.activations, RULE):
        np.testing.assert_allclose(family.logits(tokens), want, atol=10 * ADAPTER_FLOAT32)
    assert np.abs(want - base).max() > 0.05
    np.testing.assert_array_equal(family.logits(tokens), base)


def test_attached_and_adapted(family, adapter):
    fresh = AutoModelForCausalLM.from_pretrained(family.source.path)
    base, want = logits(fresh, IDS), wanted(fresh)
    halved = wanted(fresh, rule=type(RULE)(RULE.shift / 2, RULE.clamp))
    with npti_export.attach(fresh, adapter) as attached:
        torch.testing.assert_close(logits(fresh, IDS), want, atol=10 * ADAPTER_FLOAT32, rtol=0)
        attached.strength = 0.5
        torch.testing.assert_close(logits(fresh, IDS), halved, atol=10 * ADAPTER_FLOAT32, rtol=0)
        attached.strength = 0
        assert torch.equal(logits(fresh, IDS), base)
    assert all("forward" not in vars(layer.mlp.experts) for layer in fresh.model.layers)
    assert (want - base).abs().max() > 0.05
    adapted = PeftModel.from_pretrained(fresh, adapter)
    torch.testing.assert_close(logits(adapted, IDS), want, atol=10 * ADAPTER_FLOAT32, rtol=0)
    torch.testing.assert_close(logits(copy.deepcopy(adapted), IDS), want, atol=10 * ADAPTER_FLOAT32, rtol=0)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, IDS), base)
    plain = adapted.unload()
    assert torch.equal(logits(plain, IDS), base)
    assert all("forward" not in vars(layer.mlp.experts) for layer in plain.model.layers)


def test_two_attachments_add_up(family, adapter):
    with npti_export.attach(family.model, adapter), npti_export.attach(family.model, adapter, strength=0.5):
        found = logits(family.model, IDS)
    want = wanted(family.model, rule=type(RULE)(1.5 * RULE.shift, RULE.clamp))
    torch.testing.assert_close(found, want, atol=20 * ADAPTER_FLOAT32, rtol=0)


def test_the_response_only(family, adapter):
    response = torch.zeros_like(IDS, dtype=torch.bool)
    response[:, 12:] = True
    want, base = wanted(family.model, response[0].tolist()), logits(family.model, IDS)
    with npti_export.attach(family.model, adapter, where="response"), npti_export.response_mask(family.model, response):
        found = logits(family.model, IDS)
    torch.testing.assert_close(found, want, atol=10 * ADAPTER_FLOAT32, rtol=0)
    assert (want - base)[:, 12:].abs().max() > 0.05


def test_experts_that_are_computed_in_another_order_are_not_steered(family, adapter):
    experts = family.layers[1].mlp.experts
    with npti_export.attach(family.model, adapter):
        act = experts.act_fn
        with pytest.raises(AdapterError, match="in an order that is not known here"):
            experts.act_fn(torch.zeros(3, ROWS))  # a call from outside the pass
        assert experts.act_fn is act


def test_a_job_makes_an_adapter_and_refuses_what_cannot_be(tiny_runtime, tmp_path, cli_environment):
    save_tiny(tmp_path / "model", "qwen3_moe", tiny_runtime.tokenizer)
    done = npti(
        *main_job("model", "a", "--format", "peft", "--report", "r.json"), environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["neurons"]["width"] == WIDTH
    assert report["fidelity"]["kl_rule_artifact"] < 1e-6 < report["fidelity"]["kl_rule_base"]
    for kind in ("gguf", "checkpoint"):
        done = npti(*main_job("model", "b", "--format", kind), environment=cli_environment, cwd=tmp_path)
        assert (done.returncode, (tmp_path / "b").exists()) == (2, False)
        assert "--format peft" in done.stderr


@pytest.mark.parametrize("more", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str)
def test_layers_of_both_kinds_are_refused(tiny_runtime, tmp_path, more, make_adapter):
    save_tiny(tmp_path / "model", "qwen3_moe", tiny_runtime.tokenizer, **more)
    with pytest.raises((ArchitectureError, ModelError), match="only some of its layers have experts"):
        resolve_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(AdapterError, match=r"3 layers, of which \d have experts"):
        npti_export.attach(model, make_adapter(random_rule(3, 96)), any_model=True)
