"""The examples run as they say, on the real default model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    count = load_recipe("smollm2-135m").select.at_most
    assert printed.count(f"{count} shifts, {count} clamps") == 3
    assert (folder / "calm-0.5.gguf").read_bytes() != (folder / "calm-1.gguf").read_bytes()


def test_chat(composed, default_model):
    folder, _ = composed
    printed = run("chat.py", "calm-1.gguf", str(default_model), "What is your favourite season?", cwd=folder)
    steered, base = printed.split("--- ")[1:]
    assert len(base.split()) > 10
    assert steered.split("\n", 1)[1] != base.split("\n", 1)[1]
