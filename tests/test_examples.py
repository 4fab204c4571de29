"""The examples run as they say: baking on the real default model, adapters on a tiny one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rule

from npti_export.models import resolve_model
from npti_export.profile import NeuronProfile
from npti_export.profile_io import save_profile
from npti_export.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    source = resolve_model(None)
    rng = np.random.default_rng(0)
    shape = (source.shape.layers, source.shape.width)
    arrays = [rng.uniform(0.2, 0.8, shape).astype(np.float32) for _ in range(4)]
    profile = NeuronProfile("neuroticism", *arrays, source.fingerprint)
    save_profile(profile, folder / "neuroticism.safetensors", force=False)
    return folder, run("compose.py", "neuroticism.safetensors", cwd=folder)


def run(name, *arguments, cwd):
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compose(composed):
    folder, printed = composed
    assert [path.name for path in sorted(folder.glob("*.gguf"))] == ["calm-0.5.gguf", "calm-1.5.gguf", "calm-1.gguf"]
    count = load_recipe("smollm2-135m-npti").select.at_most
    assert printed.count(f"{count} shifts, {count} clamps") == 3
    assert (folder / "calm-0.5.gguf").read_bytes() != (folder / "calm-1.gguf").read_bytes()


def test_chat(composed, default_model):
    folder, _ = composed
    printed = run("chat.py", "calm-1.gguf", str(default_model), "What is your favourite season?", cwd=folder)
    steered, base = printed.split("--- ")[1:]
    assert len(base.split()) > 10
    assert steered.split("\n", 1)[1] != base.split("\n", 1)[1]


def answers(printed):
    """The answer under each heading."""
    parts = [part.split("\n", 1) for part in printed.split("--- ")[1:]]
    return {heading: answer.strip() for heading, answer in parts}


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return [str(make_adapter(random_rule(3, 96, seed=seed, per_layer=(20, 20)))) for seed in (0, 1)]


def test_load_adapter(adapters, tmp_path):
    found = answers(run("load_adapter.py", adapters[0], "Hello", cwd=tmp_path))
    assert list(found) == ["strength 0.0", "strength 0.5", "strength 1.0", "off"]
    assert found["off"] == found["strength 0.0"] != found["strength 1.0"] != found["strength 0.5"]


def test_mix_traits(adapters, tmp_path):
    found = answers(run("mix_traits.py", *adapters, "Hello", cwd=tmp_path))
    assert list(found) == ["neither", "first", "second", "both, the first at 0.7"]
    assert len(set(found.values())) == 4


def test_with_lora(adapters, tiny_checkpoint, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    lora = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "gate_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    found = answers(run("with_lora.py", "lora", adapters[0], "Hello", cwd=tmp_path))
    assert list(found) == ["LoRA", "LoRA and personality", "LoRA again"]
    assert found["LoRA"] == found["LoRA again"] != found["LoRA and personality"]


def test_response_only(adapters, tmp_path):
    found = answers(run("response_only.py", adapters[0], "Hello", cwd=tmp_path))
    assert list(found) == ["base", "all", "response", "base again"]
    assert found["base"] == found["base again"]
    assert len({found["base"], found["all"], found["response"]}) == 3


def test_save_checkpoint(adapters, tmp_path):
    found = answers(run("save_checkpoint.py", adapters[0], "steered", "Hello", cwd=tmp_path))
    adapter, saved = found.values()
    assert "LlamaForCausalLM, MLP width 352" in found
    assert adapter.split()[:4] == saved.split()[:4]
