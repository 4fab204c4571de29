"""A model whose layers lie in several places, against the same model in one: ``--device map``."""

from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from conftest import random_rule
from jobs import QUICK, npti
from tolerances import LOGITS_FLOAT32, SUMS_FLOAT64

from npti_export.errors import ModelError
from npti_export.models import gguf_source
from npti_export.runtimes.base import chat
from npti_export.runtimes.devices import entrance, usable_device
from npti_export.runtimes.transformers import TransformersRuntime, _check_spread
from npti_export.steer import steered

QUESTIONS = ["Hi", "What do you do when it rains all day?"]


@pytest.fixture
def apart(tiny, tmp_path):
    """A runtime whose second and third layers lie on disk, and come into memory only while they are computed."""
    runtime = TransformersRuntime(gguf_source(tiny), device="map", dtype="float32")
    places = {name: "cpu" for name, _ in runtime.model.model.named_children() if name != "layers"}
    layers = {f"layers.{at}": "disk" if at else "cpu" for at in range(len(runtime.layers))}
    whole = {f"model.{name}": place for name, place in (places | layers).items()} | {"lm_head": "cpu"}
    runtime.model = accelerate.dispatch_model(
        runtime.model, whole, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True
    )
    assert runtime.layers[1].mlp.down_proj.weight.device.type == "meta"
    return runtime


def observed(runtime):
    prompts = [runtime.encode(chat("You are calm.", question)) for question in QUESTIONS] * 2
    return runtime.observe(prompts, [0, 0, 1, 1], max_new_tokens=12, repetition_penalty=1.1)


def test_what_is_counted(apart, tiny_runtime):
    """Every count, layer by layer, and what the sums are to the rounding of the same products."""
    (plus, minus), answers = observed(apart)
    (one, other), others = observed(tiny_runtime)
    assert plus.active.sum(1).min() > 0  # each layer was counted
    for found, wanted in ((plus, one), (minus, other)):
        assert found.tokens == wanted.tokens
        np.testing.assert_array_equal(found.active, wanted.active)
        np.testing.assert_array_equal(found.histogram, wanted.histogram)
        np.testing.assert_allclose(found.product, wanted.product, rtol=SUMS_FLOAT64)
    np.testing.assert_array_equal(answers.active, others.active)


def test_logits_and_streams(apart, tiny_runtime):
    tokens = apart.encode(chat("You are calm.", QUESTIONS[1]))
    rule = random_rule(apart.source.shape.layers, apart.source.shape.width)
    base = apart.logits(tokens)
    np.testing.assert_allclose(base, tiny_runtime.logits(tokens), atol=LOGITS_FLOAT32)
    with steered(apart.activations, rule, apart.down_projections):
        moved = apart.logits(tokens)
    with steered(tiny_runtime.activations, rule, tiny_runtime.down_projections):
        np.testing.assert_allclose(moved, tiny_runtime.logits(tokens), atol=LOGITS_FLOAT32)
    assert np.abs(moved - base).max() > 100 * LOGITS_FLOAT32
    for layer in range(len(apart.layers)):
        np.testing.assert_array_equal(apart.down_weight(layer), tiny_runtime.down_weight(layer))
    exchanges = apart.generate([tokens], max_new_tokens=8, repetition_penalty=1.0)
    wanted = np.full((len(apart.layers), apart.source.shape.hidden), 0.1)
    for measure in (lambda one: one.stream_means(exchanges), lambda one: one.stream_follows(exchanges, wanted)):
        np.testing.assert_allclose(measure(apart), measure(tiny_runtime), atol=LOGITS_FLOAT32)


def test_where_tokens_go():
    """The first place that computes; weights in memory or on disk are computed there as well."""

    class Model:
        device = torch.device("cpu")

    spread = Model()
    spread.hf_device_map = {"model.embed_tokens": "disk", "model.layers.0": 1, "model.layers.1": 2, "lm_head": "cpu"}
    assert entrance(spread) == torch.device("cuda:1")
    spread.hf_device_map = {"": "cpu"}
    assert entrance(spread) == entrance(Model()) == torch.device("cpu")
    assert usable_device("map") == usable_device("auto")
    with pytest.raises(ModelError, match="--device cuda:99"):
        usable_device("cuda:99")


def test_experts_are_not_computed_from_elsewhere():
    whole = torch.nn.Linear(2, 2)
    apart = torch.nn.Linear(2, 2, device="meta")
    for model, mixture in ((whole, True), (apart, False)):
        _check_spread(model, SimpleNamespace(name="m", architecture=SimpleNamespace(mixture=mixture)))
    with pytest.raises(ModelError, match="mixture of experts cannot be computed from memory or disk"):
        _check_spread(apart, SimpleNamespace(name="m", architecture=SimpleNamespace(mixture=True)))


def test_what_is_measured_on_one_device(tiny_checkpoint, cli_environment, tmp_path):
    job = ["--trait", "openness+", "--model", str(tiny_checkpoint), "--recipe", "npti", "--device", "map"]
    done = npti(*job, "--format", "peft", "--out", "a", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "--device map is for identification, and peft files are measured on one device" in done.stderr
    done = npti("identify", *job, *QUICK[:6], "--out", "p", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = npti("identify", *job[:-1], "cpu", *QUICK[:6], "--out", "q", environment=cli_environment, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
