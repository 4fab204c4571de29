"""Adapters that are broken in every way a file can be: an error that says so, never a model that does nothing."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import random_rule
from peft import PeftConfig, PeftModel
from plain_rule import logits
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import npti_export
from npti_export.adapter import registration
from npti_export.errors import AdapterError
from npti_export.rule_io import load_rule

IDS = torch.arange(5, 17)[None]
SHIFT = "base_model.model.model.layers.1.mlp.act_fn.npti_shift"
CLAMP = "base_model.model.model.layers.1.mlp.act_fn.npti_clamp"


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture
def adapter(make_adapter):
    return make_adapter(random_rule(3, 96))


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, value):
    return lambda tensors: tensors.update({name: value})


def not_finite(tensors):
    tensors[SHIFT][7] = np.nan


BROKEN = {
    "a missing shift": (without(SHIFT), r"npti_shift\S* is missing"),
    "a missing clamp": (without(CLAMP), r"npti_clamp\S* is missing"),
    "a tensor too many": (
        replaced(SHIFT.replace("s.1.", "s.7."), np.zeros(96, np.float32)),
        r"layers\.7\.\S* belongs to no layer",
    ),
    "a shorter vector": (replaced(SHIFT, np.zeros(95, np.float32)), r"\(95,\)"),
    "a value that is none": (not_finite, "not finite"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file(model, adapter, fault):
    change, message = BROKEN[fault]
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    base = logits(model, IDS)
    with pytest.raises(AdapterError, match=message):
        npti_export.attach(model, adapter)
    assert torch.equal(logits(model, IDS), base)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_through_transformers_own_loader(model, adapter, fault):
    """Its loader tolerates much; the first pass does not. A tensor too many it reports, and the rest is the rule."""
    change, _ = BROKEN[fault]
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    base = logits(model, IDS)

    def use():
        model.load_adapter(str(adapter))
        return logits(model, IDS)

    if fault == "a tensor too many":
        assert not torch.equal(use(), base)
    else:
        with pytest.raises((AdapterError, RuntimeError), match=r"not loaded, or are not finite|raising an error"):
            use()


def test_a_truncated_file(model, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="is damaged"):
        load_rule(adapter)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(model, adapter)
    path.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        npti_export.attach(model, adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "is a LORA adapter"),
        ({"provenance": None}, "does not say where its rule came from"),
        ({"provenance": {"trait": "calm"}}, "does not say where its rule came from"),
        ({"layers": None}, "how many layers"),
    ],
)
def test_a_configuration_that_says_something_else(model, adapter, change, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        npti_export.attach(model, adapter)


def test_what_is_no_adapter(model, tmp_path):
    for path, message in ((tmp_path, "holds neither"), (tmp_path / "nowhere", "there is no such")):
        with pytest.raises(AdapterError, match=message):
            npti_export.attach(model, path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        npti_export.attach(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        npti_export.attach(model, tmp_path)


def test_an_adapter_without_weights_does_not_run(model, adapter):
    model.add_adapter(PeftConfig.from_pretrained(adapter), "empty")
    with pytest.raises(AdapterError, match="adapter 'empty': its vectors were not loaded"):
        logits(model, IDS)


def test_the_wrong_model_is_left_untouched(model, adapter):
    torch.nn.init.normal_(model.model.norm.weight)
    base = logits(model, IDS)
    with pytest.raises(AdapterError, match="made for another model"):
        PeftModel.from_pretrained(model, adapter)
    with pytest.raises(AdapterError, match="made for another model"):
        model.load_adapter(str(adapter))
    assert torch.equal(logits(model, IDS), base)


def test_without_our_package_it_stops_with_the_message_that_is_documented(adapter):
    program = f"import peft; peft.PeftConfig.from_pretrained({str(adapter)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: 'NPTI'" in done.stderr.strip().splitlines()[-1]


def test_an_older_peft_is_told_and_left_alone(monkeypatch):
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.delattr(BaseTuner, "_remap_adapter_state_dict_for_load")
    import peft

    with pytest.warns(UserWarning, match=re.escape("pip install 'peft>=0.21'")):
        registration.register(peft)
