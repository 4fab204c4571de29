"""``bench build`` with a real model: llama-cpp-python's own server, and the same file without a server.

A model of 135M parameters writes poor questions. What is tested is that everything it wrote is accounted for.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from jobs import COMMAND

from npti_export import cli
from npti_export.bench.making.parse import read_items
from npti_export.generators.base import Request
from npti_export.models import gguf_source
from npti_export.runtimes.base import chat

SIZES = ("--search", "3", "--test", "1", "--per-request", "2", "--rounds", "1", "--words", "5-60", "--max-tokens", "60")


@contextmanager
def served(model, folder):
    """llama_cpp.server with the model; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--host", "127.0.0.1", "--port", port]
    command += [
        "--n_ctx",
        "2048",
        "--n_threads",
        "1",
        "--n_threads_batch",
        "1",
        "--model_alias",
        "smol",
        "--logits_all",
        "false",
    ]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([str(one) for one in command], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text(errors="replace")[-2000:]
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def build(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "build", "extraversion", "--json", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return ended.value.code, json.loads(printed.out)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_accounts(out, code, report, *, model):
    kept, rejected = lines(out / "questions.jsonl"), lines(out / "rejected.jsonl")
    answers = lines(out / "work" / "answers.jsonl")
    assert code == (0 if report["complete"] else 5)
    assert report["answers"] == len(answers) == 4
    assert report["unusable_answers"] < len(answers)
    assert sum(report["kept"].values()) == len(kept)
    assert sum(report["rejected"].values()) == len(rejected)
    assert sum(cell["lacks"] for cell in report["short"]) == 4 - len(kept)
    assert report["items"] == len(kept) + len(rejected) > 4
    asked = {item["source"]["order"] for item in (*kept, *rejected)}
    written = {answer["order"]: read_items(answer["text"], 2) for answer in answers}
    assert asked == {order for order, items in written.items() if items}
    for item in (*kept, *rejected):
        assert item["source"]["model"] == model
        assert item["text"] in written[item["source"]["order"]]
    # About 350 tokens a prompt, and never more than was asked for.
    assert 4 * 200 < report["tokens"]["in"] < 4 * 800
    assert 4 * 5 < report["tokens"]["out"] <= 4 * 60


def test_llama_cpp_server(default_model, tmp_path, capsys):
    out = tmp_path / "out"
    with served(default_model, tmp_path) as url:
        given = ("--endpoint", url, "--model", "smol", "--out", out, *SIZES, "--keep-rejected", "--concurrency", "2")
        code, report = build(capsys, *given)
        check_accounts(out, code, report, model="smol")
        again = build(capsys, *given)[1]
        assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_a_file_without_a_server(default_model, tmp_path, capsys):
    out = tmp_path / "out"
    given = ("--out", out, *SIZES, "--keep-rejected", "--concurrency", "3", "--threads", "1")
    code, report = build(capsys, *given)
    check_accounts(out, code, report, model=default_model.name)
    assert report["generator"]["file"] == default_model.name
    assert build(capsys, *given)[1]["answers"] == 4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_decodes(how, tmp_path, cli_environment):
    """The thread that decodes is waited for: nothing is freed under it, and the same command goes on."""
    out = tmp_path / "out"
    command = [
        *COMMAND,
        "bench",
        "build",
        "extraversion",
        "--out",
        out,
        "--concurrency",
        "2",
        "--max-tokens",
        "2000",
        "--threads",
        "1",
    ]
    with subprocess.Popen([str(one) for one in command], env=cli_environment, stderr=subprocess.PIPE) as process:
        while not (out / "work" / "answers.jsonl").exists():  # the model is loaded by then
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(how)
        started = time.monotonic()
        said = process.communicate(timeout=180)[1].decode()
    assert process.returncode == 130, said
    assert "goes on" in said
    assert "Traceback" not in said
    assert time.monotonic() - started < 30
    assert (out / "build.json").exists()


def test_a_model_on_this_machine_draws_by_seed(default_model):
    """The same seed gives the same text, another one another; temperature 0 gives the greedy text."""
    import asyncio

    from npti_export.generators.local import LocalModel
    from npti_export.runtimes.llamacpp.context import Settings

    messages = chat("You are a helpful assistant.", "Name a town.")
    model = LocalModel(gguf_source(default_model), Settings(threads=1), 2)

    async def texts():
        async def one(seed, temperature):
            return (await model.answer(Request(messages, seed, 12, temperature))).text

        try:
            return [await one(*given) for given in ((1, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (1, 0.0), (2, 0.0))]
        finally:
            await model.close()

    first, same, other, third, greedy, greedy_too = asyncio.run(texts())
    assert first == same
    assert len({first, other, third}) > 1
    assert greedy == greedy_too


def test_sampling_is_min_p_then_temperature():
    """Frequencies against the probabilities that the definition gives, within five standard errors."""
    from npti_export.runtimes.llamacpp.sampling import MIN_P, Sampler

    logits = np.array([2.0, 1.0, 0.0, -1.5, 2.0 + np.log(MIN_P) + 0.01], np.float32)
    draw, count = Sampler(0.7, 5), 20_000
    found = np.bincount([draw(logits) for _ in range(count)], minlength=5) / count
    kept = np.exp(logits - 2.0) >= MIN_P
    want = np.where(kept, np.exp(logits.astype(float) / 0.7), 0)
    want /= want.sum()
    assert kept.tolist() == [True, True, True, False, True]
    assert found[3] == 0
    assert np.all(np.abs(found - want) < 5 * np.sqrt(want * (1 - want) / count) + 1e-12)
    assert Sampler(0.0, 5)(logits) == 0


@pytest.mark.parametrize("name", ["nowhere.gguf", "."])
def test_models_that_are_none(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "build", "extraversion", "--model", name, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(rf"{re.escape(os.fspath(name))}", said)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
