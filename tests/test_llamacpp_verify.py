"""Verification inside llama.cpp, against the one in torch, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from conftest import random_rule
from gguf import GGUFReader
from reference import ReferenceLlama, kl
from test_bake import bake, rule_for
from tolerances import KL_TINY_FLOAT, KL_TINY_QUANTISED_OTHERS, KL_TWO_MEASURES

from npti_export import verify_llamacpp
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp import context
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime, opener
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.verify import LayerErrors, measure
from npti_export.verify_llamacpp import measure_file

RECIPE = load_recipe("npti", ["verify.answer_tokens=8"])
QUESTIONS = ["Hello", "What is it?", "Where do you go when it rains?"]


def measured(base, artifact, rule, settings=None):
    settings = settings or Settings(threads=1)
    source = gguf_source(base)
    with (
        LlamaCppRuntime(base, settings, source=source) as unsteered,
        LlamaCppRuntime(artifact, settings, sequences=3, source=source) as steered,
    ):
        prompts = [unsteered.encode(chat(None, text)) for text in QUESTIONS]
        return measure_file(unsteered, steered, rule, prompts, RECIPE, Silent())


def accepted(found, exact):
    fidelity, layers = found
    return fidelity.fault(RECIPE, exact=exact, base="tiny") is None and layers.fault() is None


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_it_agrees_with_torch_and_float64(make_tiny, tmp_path, kind):
    base, out = make_tiny(kind), tmp_path / "steered.gguf"
    rule = rule_for(base)
    bake(base, out, rule)
    fidelity, layers = measured(base, out, rule)
    runtime = TransformersRuntime(gguf_source(base), device="cpu", dtype="float32")
    prompts = [runtime.encode(chat(None, text)) for text in QUESTIONS]
    torch = measure(runtime, rule, opener(out), opener(base), prompts, RECIPE, Silent())
    # the answers differ a little: those of the artifact here, of the rule there
    assert fidelity.kl_rule_base == pytest.approx(torch.kl_rule_base, rel=0.15)
    assert fidelity.kl_rule_base_file == pytest.approx(torch.kl_rule_base_file, rel=0.15)
    limit = {"F32": KL_TINY_FLOAT, "Q4_1": KL_TINY_QUANTISED_OTHERS}[kind]
    for ours, theirs in (
        (fidelity.kl_rule_artifact, torch.kl_rule_artifact),
        (fidelity.kl_runtime_floor, torch.kl_runtime_floor),
    ):
        assert 0 <= ours < limit
        assert ours < KL_TWO_MEASURES * theirs + 1e-6
    assert fidelity.kl_rule_base > 10 * limit
    assert accepted((fidelity, layers), exact=kind == "F32")
    with LlamaCppRuntime(out, Settings(threads=1), sequences=3) as steered:
        answers = steered.generate(prompts, max_new_tokens=8, repetition_penalty=1.1)
    assert fidelity.positions == sum(len(one.tokens) for one in answers)
    reference = ReferenceLlama(base)
    want, plain = (
        np.concatenate([reference.logits(one.tokens, *parts) for one in answers])
        for parts in ((rule.shift, rule.clamp), ())
    )
    # attention is llama.cpp's own, with float16 keys and activations of 8 bits where weights are quantised
    assert fidelity.kl_rule_base == pytest.approx(kl(want, plain), rel=0.02)
    moved = [layer for layer in range(3) if rule.shift[layer].any() or rule.clamp[layer].any()]
    for layer in range(3):
        assert (layers.moved[layer] > 0.1) == (layer in moved)
        assert layers.floor[layer] < (1e-4 if kind == "F32" else 0.1)
        assert layers.error[layer] < 2 * layers.floor[layer] + 0.1 * layers.moved[layer] + 1e-7


def test_errors_of_layers_against_float64(tiny, tmp_path):
    """An artifact of half the rule is off by the other half."""
    rule = random_rule(3, 96)
    half = dataclasses.replace(rule, shift=rule.shift / 2, clamp=np.zeros_like(rule.clamp))
    whole = dataclasses.replace(half, shift=rule.shift)
    bake(tiny, tmp_path / "half.gguf", half)
    _, layers = measured(tiny, tmp_path / "half.gguf", whole)
    for layer in range(2):
        assert layers.error[layer] == pytest.approx(0.5 * layers.moved[layer], rel=1e-3)
    assert layers.error[2] < 1e-5
    assert layers.moved[2] == 0


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_an_inert_file_and_one_of_another_rule_are_refused(make_tiny, tmp_path, kind):
    base = make_tiny(kind)
    rule = rule_for(base)
    found = measured(base, base, rule)
    assert not accepted(found, exact=kind == "F32")
    assert "layer 0 does not do what the rule says" in found[1].fault()
    assert found[0].kl_rule_artifact == found[0].kl_rule_base_file
    bake(base, tmp_path / "other.gguf", rule_for(base, seed=9))
    fidelity, layers = measured(base, tmp_path / "other.gguf", rule)
    assert "does not do what the rule says" in fidelity.fault(RECIPE, exact=kind == "F32", base="tiny")
    assert "layer 0" in layers.fault()


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_a_layer_that_was_tampered_with_is_named(make_tiny, tmp_path, kind):
    base, out = make_tiny(kind), tmp_path / "steered.gguf"
    rule = rule_for(base)
    bake(base, out, rule)
    tensor = next(one for one in GGUFReader(out).tensors if one.name == "blk.1.ffn_gate.bias")
    data = bytearray(out.read_bytes())
    place = slice(tensor.data_offset, tensor.data_offset + tensor.n_bytes)
    biases = np.frombuffer(bytes(data[place]), np.float32).copy()
    assert (biases == -1000).any()
    data[place] = np.where(biases == -1000, 0, biases).astype(np.float32).tobytes()  # clamped neurons are back
    out.write_bytes(data)
    _, layers = measured(base, out, rule)
    assert layers.fault().startswith("layer 1 does not do what the rule says")
    assert layers.error[0] < 0.5 * layers.moved[0]


def test_a_file_that_is_no_number_is_refused():
    assert "layer 1" in LayerErrors((0.0, float("nan")), (1.0, 1.0), (0.0, 0.0)).fault()
    assert LayerErrors((0.0, 0.0), (1.0, 0.0), (0.0, 0.0)).fault() is None


def test_sequences_in_pieces_and_in_a_given_context(tiny, tmp_path, monkeypatch):
    rule = rule_for(tiny)
    bake(tiny, tmp_path / "s.gguf", rule)
    whole, _ = measured(tiny, tmp_path / "s.gguf", rule)
    small, _ = measured(tiny, tmp_path / "s.gguf", rule, Settings(threads=1, context=256, batch=32))
    assert small.positions == whole.positions
    assert small.kl_rule_base == pytest.approx(whole.kl_rule_base, rel=0.02)
    assert small.kl_rule_artifact < KL_TINY_FLOAT
    monkeypatch.setattr(context, "_LOGITS_BYTES", 1)  # each by itself
    single, _ = measured(tiny, tmp_path / "s.gguf", rule)
    assert single.kl_rule_base == pytest.approx(whole.kl_rule_base, rel=0.02)


def test_chunks():
    sequences = [(1,) * size for size in (5, 5, 5, 40, 3, 3)]
    sizes = lambda *limits: [[len(one) for one in some] for some in verify_llamacpp.in_chunks(sequences, *limits)]  # noqa: E731
    assert sizes(1000, 0) == [[5, 5, 5, 40, 3, 3]]
    assert sizes(1000, 12) == [[5, 5], [5], [40], [3, 3]]
    assert sizes((96 << 20) // 4 // 12, 0) == [[5, 5], [5], [40], [3, 3]]
    assert [len(some) for some in verify_llamacpp.in_chunks([(1,)] * 600, 1000, 0)] == [256, 256, 88]


def test_a_qwen2_file_that_is_steered_as_llama(make_tiny, tmp_path):
    base = make_tiny(family="qwen2")
    rule = random_rule(3, 96)
    bake(base, tmp_path / "s.gguf", rule)
    found = measured(base, tmp_path / "s.gguf", rule)
    assert accepted(found, exact=True)
    assert found[0].kl_rule_artifact < KL_TINY_FLOAT < found[0].kl_rule_base


def test_a_file_baked_into_another_than_the_model(tiny, make_tiny, tmp_path):
    """As with ``--model F32 --base Q8_0``: the noise is the file's, and its layers are held to its own weights."""
    base, rule = make_tiny("Q8_0"), rule_for(tiny)
    bake(base, tmp_path / "s.gguf", rule)
    settings = Settings(threads=1)
    model, file = gguf_source(tiny), gguf_source(base)
    with (
        LlamaCppRuntime(tiny, settings, source=model) as unsteered,
        LlamaCppRuntime(base, settings, source=file) as plain,
        LlamaCppRuntime(tmp_path / "s.gguf", settings, sequences=3, source=file) as steered,
    ):
        prompts = [unsteered.encode(chat(None, text)) for text in QUESTIONS]
        fidelity, layers = measure_file(unsteered, steered, rule, prompts, RECIPE, Silent(), file=plain)
        sequences = [one.tokens for one in steered.generate(prompts, max_new_tokens=8, repetition_penalty=1.1)]
        want, got = (np.concatenate([runtime.logits(tokens) for tokens in sequences]) for runtime in (unsteered, plain))
    assert fidelity.kl_runtime_floor == pytest.approx(kl(want, got), rel=0.2)
    assert fidelity.kl_runtime_floor > 1e-5  # of the same file twice: below 1e-9
    assert accepted((fidelity, layers), exact=False)
    assert max(layers.floor) < 0.02
    assert max(layers.moved) > 0.1
