"""Chats: answers that stream, two histories, what fits, what reaches the terminal; and the command."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rule
from jobs import COMMAND, npti
from rich.console import Console
from test_bake import bake

from npti_export import chat_view
from npti_export.chat import Conversation, LlamaVoice, Partner, Sampling, open_conversation
from npti_export.errors import ModelError
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.terminal import printable

GREEDY = Sampling(temperature=0, max_new_tokens=12)


def opened(path, **settings):
    return LlamaCppRuntime(path, Settings(threads=1, **settings), listens=False)


@pytest.fixture(scope="module")
def steered(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "s.gguf"
    bake(tiny, out, random_rule(3, 96))
    return out


def said(pieces, count=1):
    texts = [""] * count
    for piece in pieces:
        texts[piece.partner] += piece.text
    return texts


def test_answers_are_those_of_plain_decoding(tiny, steered):
    settings = Settings(threads=1, context=512)
    with open_conversation(steered, None, GREEDY, settings=settings, system="Be calm.", alone=False) as conversation:
        assert [partner.name for partner in conversation.partners] == ["base", "steered"]
        answers = [said(conversation.ask(text), 2) for text in ("Hi", "And why?")]
    for index, path in enumerate((tiny, steered)):
        turns = [{"role": "system", "content": "Be calm."}]
        with opened(path) as runtime:
            for text, answer in zip(("Hi", "And why?"), answers, strict=True):
                turns.append({"role": "user", "content": text})
                whole = runtime.answer(turns, max_new_tokens=12, repetition_penalty=1.0)
                assert answer[index] == printable(whole)
                turns.append({"role": "assistant", "content": whole})
    assert answers[1][0] != answers[1][1]


def test_sampling_is_seeded(tiny):
    with opened(tiny, context=512) as runtime:
        ask = lambda seed: said(Conversation([Partner("m", LlamaVoice(runtime))], Sampling(2.0, seed, 10)).ask("Hi"))  # noqa: E731
        assert ask(1) == ask(1) != ask(2)


class Echo:
    """Says a letter for every token; a token a character."""

    room = 60

    def __init__(self, answer="abc"):
        self.answer, self.prompts = answer, []

    def encode(self, messages):
        return tuple(ord(one) for message in messages for one in message["content"])

    def speak(self, prompt, sampling, seed):
        self.prompts.append("".join(map(chr, prompt)))
        yield from self.answer


def test_models_take_turns_and_have_their_own_history():
    voices = [Echo("ab"), Echo("xyz")]
    conversation = Conversation([Partner("one", voices[0]), Partner("two", voices[1])], Sampling(max_new_tokens=5), "S")
    assert [(one.partner, one.text) for one in conversation.ask("Q")] == [
        (0, "a"),
        (1, "x"),
        (0, "b"),
        (1, "y"),
        (1, "z"),
    ]
    assert said(conversation.ask("R"), 2) == ["ab", "xyz"]
    assert [voice.prompts for voice in voices] == [["SQ", "SQabR"], ["SQ", "SQxyzR"]]
    assert conversation.to_dict()["turns"][1] == {"user": "R", "answers": {"one": "ab", "two": "xyz"}}
    conversation.reset("T")
    said(conversation.ask("Q"), 2)
    assert voices[0].prompts[-1] == "TQ"


def test_a_stopped_answer_stays_in_the_history():
    voice = Echo()
    conversation = Conversation([Partner("one", voice)], Sampling(max_new_tokens=5))
    stream = conversation.ask("Q")
    next(stream)
    stream.close()
    said(conversation.ask("R"))
    assert voice.prompts[-1] == "QaR"


class Stopped(Echo):
    """Is interrupted before its first word, or while its prompt is made, as long as that is wanted."""

    where = None

    def encode(self, messages):
        if self.where == "prompt":
            raise KeyboardInterrupt
        return super().encode(messages)

    def speak(self, prompt, sampling, seed):
        if self.where == "answer":
            raise KeyboardInterrupt
        yield from super().speak(prompt, sampling, seed)


@pytest.mark.parametrize("where", ["prompt", "answer", "other"])
def test_a_question_that_nobody_began_to_answer_leaves_the_history(where):
    voices = [Stopped("ab"), Stopped("xy")]
    voices[1 if where == "other" else 0].where = "prompt" if where == "other" else where
    conversation = Conversation([Partner("a", voices[0]), Partner("b", voices[1])], Sampling(max_new_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        said(conversation.ask("Q"), 2)
    assert [partner.turns for partner in conversation.partners] == [[], []]
    for voice in voices:
        voice.where = None
    assert said(conversation.ask("R"), 2) == ["ab", "xy"]
    assert [voice.prompts for voice in voices] == [["R"], ["R"]]
    assert conversation.to_dict()["turns"] == [{"user": "R", "answers": {"a": "ab", "b": "xy"}}]
    assert said(conversation.ask("S"), 2) == ["ab", "xy"]


def test_a_model_that_says_nothing_was_asked_all_the_same():
    conversation = Conversation([Partner("a", Echo(""))], Sampling(max_new_tokens=5))
    assert said(conversation.ask("Q")) == [""]
    assert conversation.to_dict()["turns"] == [{"user": "Q", "answers": {"a": ""}}]


def test_oldest_turns_are_dropped():
    voice = Echo()
    conversation = Conversation([Partner("one", voice)], Sampling(max_new_tokens=30), "SY")
    for number in range(6):
        said(conversation.ask(f"question {number}"))
    assert voice.prompts[1] == "SYquestion 0abcquestion 1"
    assert voice.prompts[-1] == "SYquestion 4abcquestion 5"
    assert conversation.dropped == 8
    with pytest.raises(ModelError, match="takes 52 tokens and an answer up to 30, more than the 60"):
        said(conversation.ask("w" * 50))
    assert len(conversation.to_dict()["turns"]) == 6  # it was never asked
    said(conversation.ask("short"))
    assert voice.prompts[-1].endswith("short")


def test_a_long_chat_in_a_small_context(tiny):
    with opened(tiny, context=256) as runtime:
        conversation = Conversation([Partner("m", LlamaVoice(runtime))], GREEDY)
        for number in range(8):
            said(conversation.ask(f"Question number {number}, please, and a few words more."))
        last = conversation.partners[0].prompt(None, GREEDY)
        assert conversation.dropped > 0
        assert len(last) + 12 <= 256


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a\tb\nc é 漢 🙂", "a\tb\nc é 漢 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\r\x08\x7f", "\\x9b31m\\r\\x08\\x7f"),
        ("\u202egnirts\u2069", "\\u202egnirts\\u2069"),
        ("\ud800", "\\ud800"),
    ],
)
def test_nothing_in_a_text_acts_on_the_terminal(text, want):
    assert printable(text) == want


@pytest.mark.parametrize("width", [120, 50])
def test_both_answers_are_seen(width):
    console = Console(width=width, height=20, force_terminal=True, file=io.StringIO(), record=True, highlight=False)
    voices = [Echo("[red]\x1b[2Jfirst" + " word" * 200), Echo("second")]
    for voice in voices:
        voice.room = 100
    conversation = Conversation([Partner("base", voices[0]), Partner("steered", voices[1])], Sampling(max_new_tokens=5))
    lines = iter(["  ", "/what", "Q", "/reset", "/system T", "Q", "x" * 200, "/quit", "never"])
    chat_view.talk(conversation, console, lambda: next(lines))
    assert next(lines) == "never"
    text = console.export_text()
    assert "[red]\\x1b[2Jfirst" in text
    assert text.count("word") >= 400
    assert "\x1b" not in text
    beside = any("base" in line and "steered" in line for line in text.split("\n"))
    assert beside == (width == 120)
    assert voices[0].prompts == ["Q", "TQ"]
    assert "shorten it" in " ".join(text.split())


def test_ctrl_c_and_ctrl_d(tmp_path):
    class Stops(Echo):
        def speak(self, prompt, sampling, seed):
            yield "half"
            raise KeyboardInterrupt

    console = Console(width=80, file=io.StringIO(), record=True)
    conversation = Conversation([Partner("m", Stops())], Sampling(max_new_tokens=5))

    def lines():
        yield "Q"
        yield KeyboardInterrupt
        yield f"/save {tmp_path / 'c.json'}"
        yield f"/save {tmp_path / 'c.json'}"
        yield EOFError

    script = lines()

    def ask():
        line = next(script)
        if not isinstance(line, str):
            raise line
        return line

    chat_view.talk(conversation, console, ask)
    text = " ".join(console.export_text().split())
    assert "half stopped" in text
    assert "Ctrl-D or /quit leaves" in text
    assert "exists already; choose another name" in text
    assert json.loads((tmp_path / "c.json").read_text())["turns"] == [{"user": "Q", "answers": {"m": "half"}}]


def test_the_command(steered, tiny, cli_environment, tmp_path):
    """The base that a steered file holds answers like the file that it was baked from."""
    options = [
        "--message",
        "Hi",
        "--message",
        "Why?",
        "--json",
        "--temperature",
        0,
        "--max-new-tokens",
        8,
        "--threads",
        1,
    ]
    environment = {**cli_environment, "TMPDIR": str(tmp_path)}
    found = [
        npti("chat", steered, *options, *more, environment=environment, cwd=tmp_path)
        for more in ([], ["--compare", tiny])
    ]
    assert [one.returncode for one in found] == [0, 0], found[0].stderr
    assert json.loads(found[0].stdout) == json.loads(found[1].stdout)
    turns = json.loads(found[0].stdout)["turns"]
    assert [turn["user"] for turn in turns] == ["Hi", "Why?"]
    assert set(turns[0]["answers"]) == {"base", "steered"}
    assert list(tmp_path.iterdir()) == []  # the restored base is gone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json"], "give a --message"),
        (["--alone", "--compare", "x.gguf"], "give one of the two"),
    ],
)
def test_wrong_usage(arguments, said):
    from click.testing import CliRunner

    from npti_export.cli.chat import chat

    result = CliRunner().invoke(chat, ["m.gguf", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_directories_are_refused(tmp_path):
    opening = open_conversation(tmp_path, None, GREEDY, settings=Settings(), system=None, alone=True)
    with pytest.raises(ModelError, match="export it with --format gguf"), opening:
        pass


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal(steered, cli_environment, tmp_path):
    """Streaming, Ctrl-C while it answers, another question, and SIGTERM, which leaves nothing behind."""
    master, slave = os.openpty()
    environment = {**cli_environment, "TMPDIR": str(tmp_path), "TERM": "xterm"}
    command = [*COMMAND, "chat", str(steered), "--threads", "1", "--max-new-tokens", "3000", "--context", "4096"]
    seen = bytearray()

    def wait_for(text):
        end = time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            if select.select([master], [], [], 1)[0]:
                seen.extend(os.read(master, 65536))
        assert text in seen, bytes(seen[-400:])
        del seen[: seen.index(text) + len(text)]

    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=tmp_path, start_new_session=True
    )
    try:
        wait_for(b"> ")
        os.write(master, b"Hi\n")
        wait_for(b"steered")
        os.kill(process.pid, signal.SIGINT)
        wait_for(b"stopped")
        wait_for(b"> ")
        assert len(list(Path(tmp_path).iterdir())) == 1
        # CPython's readline does not notice a signal between its writing the prompt and its waiting for a line.
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:  # leaving, it waits for its last words to be read
            if select.select([master], [], [], 0.1)[0]:
                os.read(master, 65536)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
    assert list(tmp_path.iterdir()) == []


def test_pieces_join_to_the_whole_answer(tiny):
    """Characters that are spread over tokens come out whole."""
    with opened(tiny, context=512) as runtime:
        tokens = runtime.encode_text("né 漢字 🙂!", begin=False)
        script = iter([*tokens, next(one for one in range(600) if runtime.chat.is_end(one))])
        voice = LlamaVoice(runtime)
        pieces = list(voice._speaker.speak((1, 5, 9), max_new_tokens=90, choose=lambda _logits: next(script)))
    assert "".join(pieces) == "né 漢字 🙂!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) < len(tokens)


def test_logits_that_are_no_numbers(tiny, monkeypatch):
    from npti_export.runtimes.llamacpp.context import Context

    with opened(tiny, context=512) as runtime:
        monkeypatch.setattr(Context, "decode", lambda _self, _rows: np.full((1, 9), np.nan, np.float32))
        with pytest.raises(ModelError, match="not numbers"):
            list(LlamaVoice(runtime).speak((1, 2), GREEDY, 0))


def test_a_name_that_no_file_can_have_ends_no_conversation():
    console = Console(width=200, file=io.StringIO(), record=True)
    conversation = Conversation([Partner("m", Echo())], Sampling(max_new_tokens=5))
    lines = iter(["/save ~nobody-is-called-so/c.json", f"/save {'x' * 300}", "/quit"])
    chat_view.talk(conversation, console, lambda: next(lines))
    text = " ".join(console.export_text().split())
    assert "~nobody-is-called-so/c.json: Could not determine home directory.; choose another name" in text
    assert f"{'x' * 300}: cannot be written (File name too long)" in text.replace("x x", "xx")


def test_what_is_typed_may_be_no_utf8(monkeypatch):
    from npti_export.cli import main

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(SystemExit):
        main(["traits"])
    assert sys.stdin.readline() == "caf\ufffd\n"
