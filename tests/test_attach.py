"""Attaching without PEFT, from every artifact that holds a rule."""

import dataclasses
import gc
import subprocess
import sys

import numpy as np
import pytest
import tolerances
import torch
from conftest import random_rule
from peft import PeftModel
from plain_rule import logits, plain_rule
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import npti_export
from npti_export.errors import AdapterError, ArchitectureError
from npti_export.export.peft import write_adapter
from npti_export.rule import SteeringRule, compose
from npti_export.rule_io import SavedRule, decode_rule, encode_rule, load_rule, save_checkpoint_rule
from npti_export.steer import LayerSteering, Share

IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="session")
def rules():
    return random_rule(3, 96, seed=0), random_rule(3, 96, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attached_it_is_the_rule_and_detached_the_base(tiny_checkpoint, make_adapter, rules, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype).eval()
    base = logits(model, IDS)
    with plain_rule(model, rules[0]):
        want = logits(model, IDS)
    with npti_export.attach(model, make_adapter(rules[0])) as attached:
        assert torch.equal(logits(model, IDS), want)
        attached.strength = 0
        assert torch.equal(logits(model, IDS), base)
        attached.strength = 1
        assert torch.equal(logits(model, IDS), want)
    assert torch.equal(logits(model, IDS), base)
    assert not torch.equal(base, want)
    assert all(type(layer.mlp.act_fn).__module__.startswith(("torch", "transformers")) for layer in model.model.layers)


def test_several_compose_in_any_order_and_leave_in_any(model, make_adapter, rules):
    base = logits(model, IDS)
    with plain_rule(model, compose(rules)):
        want = logits(model, IDS)
    with plain_rule(model, rules[1]):
        second_alone = logits(model, IDS)
    first = npti_export.attach(model, make_adapter(rules[0]))
    second = npti_export.attach(model, make_adapter(rules[1]))
    assert (logits(model, IDS) - want).abs().max() < tolerances.ADAPTER_FLOAT32
    first.detach()
    assert torch.equal(logits(model, IDS), second_alone)
    second.detach()
    assert torch.equal(logits(model, IDS), base)
    assert (want - second_alone).abs().max() > 0.01


def test_attachments_that_nobody_holds_stay(model, make_adapter, rules):
    directories = [make_adapter(rule) for rule in rules]
    with plain_rule(model, compose(rules)):
        want = logits(model, IDS)
    for directory in directories:
        npti_export.attach(model, directory)
        gc.collect()
    assert (logits(model, IDS) - want).abs().max() < tolerances.ADAPTER_FLOAT32


def test_a_compiled_model_notices(model, make_adapter, rules):
    base = logits(model, IDS)
    with plain_rule(model, rules[0]):
        want = logits(model, IDS)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(logits(model, IDS), base)
    for _ in range(2):
        with npti_export.attach(model, make_adapter(rules[0])) as attached:
            assert (logits(model, IDS) - want).abs().max() < tolerances.ADAPTER_FLOAT32
            attached.strength = 0
            assert torch.equal(logits(model, IDS), base)
        assert torch.equal(logits(model, IDS), base)
    torch.compiler.reset()


def test_half_strength(model, make_adapter, rules):
    with plain_rule(model, SteeringRule(rules[0].shift * np.float32(0.5), rules[0].clamp)):
        want = logits(model, IDS)
    with npti_export.attach(model, make_adapter(rules[0]), 0.5):
        assert torch.equal(logits(model, IDS), want)


def test_from_an_adapter_saved_with_a_strength(model, make_adapter, rules, tmp_path):
    """The file says 0.5: that is what it is, whoever loads it."""
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0]))
    steered.set_strength(0.5)
    steered.save_pretrained(tmp_path)
    want = logits(steered, IDS)
    saved = load_rule(tmp_path)
    assert np.array_equal(saved.rule.shift, rules[0].shift * np.float32(0.5))
    plain = steered.unload()
    with npti_export.attach(plain, tmp_path):
        assert torch.equal(logits(plain, IDS), want)


def test_from_a_checkpoints_rule(model, provenance, rules, tmp_path):
    save_checkpoint_rule(SavedRule(rules[0], provenance), tmp_path)
    with plain_rule(model, rules[0]):
        want = logits(model, IDS)
    with npti_export.attach(model, tmp_path):
        assert torch.equal(logits(model, IDS), want)


def test_a_rule_survives_its_encoding():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.9):
        shift = (rng.normal(size=(5, 77)) * (rng.random((5, 77)) < density)).astype(np.float32)
        rule = SteeringRule(shift, rng.random((5, 77)) < density)
        again = decode_rule(encode_rule(rule), "x")
        assert np.array_equal(again.shift, shift)
        assert np.array_equal(again.clamp, rule.clamp)


def test_beside_an_npti_adapter_of_peft(model, make_adapter, rules):
    """Two ways at once would clamp what the other one shifted: refused."""
    PeftModel.from_pretrained(model, make_adapter(rules[0]))
    with pytest.raises(AdapterError, match="load_adapter"):
        npti_export.attach(model, make_adapter(rules[1]))


def test_an_npti_adapter_of_peft_beside_an_attachment(model, make_adapter, rules):
    with npti_export.attach(model, make_adapter(rules[0])):
        want = logits(model, IDS)
        with pytest.raises(AdapterError, match="a rule is attached to this model"):
            PeftModel.from_pretrained(model, make_adapter(rules[1]))
        assert torch.equal(logits(model, IDS), want)
    adapted = PeftModel.from_pretrained(model, make_adapter(rules[1]))
    assert not torch.equal(logits(adapted, IDS), want)


def test_it_steers_what_the_artifact_says(model, provenance, rules, tmp_path):
    write_adapter(SavedRule(rules[0], provenance, "response"), tmp_path)
    base = logits(model, IDS)
    with npti_export.attach(model, tmp_path) as attached:
        assert attached.where == "response"
        assert torch.equal(logits(model, IDS), base)
    with npti_export.attach(model, tmp_path, where="all"):
        assert not torch.equal(logits(model, IDS), base)


def test_training_after_a_pass_without_gradients(model, make_adapter, rules):
    """Generate, then train something else in the model."""
    with npti_export.attach(model, make_adapter(rules[0])):
        logits(model, IDS)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert model.model.layers[0].mlp.gate_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize("affected", [3, 400])
def test_few_neurons_or_many_tokens_make_no_difference(dtype, rows, affected):
    """Whether the neurons that change are picked out or all are computed is a matter of speed alone."""
    rng, width = np.random.default_rng(rows), 512
    a = torch.from_numpy(rng.normal(size=(rows, 1, width)).astype(np.float32)).to(dtype)
    shift, clamp = np.zeros(width, np.float32), np.zeros(width, np.uint8)
    places = rng.permutation(width)[:affected]
    shift[places[::2]], clamp[places[1::2]] = rng.normal(size=len(places[::2])), 1
    before = a.clone()
    found = LayerSteering()(a, [Share("x", torch.from_numpy(shift), torch.from_numpy(clamp), 1.0, "all")])
    want = a.float().clone()
    for place in places[1::2]:
        want[..., place] = torch.minimum(want[..., place], torch.zeros(()))
    assert torch.equal(found, (want + torch.from_numpy(shift)).to(dtype))
    assert torch.equal(a, before)
    assert not torch.equal(found, a)


def test_another_model(model, tiny_checkpoint, make_adapter, provenance, rules):
    torch.manual_seed(1)
    stranger = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    torch.nn.init.normal_(stranger.model.norm.weight)
    base = logits(stranger, IDS)
    with pytest.raises(AdapterError, match="made for another model"):
        npti_export.attach(stranger, make_adapter(rules[0]))
    with npti_export.attach(stranger, make_adapter(rules[0]), any_model=True):
        assert not torch.equal(logits(stranger, IDS), base)
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 128}))
    with pytest.raises(AdapterError, match="of 96 neurons a layer, this one has 128"):
        npti_export.attach(wide, make_adapter(rules[0]))
    shallow = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 2}))
    with pytest.raises(AdapterError, match="of 3 layers, this one has 2"):
        npti_export.attach(shallow, make_adapter(rules[0]), any_model=True)
    odd = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    odd.config.model_type = "rwkv"
    with pytest.raises(ArchitectureError, match="'rwkv' is not supported"):
        npti_export.attach(odd, make_adapter(rules[0]))
    other = dataclasses.replace(provenance, fingerprint=dataclasses.replace(provenance.fingerprint, bfloat16="0" * 64))
    rounded = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match="made for another model"):
        npti_export.attach(rounded, make_adapter(rules[0], other))


def test_an_mlp_that_does_not_call_its_activation(model, make_adapter, rules):
    """A fused kernel in its place would make any rule inert."""
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(AdapterError, match="is not called by its MLP"):
        npti_export.attach(model, make_adapter(rules[0]))
    with pytest.raises(AdapterError, match="is not called by its MLP"):
        PeftModel.from_pretrained(model, make_adapter(rules[0]))


def test_nothing_heavy_is_imported_before_it_is_used():
    program = (
        "import sys, npti_export; assert not {'torch', 'peft', 'transformers'} & set(sys.modules), 'eager';"
        "import peft; assert 'NPTI' in peft.PeftType.__members__;"
        "from peft.utils import PeftType; assert PeftType('NPTI').value == 'NPTI' == PeftType.NPTI"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    program = "import peft; assert 'NPTI' not in list(peft.PeftType); import npti_export; peft.PeftType['NPTI']"
    subprocess.run([sys.executable, "-c", program], check=True)
