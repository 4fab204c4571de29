"""The constant part of a rule as a control vector of llama.cpp."""

import json

import numpy as np
import pytest
import tolerances
import torch
from conftest import random_rule
from gguf import GGUFReader
from jobs import main_job, npti

from npti_export.constant import as_directions, mean_effect
from npti_export.errors import GGUFError
from npti_export.export.control_vector import read_directions, write_control_vector
from npti_export.models import gguf_source
from npti_export.rule_io import load_rule
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.steer import steered

EXCHANGES = [Exchange((5, 9, 40, 77), (33, 60, 61)), Exchange((8, 8, 120), (7, 300, 301, 302))]


def test_mean_effect_against_torch(tiny, tiny_runtime):
    """Each layer of a steered torch model, asked what it would have said without the rule."""
    rule = random_rule(3, 96, per_layer=(6, 6))
    sums, count = np.zeros((3, 64)), 0
    for exchange in EXCHANGES:
        seen = []
        hooks = [
            layer.mlp.register_forward_hook(lambda _m, args, out, seen=seen: seen.append((args[0], out)))
            for layer in tiny_runtime.layers
        ]
        with torch.inference_mode(), steered(tiny_runtime.activations, rule):
            tiny_runtime.model(torch.tensor([exchange.tokens]))
        for hook in hooks:
            hook.remove()
        with torch.inference_mode():
            for number, layer in enumerate(tiny_runtime.layers):
                x, y = seen[number]
                change = y - layer.mlp(x)
                sums[number] += change[0, len(exchange.prompt) :].double().sum(0).numpy()
        count += len(exchange.response)
    with LlamaCppRuntime(tiny, source=gguf_source(tiny)) as runtime:
        found = mean_effect(runtime, rule, EXCHANGES)
    np.testing.assert_allclose(found, sums / count, atol=tolerances.KV_FLOAT16)
    assert np.abs(found[:2]).max() > 0.05  # there was something to average
    assert np.abs(found[2]).max() < tolerances.FLOAT32  # the layer that the rule leaves alone


def test_the_second_layer_takes_the_firsts_share():
    effect = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(as_directions(effect), [effect[0] + effect[1], effect[2]])


def test_llama_cpp_adds_what_the_file_says(tiny, tmp_path):
    """A direction of the last layer changes the logits by what the model's head makes of it."""
    rng = np.random.default_rng(0)
    directions = np.zeros((2, 64), np.float32)
    directions[1] = rng.normal(size=64)
    write_control_vector(tmp_path / "v.gguf", directions, "llama", {"trait": "calm"})
    file = GGUFReader(tmp_path / "v.gguf")
    assert file.fields["general.architecture"].contents() == "controlvector"
    assert file.fields["controlvector.model_hint"].contents() == "llama"
    assert [tensor.name for tensor in file.tensors] == ["direction.1", "direction.2"]
    np.testing.assert_array_equal(file.tensors[1].data, directions[1])
    tokens = [5, 9, 40, 77, 33]
    weights = {tensor.name: tensor.data for tensor in GGUFReader(tiny).tensors}
    with (
        LlamaCppRuntime(tiny) as base,
        LlamaCppRuntime(tiny, control_vector=read_directions(tmp_path / "v.gguf", 3, 64)) as moved,
    ):
        before, after = base.logits(tokens), moved.logits(tokens)
    # From the logits back to the residual stream: the embedding is the head, and has full column rank.
    head = weights["token_embd.weight"].astype(np.float64)
    hidden = [np.linalg.lstsq(head, one.T.astype(np.float64), rcond=None)[0].T for one in (before, after)]
    streams = [one / weights["output_norm.weight"] for one in hidden]  # up to the size that the norm took away
    for plain, steered_ in zip(*streams, strict=True):
        # plain = s * x, steered = t * (x + direction): the direction lies in their plane
        plane = np.stack([plain, steered_])
        rest = directions[1] - np.linalg.lstsq(plane.T, directions[1].astype(np.float64), rcond=None)[0] @ plane
        assert np.linalg.norm(rest) < 1e-3 * np.linalg.norm(directions[1])
    assert np.abs(before - after).max() > 0.1


def test_a_vector_for_other_sizes_is_refused(tiny, tmp_path):
    write_control_vector(tmp_path / "v.gguf", np.ones((2, 64), np.float32), "llama", {})
    for layers, hidden in ((2, 64), (3, 128)):
        with pytest.raises(GGUFError, match="does not fit a model"):
            read_directions(tmp_path / "v.gguf", layers, hidden)
    with pytest.raises(GGUFError, match="not a control vector"):
        read_directions(tiny, 3, 64)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_the_job_for_families_that_cannot_be_baked(family, make_tiny, tmp_path, cli_environment):
    model = make_tiny(family=family)
    done = npti(
        *main_job(model, "v.gguf", "--format", "control-vector", "--report", "r.json", "--save-profile", "p"),
        environment=cli_environment,
        cwd=tmp_path,
    )
    report = json.loads((tmp_path / "r.json").read_text()) if done.returncode == 0 else None
    if done.returncode == 3:  # a random model: its constant part may be worth nothing, which must be said
        assert "not delivered" in done.stderr
        vector = tmp_path / "v.gguf.rejected"
    else:
        assert done.returncode == 0, done.stderr
        vector = tmp_path / "v.gguf"
        fidelity = report["fidelity"]
        assert fidelity["kl_rule_artifact"] < fidelity["kl_rule_base_file"] == fidelity["limit"]
        assert report["artifact"]["format"] == "control-vector"
    source = gguf_source(model)
    directions = read_directions(vector, source.shape.layers, source.shape.hidden)
    assert np.abs(directions).max() > 0
    with LlamaCppRuntime(model) as base, LlamaCppRuntime(model, control_vector=directions) as moved:
        assert np.abs(base.logits([5, 6, 7]) - moved.logits([5, 6, 7])).max() > 1e-4
    assert load_rule(vector).rule.shifted == 20


def test_a_family_without_biases_is_refused_up_front_with_what_is_possible(make_tiny, tmp_path, cli_environment):
    done = npti(*main_job(make_tiny(family="qwen3"), "m.gguf"), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "--format control-vector" in done.stderr
    assert "--format peft" in done.stderr
    assert "identify" not in done.stderr  # nothing was started
    assert not (tmp_path / "m.gguf").exists()


def test_a_control_vector_becomes_a_steered_file(tiny, tmp_path, cli_environment):
    """It keeps its rule and says where its base is."""
    done = npti(*main_job(tiny, "v.gguf", "--format", "control-vector"), environment=cli_environment, cwd=tmp_path)
    vector = "v.gguf" if done.returncode == 0 else "v.gguf.rejected"
    options = ["--set", "verify.prompts=2", "--set", "verify.answer_tokens=8"]
    done = npti(
        "--from", vector, "--model", tiny, "--out", "m.gguf", *options, environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(load_rule(tmp_path / "m.gguf").rule.shift, load_rule(tmp_path / vector).rule.shift)
    done = npti("verify", vector, "--model", tiny, "--json", *options, environment=cli_environment, cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["format"] == "control-vector"
    done = npti("--from", vector, "--out", "n.gguf", *options, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
