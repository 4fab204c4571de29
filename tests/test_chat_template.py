"""Chat templates come with models, and are programs: they are kept from harm, and from going on for ever."""

import json
import time

import pytest

from npti_export import chat_template
from npti_export.chat_template import LONGEST_PROMPT, check_prompt, check_template
from npti_export.errors import ModelError
from npti_export.runtimes.base import FALLBACK_TEMPLATE
from npti_export.template_trial import environment

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Much of what templates in use do: tools, dates, macros, namespaces, a system turn that is refused.
RICH = """\
{%- macro shout(text) %}{{ text | upper }}{% endmacro %}
{%- set ns = namespace(seen=0) %}{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}
{%- for message in messages %}{% set ns.seen = ns.seen + 1 %}
{%- if loop.index0 % 2 != 0 and message.role == 'user' %}{{ raise_exception('turns') }}{% endif %}
{{ shout(message.role) }}: {{ message['content'].split('x')[-1].strip() }}{% if loop.last %}{% break %}{% endif %}
{%- endfor %}{{ strftime_now('%Y') }}{{ tools | tojson }}{% generation %}!{% endgeneration %}
"""
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "memory": "{{ ('a' * 99999999999)[:1] }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "format": "{{ '{:99999999999}'.format(1)[:1] }}",
    "doubling": "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "nested": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
    "{{ ns.a }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filter": "{{ 'a' | center(99999999999) | length }}",
    "content": "{% for a in messages[0].content * 999 %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WAITING = [
    "messages[-1]['content']|length > 40", "messages[-1]['content']|length > 4000", "messages|length > 8",
    "messages[0].role != 'system' and messages|length > 3", "messages[0].role == 'system' and messages|length > 3",
    "messages[0].role == 'system' and messages[0].content|length > 1000", "'```' in messages[-1].content",
    "messages|map(attribute='content')|join|length > 20000", "messages[-3] and messages[-2].content|length > 30",
]  # fmt: skip
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[100] }}",
    "{{ cycler.__init__.__globals__.os.popen('echo owned').read() }}",
    "{{ self._TemplateReference__context.eval_ctx.environment }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ ''['__cl' ~ 'ass__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('' | string).format_map({'x': 1}).__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ strftime_now.__self__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", [CHATML, RICH, FALLBACK_TEMPLATE, "", "{{ broken", "{% for %}", "\x00\ud7ff"])
def test_templates_in_use_and_broken_ones_are_left_to_their_renderer(template):
    check_template(template, "m.gguf")


def test_simple_templates_need_no_process(monkeypatch):
    def refuse(template):
        raise AssertionError(template)

    monkeypatch.setattr(chat_template, "_tried", refuse)
    chat_template._kept_limits.cache_clear()
    for template in (CHATML, FALLBACK_TEMPLATE):
        check_template(template, "m.gguf")
    for template in (RICH, *ENDLESS.values()):
        assert not chat_template._is_plain(template), template


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_refused(name):
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"^m\.gguf: its chat template takes more than") as error:
        check_template(ENDLESS[name], "m.gguf")
    assert time.monotonic() - started < 2 * chat_template._PATIENCE
    assert "gguf_new_metadata.py" in str(error.value)


@pytest.mark.parametrize("condition", WAITING)
def test_templates_that_wait_for_a_longer_chat_are_refused(condition):
    with pytest.raises(ModelError, match=r"^m\.gguf: its chat template takes more than"):
        check_template(f"{{% if {condition} %}}{LOOP}{{% endif %}}{CHATML}", "m.gguf")


def test_what_is_tried():
    chats = chat_template._chats()
    assert all(chat[-1]["role"] == "user" for chat in chats)
    assert len({json.dumps(chat) for chat in chats}) == len(chats)
    lengths = [sum(len(one["content"]) for one in chat) for chat in chats]
    assert (min(lengths) < 20, max(lengths) > 20_000) == (True, True)
    assert {chat[0]["role"] for chat in chats} == {"user", "system"}
    started = time.process_time()
    for chat in chats:
        environment().from_string(CHATML).render(messages=chat)
    assert time.process_time() - started < chat_template.SECONDS / 2


def test_long_ones_too():
    with pytest.raises(ModelError, match="1048577 characters"):
        check_template("x" * (LONGEST_PROMPT + 1), "m.gguf")
    with pytest.raises(ModelError, match="of a question"):
        check_prompt("x" * (LONGEST_PROMPT + 1), "m.gguf")
    assert check_prompt("x", "m.gguf") == "x"


def renderers():
    """Both runtimes' own ways to render, and the trial's."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def theirs(template, messages):
        return Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")(messages=messages).prompt

    def transformers(template, messages):
        from transformers.utils.chat_template_utils import render_jinja_template

        found, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        return found[0]

    def trial(template, messages):
        return environment().from_string(template).render(messages=messages, strftime_now=print, raise_exception=print)

    return {"llama.cpp": theirs, "transformers": transformers, "trial": trial}


@pytest.mark.parametrize("runtime", ["llama.cpp", "transformers", "trial"])
def test_no_template_gets_out_of_the_sandbox(runtime):
    render = renderers()[runtime]
    assert "USER: HI" in render("{{ messages[0].role | upper }}: {{ messages[0].content | upper }}", chat())
    for template in ESCAPES:
        messages = chat()
        try:
            text = render(template, messages)
        except Exception as error:
            text = str(error)
            assert type(error).__name__ != "AssertionError"
        assert messages == chat()
        for secret in ("subprocess", "Popen", "root:", "owned\n", "<class 'str'>", "'__builtins__'", "<module"):
            assert secret not in text, (template, text)


def chat():
    return [{"role": "user", "content": "hi"}]
