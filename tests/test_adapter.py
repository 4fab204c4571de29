"""The PEFT tuner: every way to load, switch and save it, against the rule written out in the MLP."""

import copy
import pickle

import numpy as np
import pytest
import tolerances
import torch
from conftest import random_rule
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from plain_rule import logits, plain_rule
from reference import ReferenceLlama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import npti_export
from npti_export.adapter.config import NptiConfig
from npti_export.adapter.layer import NptiLayer
from npti_export.errors import AdapterError
from npti_export.export.peft import write_adapter
from npti_export.rule import SteeringRule, compose
from npti_export.rule_io import SavedRule, load_rule

IDS = torch.arange(5, 29).reshape(2, 12)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def load(tiny_checkpoint):
    """A fresh copy of the tiny model in a dtype."""
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype).eval()


@pytest.fixture(scope="session")
def rules():
    return random_rule(3, 96, seed=0), random_rule(3, 96, seed=1)


def expected(model, rule):
    with plain_rule(model, rule):
        return logits(model, IDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_adapter_is_the_rule_and_switched_off_the_base(load, make_adapter, rules, dtype):
    model = load(dtype)
    base, want = logits(model, IDS), expected(model, rules[0])
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0]))
    assert torch.equal(logits(steered, IDS), want)
    assert not torch.equal(base, want)
    with steered.disable_adapter():
        assert torch.equal(logits(steered, IDS), base)
    npti_export.set_strength(steered, 0.0)
    assert torch.equal(logits(steered, IDS), base)
    npti_export.set_strength(steered, 1.0)
    assert torch.equal(logits(steered, IDS), want)
    assert torch.equal(logits(steered.unload(), IDS), base)


def test_against_float64(tiny, load, make_adapter, rules):
    """The whole model with the rule, in float64 numpy."""
    steered = PeftModel.from_pretrained(load(), make_adapter(rules[0]))
    tokens = IDS[0].tolist()
    reference = ReferenceLlama(tiny)
    want = reference.logits(tokens, rules[0].shift, rules[0].clamp)
    assert np.abs(logits(steered, IDS[:1])[0].numpy() - want).max() < tolerances.ADAPTER_FLOAT32
    assert np.abs(reference.logits(tokens) - want).max() > 100 * tolerances.ADAPTER_FLOAT32


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_strength_scales_the_shift_and_leaves_the_clamp(load, make_adapter, rules, strength):
    model = load()
    scaled = SteeringRule(rules[0].shift * np.float32(strength), rules[0].clamp)
    want = expected(model, scaled)
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0]))
    full = logits(steered, IDS)
    steered.set_strength(strength)
    assert torch.equal(logits(steered, IDS), want)
    assert not torch.equal(full, want)


def test_several_at_once_compose(load, make_adapter, rules):
    model = load()
    both = expected(model, compose(rules))
    first, second = expected(model, rules[0]), expected(model, rules[1])
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0]), adapter_name="calm")
    steered.load_adapter(make_adapter(rules[1]), adapter_name="open")
    assert torch.equal(logits(steered, IDS), first)
    steered.set_adapter("open")
    assert torch.equal(logits(steered, IDS), second)
    steered.base_model.set_adapter(["calm", "open"])
    assert (logits(steered, IDS) - both).abs().max() < tolerances.ADAPTER_FLOAT32
    npti_export.set_strength(steered, 0.0, "open")
    assert torch.equal(logits(steered, IDS), first)
    steered.delete_adapter("calm")
    npti_export.set_strength(steered, 1.0)
    steered.set_adapter("open")
    assert torch.equal(logits(steered, IDS), second)
    assert (first - second).abs().max() > 0.01


def test_the_other_ways_to_load_it(load, make_adapter, rules):
    model = load()
    base, want = logits(model, IDS), expected(model, rules[0])
    directory = make_adapter(rules[0])
    assert not torch.equal(base, want)
    config = PeftConfig.from_pretrained(directory)
    assert (type(config), config.layers, config.width, config.strength) == (NptiConfig, 3, 96, 1.0)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(directory), IDS), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory), IDS), want)
    lean = PeftModel.from_pretrained(load(), directory, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, IDS), want)
    model.load_adapter(str(directory), adapter_name="calm")
    assert torch.equal(logits(model, IDS), want)
    model.load_adapter(str(make_adapter(rules[1])), adapter_name="open")
    model.set_adapter(["calm", "open"])
    assert not torch.equal(logits(model, IDS), want)
    model.disable_adapters()
    assert torch.equal(logits(model, IDS), base)
    model.enable_adapters()
    model.delete_adapter("open")
    model.set_adapter("calm")
    assert torch.equal(logits(model, IDS), want)


def test_saving_and_loading_is_bitwise(load, make_adapter, rules, tmp_path):
    directory = make_adapter(rules[0])
    for dtype in DTYPES:  # a model in 16 bits must not round the shifts
        steered = PeftModel.from_pretrained(load(dtype), directory)
        steered.set_strength(0.5)
        steered.save_pretrained(tmp_path / str(dtype))
        stored = load_file(directory / "adapter_model.safetensors")
        saved = load_file(tmp_path / str(dtype) / "adapter_model.safetensors")
        assert stored.keys() == saved.keys()
        assert all(torch.equal(stored[name], saved[name]) for name in stored)
        again = PeftModel.from_pretrained(load(dtype), tmp_path / str(dtype))
        assert torch.equal(logits(again, IDS), logits(steered, IDS))  # the strength was saved, too
        assert not torch.equal(logits(again, IDS), logits(PeftModel.from_pretrained(load(dtype), directory), IDS))


def test_a_cast_of_the_model_leaves_the_shifts_exact(load, make_adapter, rules):
    model = load()
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0])).to(torch.bfloat16).float().half()
    layers = [module for module in steered.modules() if isinstance(module, NptiLayer)]
    for layer, shift in zip(layers, rules[0].shift, strict=True):
        assert torch.equal(layer.npti_shift["default"].data, torch.from_numpy(shift))
    plain = load().to(torch.bfloat16).float().half()
    assert torch.equal(logits(steered, IDS), expected(plain, rules[0]))


def test_a_copy_and_a_state_dict_carry_the_rule(load, make_adapter, rules):
    steered = PeftModel.from_pretrained(load(), make_adapter(rules[0]))
    want = logits(steered, IDS)
    twin = copy.deepcopy(steered)
    other = PeftModel.from_pretrained(load(), make_adapter(rules[1]))
    logits(other, IDS)  # keeps what it computed
    other.load_state_dict(steered.state_dict())
    assert torch.equal(logits(other, IDS), want)
    npti_export.set_strength(steered, 0.0)
    assert torch.equal(logits(twin, IDS), want)
    assert not torch.equal(logits(steered, IDS), want)


def test_changed_values_are_noticed(load, make_adapter, rules):
    model = load()
    want = [expected(model, SteeringRule(rules[0].shift * np.float32(scale), rules[0].clamp)) for scale in (2, 4, 8)]
    steered = PeftModel.from_pretrained(model, make_adapter(rules[0]))
    logits(steered, IDS)  # keeps what it computed
    layers = [module for module in steered.modules() if isinstance(module, NptiLayer)]
    shifts = [layer.npti_shift["default"] for layer in layers]
    with torch.no_grad():
        for shift in shifts:
            shift.mul_(2)
    assert torch.equal(logits(steered, IDS), want[0])
    for shift in shifts:
        shift.data = shift.data * 2
    assert torch.equal(logits(steered, IDS), want[1])
    for layer, shift in zip(layers, shifts, strict=True):
        layer.npti_shift["default"] = torch.nn.Parameter(shift.data * 2, requires_grad=False)
    assert torch.equal(logits(steered, IDS), want[2])


def test_loaded_in_inference_mode(load, make_adapter, rules):
    """Such tensors do not count their changes."""
    model = load()
    want = [expected(model, rule) for rule in rules]
    with torch.inference_mode():
        steered = PeftModel.from_pretrained(model, make_adapter(rules[0]))
        assert torch.equal(logits(steered, IDS), want[0])
        set_peft_model_state_dict(steered, load_file(make_adapter(rules[1]) / "adapter_model.safetensors"))
        assert torch.equal(logits(steered, IDS), want[1])


def test_one_adapter_for_all_rows(load, make_adapter, rules):
    steered = PeftModel.from_pretrained(load(), make_adapter(rules[0]))
    with pytest.raises(AdapterError, match="steer all rows of a batch alike"):
        steered(input_ids=IDS, adapter_names=["default", "__base__"])


def test_a_model_that_is_saved_whole(load, make_adapter, rules, provenance, tmp_path):
    """As multiprocessing does; also one that follows positions."""
    write_adapter(SavedRule(rules[0], provenance, "response"), tmp_path)
    for directory in (make_adapter(rules[0]), tmp_path):
        steered = PeftModel.from_pretrained(load(), directory)
        options = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        again = pickle.loads(pickle.dumps(steered))
        assert torch.equal(again.generate(**options), steered.generate(**options))
        assert torch.equal(logits(again, IDS), logits(steered, IDS))


def test_generation(load, make_adapter, rules):
    """Token by token with a cache, left-padded, the same as without a cache."""
    steered = PeftModel.from_pretrained(load(), make_adapter(rules[0]))
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :4] = 0
    out = steered.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    slow = steered.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(out, slow)
    with steered.disable_adapter():
        assert not torch.equal(
            out, steered.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
        )


def test_compiled(load, make_adapter, rules):
    """One graph without breaks, the same numbers, and a strength that can be changed."""
    model = load()
    want = expected(model, rules[0])
    base = logits(model, IDS)
    model.load_adapter(str(make_adapter(rules[0])))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (logits(compiled, IDS) - want).abs().max() < tolerances.ADAPTER_FLOAT32
    npti_export.set_strength(model, 0.0)
    assert torch.equal(logits(compiled, IDS), base)
    torch.compiler.reset()


def test_a_new_adapter_does_nothing_and_can_be_trained(load):
    model = load()
    base = logits(model, IDS)
    steered = get_peft_model(model, NptiConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(steered, IDS), base)
    assert {name.rpartition(".act_fn.")[2] for name, p in steered.named_parameters() if p.requires_grad} == {
        "npti_shift.default"
    }
    optimiser = torch.optim.SGD([p for p in steered.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = steered(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    steered.requires_grad_(False)
    assert not torch.equal(logits(steered, IDS), base)


@pytest.mark.parametrize("order", ["lora first", "npti first"])
@pytest.mark.parametrize("way", ["peft", "peft, nested", "transformers"])
def test_together_with_lora(load, make_adapter, rules, tmp_path, order, way):
    torch.manual_seed(0)
    lora = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    only_lora = logits(lora, IDS)
    lora.save_pretrained(tmp_path)
    want = expected(lora.base_model.model, rules[0])
    assert (only_lora - want).abs().max() > 0.01

    model = load()
    base = logits(model, IDS)
    adapters = {"style": tmp_path, "calm": make_adapter(rules[0])}
    if (way, order) == ("peft, nested", "npti first"):
        pytest.skip("PEFT finds no weights of a LoRA that is loaded into a PeftModel of another kind")
    for name in adapters if order == "lora first" else reversed(adapters):
        if way.startswith("peft"):
            inner = model.get_base_model() if way == "peft" and isinstance(model, PeftModel) else model
            model = PeftModel.from_pretrained(inner, adapters[name], adapter_name=name)
        else:
            model.load_adapter(str(adapters[name]), adapter_name=name)
    assert torch.equal(logits(model, IDS), want)
    npti_export.set_strength(model, 0.0, "calm")
    assert torch.equal(logits(model, IDS), only_lora)
    npti_export.set_strength(model, 1.0)
    if way == "peft, nested":  # the longer names of what it saves are understood, too
        model.save_pretrained(tmp_path / "again")
        assert np.array_equal(load_rule(tmp_path / "again" / "calm").rule.shift, rules[0].shift)
    if way == "transformers":
        model.disable_adapters()
        assert torch.equal(logits(model, IDS), base)


def test_saving_beside_a_lora_of_the_same_name(load, make_adapter, rules, tmp_path):
    lora = get_peft_model(load(), LoraConfig(r=2, target_modules=["q_proj"]))
    both = PeftModel.from_pretrained(lora, make_adapter(rules[0]))
    both.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 6
    assert np.array_equal(load_rule(tmp_path).rule.shift, rules[0].shift)


def test_strengths_that_are_not(load, make_adapter, rules):
    steered = PeftModel.from_pretrained(load(), make_adapter(rules[0]))
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="opposite pole"):
            npti_export.set_strength(steered, wrong)
    with pytest.raises(AdapterError, match="no npti adapter nobody"):
        npti_export.set_strength(steered, 1, "nobody")
    with pytest.raises(AdapterError, match="no npti adapter"):
        npti_export.set_strength(load(), 1)
    with pytest.raises(AdapterError, match="cannot be merged in place"):
        steered.merge_adapter()
