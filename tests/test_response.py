"""Steering the response only: decoded tokens, with KV cache and padded batches, by PEFT and by attachment."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tolerances
import torch
from conftest import random_rule
from peft import PeftModel
from plain_rule import logits, plain_rule
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import npti_export
from npti_export.adapter.config import NptiConfig
from npti_export.errors import AdapterError
from npti_export.export.peft import write_adapter
from npti_export.rule_io import SavedRule

PROMPTS = torch.arange(5, 29).reshape(2, 12)
MASK = torch.ones_like(PROMPTS)
MASK[0, :5] = 0
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="session")
def rule():
    return random_rule(3, 96, seed=3)


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()


def slowly(model, rule, prompts, mask, steps):
    """Greedy decoding by whole passes without a cache; the rule on what was decoded so far, never on the prompt."""
    ids = prompts
    for _ in range(steps):
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, prompts.shape[1] :] = True
        whole = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        with plain_rule(model, rule, rows):
            step = logits(model, ids, attention_mask=whole, position_ids=positions)[:, -1].argmax(-1)
        ids = torch.cat([ids, step[:, None]], dim=1)
    return ids


@pytest.fixture(params=["peft", "transformers", "attach"])
def steer(request, model, make_adapter, rule, provenance, tmp_path):
    """Puts the rule into the model, for the response only, in one of three ways."""

    def apply():
        if request.param == "attach":
            npti_export.attach(model, make_adapter(rule), where="response")
            return model
        write_adapter(SavedRule(rule, provenance, "response"), tmp_path)
        if request.param == "peft":
            return PeftModel.from_pretrained(model, tmp_path)
        model.load_adapter(str(tmp_path))
        return model

    return apply


def test_generation_steers_what_it_decodes(model, steer, rule):
    want = slowly(model, rule, PROMPTS, MASK, 6)
    base = model.generate(input_ids=PROMPTS, attention_mask=MASK, **GREEDY)
    with plain_rule(model, rule):
        everywhere = model.generate(input_ids=PROMPTS, attention_mask=MASK, **GREEDY)
    steered = steer()
    got = steered.generate(input_ids=PROMPTS, attention_mask=MASK, **GREEDY)
    assert torch.equal(got, want)
    assert not torch.equal(got, base)
    assert not torch.equal(got, everywhere)
    assert torch.equal(got[:, 12], base[:, 12])  # the first token follows from the prompt alone
    for more in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5, "cache_implementation": "static", "disable_compile": True},
    ):
        assert torch.equal(steered.generate(input_ids=PROMPTS, attention_mask=MASK, **GREEDY, **more), want), more
    draft = copy.deepcopy(model)
    for more in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        alone = steered.generate(input_ids=PROMPTS[:1, 5:], attention_mask=MASK[:1, 5:], **GREEDY, **more)
        assert torch.equal(alone[0, 7:], want[0, 12:]), more


def test_a_loop_of_ones_own(model, steer, rule):
    want = slowly(model, rule, PROMPTS, MASK * 0 + 1, 4)
    steered = steer()
    cache, ids, given = None, PROMPTS, PROMPTS
    for _ in range(4):
        with torch.inference_mode():
            out = steered(input_ids=given, past_key_values=cache, use_cache=True)
        cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, given], dim=1)
    assert torch.equal(ids, want)


def test_scoring_a_given_answer(model, steer, rule):
    """Rows of one batch may have answers at different places."""
    rows = torch.zeros_like(PROMPTS, dtype=torch.bool)
    rows[0, 4:9], rows[1, 7:] = True, True
    base = logits(model, PROMPTS)
    with plain_rule(model, rule, rows):
        want = logits(model, PROMPTS)
    steered = steer()
    assert torch.equal(logits(steered, PROMPTS), base)
    with npti_export.response_mask(steered, rows):
        got = logits(steered, PROMPTS)
        with pytest.raises(AdapterError, match=r"mask is \[2, 12\]"):
            logits(steered, PROMPTS[:, :5])
    assert (got - want).abs().max() < tolerances.ADAPTER_FLOAT32
    assert (got - base).abs().max() > 0.01
    assert torch.equal(logits(steered, PROMPTS), base)


def test_a_second_turn_that_continues_the_cache(model, steer, rule):
    """What the user adds is a prompt again, also when the cache holds the first turn."""
    steered = steer()
    cache = StaticCache(config=model.config, max_cache_len=64)
    options = {**GREEDY, "disable_compile": True}
    first = steered.generate(input_ids=PROMPTS, past_key_values=cache, **options)
    second_prompt = torch.cat([first, PROMPTS[:, :5]], dim=1)
    second = steered.generate(input_ids=second_prompt, past_key_values=cache, **options)
    ids, cached = second_prompt, first.shape[1] - 1  # the last decoded token was never fed
    for _ in range(6):
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, 12:cached] = True
        rows[:, second_prompt.shape[1] :] = True
        with plain_rule(model, rule, rows):
            step = logits(model, ids)[:, -1].argmax(-1)  # it calls the activation inside the wrapper
        ids = torch.cat([ids, step[:, None]], dim=1)
    assert torch.equal(second, ids)


def test_a_copy_follows_itself(model, steer):
    steered = steer()
    twin = copy.deepcopy(steered)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin.generate(input_ids=PROMPTS, **GREEDY), steered.generate(input_ids=PROMPTS, **GREEDY))


def test_compiled(model, steer, rule):
    rows = torch.zeros_like(PROMPTS, dtype=torch.bool)
    rows[:, 6:] = True
    with plain_rule(model, rule, rows):
        want = logits(model, PROMPTS)
    steered = steer()
    compiled = torch.compile(steered, backend="eager")
    with npti_export.response_mask(steered, rows):
        assert (logits(compiled, PROMPTS) - want).abs().max() < tolerances.ADAPTER_FLOAT32
    torch.compiler.reset()


def test_both_places_at_once(model, make_adapter, rule):
    """One rule everywhere, another on the response: there they compose."""
    other = random_rule(3, 96, seed=4)
    rows = torch.zeros_like(PROMPTS, dtype=torch.bool)
    rows[:, 6:] = True
    with npti_export.attach(model, make_adapter(other)):
        everywhere = logits(model, PROMPTS)
        with npti_export.attach(model, make_adapter(rule), where="response"), npti_export.response_mask(model, rows):
            mixed = logits(model, PROMPTS)
    with npti_export.attach(model, make_adapter(other)), npti_export.attach(model, make_adapter(rule)):
        both = logits(model, PROMPTS)
    assert torch.equal(mixed[:, :6], everywhere[:, :6])
    assert not torch.equal(mixed[:, 6:], everywhere[:, 6:])
    assert not torch.equal(mixed[:, 6:], both[:, 6:])  # the prompt's keys and values differ


def test_the_model_is_as_before_after_detaching(model, make_adapter, rule):
    before = model.generate(input_ids=PROMPTS, **GREEDY)
    attached = npti_export.attach(model, make_adapter(rule), where="response")
    second = npti_export.attach(model, make_adapter(rule), where="response")
    assert not torch.equal(model.generate(input_ids=PROMPTS, **GREEDY), before)
    second.detach()
    assert "generate" in vars(model)
    attached.detach()
    attached.detach()
    assert "generate" not in vars(model)
    assert not model.model._forward_pre_hooks
    assert torch.equal(model.generate(input_ids=PROMPTS, **GREEDY), before)


@pytest.mark.parametrize("way", ["unload", "delete_adapter"])
def test_peft_lets_go_of_the_model(model, rule, provenance, tmp_path, way):
    write_adapter(SavedRule(rule, provenance, "response"), tmp_path)
    own = model.generate = lambda **options: type(model).generate(model, **options)  # somebody's own wrapper
    before = model.generate(input_ids=PROMPTS, **GREEDY)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    assert not torch.equal(adapted.generate(input_ids=PROMPTS, **GREEDY), before)
    if way == "unload":
        adapted.unload()
    else:
        adapted.delete_adapter("default")
    assert model.generate is own
    assert not model.model._forward_pre_hooks
    assert torch.equal(model.generate(input_ids=PROMPTS, **GREEDY), before)


def test_threads(model, make_adapter, rule):
    """Prompts of different lengths at the same time."""
    prompts = [PROMPTS[:1, : 4 + 2 * index] for index in range(4)] * 4
    options = {**GREEDY, "max_new_tokens": 12}
    with npti_export.attach(model, make_adapter(rule), where="response"):
        one_by_one = [model.generate(input_ids=ids, **options) for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda ids: model.generate(input_ids=ids, **options), prompts))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))


def test_a_cache_given_by_position(model, make_adapter, rule):
    with npti_export.attach(model, make_adapter(rule), where="response"), torch.inference_mode():
        states = []
        for by_name in (True, False):
            cache = DynamicCache(config=model.config)
            model.model(PROMPTS[:, :-1], past_key_values=cache)
            last = PROMPTS[:, -1:]
            given = {"past_key_values": cache} if by_name else {}
            states.append(model.model(last, *(() if by_name else (None, None, cache)), **given).last_hidden_state)
    assert torch.equal(*states)


def test_attaching_after_a_masked_pass(model, make_adapter, rule):
    rows = torch.ones_like(PROMPTS, dtype=torch.bool)
    rows[:, :3] = False
    with npti_export.attach(model, make_adapter(rule), where="response"):
        with npti_export.response_mask(model, rows):
            logits(model, PROMPTS)
        with npti_export.attach(model, make_adapter(random_rule(3, 96, seed=4)), where="response"):
            model.generate(input_ids=PROMPTS, use_cache=False, **GREEDY)
        npti_export.attach(model, make_adapter(rule)).detach()


def test_passes_of_which_it_cannot_be_told(model, make_adapter, rule):
    with npti_export.attach(model, make_adapter(rule), where="response"):
        with pytest.raises(AdapterError, match="continuous batching"):
            model.model(input_ids=PROMPTS, cache=object())
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(AdapterError, match="gradient checkpointing"):
            model(input_ids=PROMPTS, labels=PROMPTS)


def test_what_cannot_be_meant(model, make_adapter, rule):
    with pytest.raises(AdapterError, match="give 'all' or 'response'"):
        npti_export.attach(model, make_adapter(rule), where="prompt")
    with pytest.raises(AdapterError, match="give 'all' or 'response'"):
        NptiConfig(where="prompt")
    with (
        pytest.raises(AdapterError, match="nothing in this model"),
        npti_export.response_mask(model, torch.ones(1, 1)),
    ):
        pass
