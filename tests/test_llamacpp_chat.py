"""Chats as tokens in llama.cpp, against transformers' tokenizer of the same file."""

import pytest
from families import write_tiny

from npti_export.bench import load_bench
from npti_export.errors import ModelError
from npti_export.identify.collect import contrast_prompts
from npti_export.recipe import load_recipe
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

TEXTS = [
    "Hi",
    "  two  spaces, a\ttab and\n\nnew lines \n",
    "Grüße, 你好, 👩‍👩‍👧 and e\u0301",
    "<|im_end|>\n<|im_start|>system\nspelt out",
    "It's 12,345.678 (don't) <|notatoken|> {{ messages }} {% x %}",
]


@pytest.fixture(scope="module")
def runtime(tiny):
    with LlamaCppRuntime(tiny) as opened:
        yield opened


@pytest.fixture
def with_template(tokenizer_fields, tmp_path):
    """with_template(text) -> the tiny model with that chat template."""

    def opened(template):
        path = write_tiny(tmp_path / "templated.gguf", {**tokenizer_fields, "template": template})
        return LlamaCppRuntime(path)

    return opened


def test_tokens_of_a_tiny_model_are_those_of_transformers(runtime, tiny_runtime):
    for system in (None, "You are calm.", TEXTS[2]):
        for text in TEXTS:
            messages = chat(system, text)
            assert runtime.encode(messages) == tiny_runtime.encode(messages)
    recipe, bench = load_recipe("npti"), load_bench("openness")
    questions = bench.search(4, 0)
    for sign in "+-":
        found = contrast_prompts(runtime, bench, questions, sign, recipe)
        assert found == contrast_prompts(tiny_runtime, bench, questions, sign, recipe)
        assert len(set(found)) == 4


def test_tokens_of_the_default_model_are_those_of_transformers(default_model):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    recipe, bench = load_recipe("npti"), load_bench("extraversion")
    with LlamaCppRuntime(default_model) as ours:
        for sign in "+-":
            for tokens in contrast_prompts(ours, bench, bench.search(3, 0), sign, recipe):
                text = theirs.decode(tokens)
                assert text.startswith("<|im_start|>system")
                assert tuple(theirs(text, add_special_tokens=False)["input_ids"]) == tokens
        for text in TEXTS:
            messages = chat("You are calm.", text)
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = ours.encode(messages)
            assert tokens == tuple(theirs(rendered, add_special_tokens=False)["input_ids"])
            assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_not_in_the_text_and_pieces_of_characters_come_together(runtime, tiny_runtime):
    tokens = tiny_runtime.tokenizer("né 👩‍👩‍👧", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 8  # the tokenizer is cut: a character takes several tokens
    assert runtime.decode(tokens) == "né 👩‍👩‍👧"
    assert runtime.decode([1, *tokens, 2, 0]) == "né 👩‍👩‍👧"
    assert runtime.decode(tokens[:2]) == tiny_runtime.decode(tokens[:2]) == "n\ufffd"
    assert runtime.decode([]) == ""
    long = tokens * 400  # more than the buffer of the first try
    assert runtime.decode(long) == "né 👩‍👩‍👧" * 400


def test_a_file_without_a_template_gets_plain_turns(make_tiny):
    with LlamaCppRuntime(make_tiny(template=False)) as runtime:
        assert runtime.uses_fallback_template
        assert runtime.decode(runtime.encode(chat("Be kind.", "Who?"))) == "Be kind.\n\nUser: Who?\nAssistant:"


def test_a_template_that_refuses_system_turns(with_template):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    with with_template(strict) as runtime:
        assert not runtime.uses_fallback_template
        assert runtime.decode(runtime.encode(chat("Be kind.", "Who?"))) == "Be kind.\n\nWho?"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[5]['content'] }}", "no element 5"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("", "cannot tokenize"),
    ],
)
def test_a_template_that_fails_on_a_question_is_named(with_template, template, says):
    with with_template(template or "{# nothing #}") as runtime, pytest.raises(ModelError, match=says) as found:
        runtime.encode(chat("Be kind.", "Who?"))
    assert "templated.gguf" in str(found.value)


def test_a_template_that_is_none_is_named(with_template):
    with pytest.raises(ModelError, match=r"templated.gguf: its chat template .* cannot be read: .*endfor"):
        with_template("{% for x in messages %}")
