"""The transformers runtime against a float64 reference, step-by-step decoding and plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_rule
from reference import ReferenceLlama
from test_mixtures import save_tiny
from tolerances import LOGITS_FLOAT32, SIGNS_BFLOAT16

from npti_export.bench import load_bench
from npti_export.errors import ModelError, ProfileError
from npti_export.identify.matched import match
from npti_export.models import gguf_source, resolve_model
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes import transformers as transformers_runtime
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.transformers import TransformersRuntime, batches
from npti_export.steer import steered

QUESTIONS = ["Hi", "What do you do when it rains all day?", "Tell me about the sea and the boats on it, please."]


def prompts_of(runtime):
    return [runtime.encode(chat("You are calm.", question)) for question in QUESTIONS]


def greedy(runtime, prompt, steps, penalty):
    """Greedy decoding one token at a time without a cache, by the definition of the repetition penalty."""
    tokens = list(prompt)
    for _ in range(steps):
        logits = runtime.logits(tokens)[-1].astype(np.float64)
        for token in set(tokens):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 2:
            break
    return tuple(tokens[len(prompt) :])


def test_logits_against_float64(tiny, tiny_runtime):
    tokens = prompts_of(tiny_runtime)[2]
    want = ReferenceLlama(tiny).logits(tokens)
    np.testing.assert_allclose(tiny_runtime.logits(tokens), want, atol=LOGITS_FLOAT32)


def test_rule_against_float64_and_it_moves_the_model(tiny, tiny_runtime):
    rule = random_rule(3, 96)
    tokens = prompts_of(tiny_runtime)[2]
    reference = ReferenceLlama(tiny)
    want, base = reference.logits(tokens, rule.shift, rule.clamp), reference.logits(tokens)
    before = tiny_runtime.logits(tokens)
    with steered(tiny_runtime.activations, rule):
        got = tiny_runtime.logits(tokens)
    np.testing.assert_allclose(got, want, atol=LOGITS_FLOAT32)
    assert np.abs(want - base).max() > 100 * LOGITS_FLOAT32
    np.testing.assert_array_equal(tiny_runtime.logits(tokens), before)  # and lets go of it afterwards


def test_padded_batch_generation_is_what_each_prompt_gets_alone(tiny_runtime):
    prompts = prompts_of(tiny_runtime)
    assert len({len(prompt) for prompt in prompts}) == 3
    exchanges = tiny_runtime.generate(prompts, max_new_tokens=8, repetition_penalty=1.1)
    for prompt, exchange in zip(prompts, exchanges, strict=True):
        assert exchange.prompt == prompt
        assert exchange.response == greedy(tiny_runtime, prompt, 8, 1.1)


def test_answers_end_with_the_stop_token(tiny_runtime):
    assert tiny_runtime._cut([7, 8, 2, 2, 2], 5) == (7, 8, 2)
    assert tiny_runtime._cut([7, 8, 9], 3) == (7, 8, 9)
    assert tiny_runtime._cut([2, 2], 2) == (2,)


def decoded_activations(runtime, exchange):
    """a of each layer at each decoding step, [layers, steps, width], the tokens fed one by one after the prompt."""
    seen = [[] for _ in runtime.activations]
    with torch.inference_mode():
        cache = runtime.model(input_ids=torch.tensor([exchange.prompt]), use_cache=True).past_key_values
        handles = [
            module.register_forward_hook(lambda _m, _i, out, layer=layer: seen[layer].append(out[0, 0].float().numpy()))
            for layer, module in enumerate(runtime.activations)
        ]
        for token in exchange.response[:-1]:
            cache = runtime.model(
                input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
            ).past_key_values
        for handle in handles:
            handle.remove()
    return np.array(seen)


def test_teacher_forcing_counts_what_decoding_would(tiny_runtime):
    exchanges = tiny_runtime.generate(prompts_of(tiny_runtime), max_new_tokens=12, repetition_penalty=1.1)
    decoded = np.concatenate([decoded_activations(tiny_runtime, exchange) for exchange in exchanges], axis=1)
    stats = tiny_runtime.activation_stats(exchanges)
    assert stats.tokens == decoded.shape[1] == sum(len(exchange.response) - 1 for exchange in exchanges)
    np.testing.assert_array_equal(stats.active, (decoded > 0).sum(1))
    np.testing.assert_allclose(stats.largest, decoded.max(1).clip(0), atol=LOGITS_FLOAT32)


def test_teacher_forcing_against_float64(tiny, tiny_runtime):
    (exchange,) = tiny_runtime.generate(prompts_of(tiny_runtime)[:1], max_new_tokens=12, repetition_penalty=1.1)
    seen = []
    ReferenceLlama(tiny).logits(exchange.tokens, seen=seen)
    response = np.array(seen)[:, len(exchange.prompt) : len(exchange.tokens) - 1]
    np.testing.assert_array_equal(tiny_runtime.activation_stats([exchange]).active, (response > 0).sum(1))


def test_teacher_forcing_on_the_real_model_in_bfloat16(default_model):
    runtime = TransformersRuntime(gguf_source(default_model), device="cpu", dtype="bfloat16")
    prompt = runtime.encode(chat("You are a shy and quiet person.", "A stranger sits down beside you. What do you do?"))
    (exchange,) = runtime.generate([prompt], max_new_tokens=24, repetition_penalty=1.1)
    decoded = decoded_activations(runtime, exchange)
    stats = runtime.activation_stats([exchange])
    differing = np.abs(stats.active - (decoded > 0).sum(1)).sum() / decoded.size
    assert differing < SIGNS_BFLOAT16
    assert len(runtime.decode(exchange.response)) > 20


def test_log_likelihoods_against_plain_sums(tiny_runtime):
    prompts = prompts_of(tiny_runtime)
    exchanges = [Exchange(prompts[0], (5, 9, 33)), Exchange(prompts[2], (40, 2)), Exchange(prompts[1], (7,))]
    for exchange, found in zip(exchanges, tiny_runtime.log_likelihoods(exchanges), strict=True):
        logits = tiny_runtime.logits(exchange.tokens).astype(np.float64)
        total = 0.0
        for position, token in enumerate(exchange.response, len(exchange.prompt) - 1):
            total += logits[position, token] - np.log(np.exp(logits[position]).sum())
        assert found == pytest.approx(total / len(exchange.response), abs=LOGITS_FLOAT32)


def test_a_model_without_a_chat_template_gets_plain_turns(make_tiny):
    runtime = TransformersRuntime(gguf_source(make_tiny(template=False)), device="cpu", dtype="float32")
    assert runtime.uses_fallback_template
    assert runtime.decode(runtime.encode(chat("Be kind.", "Who?"))) == "Be kind.\n\nUser: Who?\nAssistant:"


def test_a_template_that_refuses_system_turns(tiny_runtime, monkeypatch):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    monkeypatch.setattr(tiny_runtime.tokenizer, "chat_template", strict)
    assert tiny_runtime.decode(tiny_runtime.encode(chat("Be kind.", "Who?"))) == "Be kind.\n\nWho?"


def test_a_model_that_transformers_cannot_load(tiny, tmp_path):
    source = gguf_source(tiny)
    with pytest.raises(ModelError, match=r"gone.gguf: there is no such file"):
        TransformersRuntime(replace(source, path=tmp_path / "gone.gguf"), device="cpu")
    broken = replace(source, path=tmp_path / "broken.gguf")
    cut = source.path.read_bytes().replace(b"llama.attention.head_count", b"llama.attention.head_cuont")
    broken.path.write_bytes(cut)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        TransformersRuntime(broken, device="cpu")


@pytest.mark.parametrize("kind", ["Q1_0", "Q2_0"])
def test_types_that_transformers_cannot_load(make_tiny, kind):
    path = make_tiny(kind, hidden=256, width=512, layers=2)
    with pytest.raises(ModelError, match=rf"{kind}, which transformers cannot load; .* this file as --base"):
        TransformersRuntime(gguf_source(path), device="cpu", dtype="float32")


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("model_type", "scale"),
    [("llama", {}), ("granite", {"logits_scaling": 4.0}), ("gemma2", {"final_logit_softcapping": 2.0})],
)
def test_likelihoods_are_those_of_the_models_own_logits(tiny_runtime, tmp_path, monkeypatch, model_type, scale, limit):
    save_tiny(tmp_path / "model", model_type, tiny_runtime.tokenizer, **scale)
    runtime = TransformersRuntime(resolve_model(str(tmp_path / "model")), device="cpu", dtype="float32")
    if limit is not None:
        monkeypatch.setattr(transformers_runtime, "_LOGITS_BYTES", limit)
    prompts = prompts_of(runtime)
    exchanges = [
        Exchange(prompt, tuple(range(40, 40 + length))) for prompt, length in zip(prompts, (1, 9, 4), strict=True)
    ]
    want = []
    for exchange in exchanges:
        logits = runtime.logits(exchange.tokens).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start = len(exchange.prompt) - 1
        want.append(np.mean([log_p[start + at, token] for at, token in enumerate(exchange.response)]))
    np.testing.assert_allclose(runtime.log_likelihoods(exchanges), want, atol=LOGITS_FLOAT32)
    assert np.ptp(want) > 10 * LOGITS_FLOAT32


def test_a_batch_holds_what_fits_padding_included():
    some = [Exchange((1,) * prompt, (2,) * response) for prompt, response in ((10, 2), (4, 4), (10, 30), (5, 1))]
    sizes = lambda **limits: [len(batch) for batch in batches(some, **limits)]  # noqa: E731
    assert sizes() == [4]
    assert sizes(tokens=24) == [2, 1, 1]  # two of 12 tokens; one of 40 goes alone
    assert sizes(logits=18) == [2, 1, 1]  # two times 12 - 4 + 1
    assert sizes(logits=17) == [1, 1, 1, 1]


@pytest.mark.parametrize("where", ["gate_proj", "up_proj"])
def test_activations_that_are_no_numbers_are_refused_not_counted(tiny_runtime, where):
    """As of a model that overflows in float16: a profile of it would be refused when it is read."""
    broken = tiny_runtime.converted("float16")
    getattr(broken.layers[1].mlp, where).weight.data[5] = 6e4
    prompts = [one * 2 for one in prompts_of(broken)]
    with pytest.raises(ModelError, match="not numbers in float16; give --dtype bfloat16 or float32"):
        broken.observe(prompts, [0, 0, 1], max_new_tokens=4, repetition_penalty=1.0)
    with pytest.raises(ModelError, match="not numbers"):
        broken.activation_stats([Exchange(prompts[0][:-3], prompts[0][-3:])])


def test_a_stream_that_is_no_number_is_not_matched(tiny_runtime):
    broken = tiny_runtime.converted("float32")
    broken.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    recipe = load_recipe("matched", ["identify.matched_questions=2", "identify.max_new_tokens=3"])
    with pytest.raises(ProfileError, match="holds what is not a number"):
        match(broken, load_bench("openness"), "+", recipe, Silent())
