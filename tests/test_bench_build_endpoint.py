"""``bench build`` against endpoints that fail, over real HTTP."""

import asyncio
import subprocess
import sys
import time

import pytest
from openai_stub import Stub

from npti_export.errors import BenchError
from npti_export.generators.base import Request, UnavailableError, UnusableAnswerError
from npti_export.generators.endpoint import Endpoint, EndpointSettings
from npti_export.runtimes.base import chat

PROMPT = "Write 3 questions about tea. ... addressed as you. Nobody speaks of themselves as I."
REQUEST = Request(chat("You are a test.", PROMPT), 7, 200, 0.5)
KEY = "sk-test-0123456789"


def ask(stub, request=REQUEST, notes=None, **settings):
    settings = EndpointSettings(getattr(stub, "url", stub), "stub", **{"timeout": 10, "patience": 20, **settings})
    endpoint = Endpoint(settings, (notes if notes is not None else []).append)

    async def once():
        try:
            return await endpoint.answer(request)
        finally:
            await endpoint.close()

    return asyncio.run(once())


@pytest.fixture(scope="module")
def good():
    with Stub() as stub:
        answer = ask(stub)
    assert answer.text.count("?") == 3
    assert answer.tokens_in > 0 < answer.tokens_out
    return answer


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "cut", "json", "text", "empty", "types", "huge"])
def test_one_fault_is_got_over(fault, good):
    with Stub([fault]) as stub:
        assert ask(stub) == good
        assert stub.failed == [fault]
        assert stub.requests == 2


def test_retry_after_is_waited_for(good):
    with Stub(["429", "429"], retry_after="1.2") as stub:
        started = time.monotonic()
        assert ask(stub) == good
        assert 2.4 <= time.monotonic() - started < 8


def test_longer_outages_are_waited_for_and_said(good):
    """Beyond the library's two retries it is asked again, and the user told."""
    notes = []
    with Stub(["429"] * 4) as stub:
        assert ask(stub, notes=notes) == good
    assert len(notes) == 1
    assert "answers 429" in notes[0]
    assert "asked again in" in notes[0]


@pytest.mark.parametrize(
    ("fault", "why"), [("429", "answers 429"), ("reset", "cannot be reached"), ("hang", "no answer within 0.3 s")]
)
def test_patience_ends(fault, why):
    with Stub([fault] * 100) as stub, pytest.raises(UnavailableError, match=why):
        ask(stub, timeout=0.3, patience=0)


def test_a_body_that_never_ends():
    """Each byte comes in time, the whole does not."""
    with Stub(["drip"] * 100) as stub:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="no answer within"):
            ask(stub, timeout=0.3, patience=0)
        assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("fault", "why"),
    [("json", "broken JSON"), ("empty", "without a text"), ("types", "without a text"), ("text", "without a text"),
     ("huge", "longer than 1 MiB"), ("packed", "packs its answers")],
)  # fmt: skip
def test_worthless_answers_are_not_asked_for_for_ever(fault, why):
    with Stub([fault] * 100) as stub:
        with pytest.raises(UnusableAnswerError, match=why):
            ask(stub)
        assert stub.requests <= 9  # three tries, each with the library's two retries


@pytest.mark.parametrize(
    ("status", "hint"),
    [("400", "--omit"), ("401", "OPENAI_API_KEY"), ("404", "/v1"), ("422", "--omit"), ("403", "key")],
)
def test_refusals_are_final_and_say_what_to_do(status, hint):
    with Stub([status] * 100) as stub:
        with pytest.raises(BenchError, match=f"answers {status}.*{hint}") as raised:
            ask(stub)
        assert not isinstance(raised.value, (UnavailableError, UnusableAnswerError))
        assert stub.requests == 1


def test_the_key_is_sent_and_never_said(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    notes = []
    with Stub(["echo"]) as stub:
        stub.keep = True
        with pytest.raises(BenchError, match="answers 401") as raised:
            ask(stub, notes=notes, key_variable="MY_KEY")
        assert f"authorization: bearer {KEY}" in stub.headers[0].lower()
        settings = EndpointSettings(stub.url + "?key=abc", "stub", "MY_KEY")
        assert KEY not in f"{raised.value} {notes} {settings} {Endpoint(settings).about()}"
        assert "abc" not in str(Endpoint(settings).about())
        assert "***" in str(raised.value)


def test_a_key_in_the_clear_is_pointed_out(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    notes = []
    Endpoint(EndpointSettings("http://192.0.2.1/v1", "m", "MY_KEY"), notes.append)
    assert "unencrypted" in notes[0]
    Endpoint(EndpointSettings("http://127.0.0.1/v1", "m", "MY_KEY"), notes.append)
    Endpoint(EndpointSettings("https://192.0.2.1/v1", "m", "MY_KEY"), notes.append)
    assert len(notes) == 1


def test_fields_of_a_request():
    schema = {"type": "object"}
    with Stub() as stub:
        stub.keep = True
        ask(stub, Request(REQUEST.messages, 7, 200, 0.5, schema))
        ask(stub, omit=frozenset({"seed", "temperature", "max_tokens"}), extra={"max_completion_tokens": 9})
        full, lean = stub.bodies
    assert full["messages"][-1] == {"role": "user", "content": PROMPT}
    assert (full["seed"], full["temperature"], full["max_tokens"], full["model"]) == (7, 0.5, 200, "stub")
    assert full["response_format"]["json_schema"]["schema"] == schema
    assert lean.keys() == {"messages", "model", "max_completion_tokens"}


def test_a_cut_answer_says_so(good):
    with Stub(["long"]) as stub:
        answer = ask(stub)
    assert answer.cut
    assert not good.cut


@pytest.mark.parametrize("url", ["127.0.0.1:8080/v1", "ftp://host/v1", "http://", "http://user:secret@host/v1", ""])
def test_addresses_that_are_none(url):
    with pytest.raises(BenchError, match="give its address") as raised:
        Endpoint(EndpointSettings(url, "m"))
    assert "secret" not in str(raised.value)


def test_keys_that_are_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(BenchError, match="OPENAI_API_KEY: holds characters") as raised:
        Endpoint(EndpointSettings("http://127.0.0.1/v1", "m"))
    assert "a\nb" not in str(raised.value)


def test_nobody_there():
    with Stub() as stub:
        url = stub.url
    with pytest.raises(UnavailableError, match="cannot be reached"):
        ask(url, patience=0)


@pytest.mark.parametrize("missing", ["openai", "tenacity"])
def test_without_the_extra(missing, tmp_path):
    code = f"""import sys
sys.modules[{missing!r}] = None
from npti_export.cli import main
main()"""
    arguments = ["bench", "build", "extraversion", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--out", "o"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'npti-export[bench]'" in done.stderr
    assert "Traceback" not in done.stderr
