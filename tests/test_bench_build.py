"""``npti-export bench build`` as a user runs it, against a server on this machine: what comes out, and going on."""

import contextlib
import itertools
import json
import random
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter

import pytest
from jobs import COMMAND, npti
from openai_stub import Stub, reply

from npti_export import cli
from npti_export.bench import load_bench
from npti_export.bench.making.folder import Folder
from npti_export.bench.overlap import LIMIT, near_duplicates

SIZES = ("--search", "300", "--test", "60", "--per-request", "5")
KEY = "sk-test-0123456789"


def arguments(stub, out, *more, sizes=SIZES):
    given = ["bench", "build", "extraversion", "--endpoint", stub.url, "--model", "stub", "--out", out, *sizes, *more]
    return [str(one) for one in given]


@pytest.fixture
def run(capsys):
    """run(stub, out, ...) -> exit code, report or None, what was said."""

    def call(stub, out, *more, sizes=SIZES):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments(stub, out, *more, sizes=sizes), "--json"])
        printed = capsys.readouterr()
        return ended.value.code, json.loads(printed.out) if printed.out else None, printed.err

    return call


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain_grams(text):
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(itertools.pairwise(itertools.pairwise(words)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The questions of a build that nothing disturbs, and how many requests it takes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with Stub(bad=0.2) as stub:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments(stub, out))
        assert ended.value.code == 0
        return (out / "questions.jsonl").read_bytes(), stub.requests


def test_what_comes_out(run, tmp_path, monkeypatch):
    """Counts add up, cells have their quotas, no two items are alike, and each says which request it came from."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "out"
    with Stub(bad=0.3, share=0.02) as stub:
        stub.keep = True
        code, report, said = run(stub, out, "--keep-rejected", "--price-in", "2", "--price-out", "4")
    items, rejected = lines(out / "questions.jsonl"), lines(out / "rejected.jsonl")
    assert code == 0
    assert report == json.loads((out / "build.json").read_text(encoding="utf-8"))
    assert report["complete"]
    assert report["short"] == []
    assert report["kept"] == {"search": 300, "test": 60} == Counter(item["split"] for item in items)
    assert Counter(item["rule"] for item in rejected) == report["rejected"]
    assert {"format", "duplicate"} <= report["rejected"].keys()
    assert report["items"] == len(items) + len(rejected)
    tokens = report["tokens"]
    assert report["cost"] == pytest.approx((2 * tokens["in"] + 4 * tokens["out"]) / 1e6, abs=1e-4) != 0
    cells = Counter((item["facet"], item["topic"], item["person"]) for item in items)
    assert len(cells) == 6 * 14 * 3
    assert max(cells.values()) <= 3  # 300 of 252 cells have one or two, 60 have none or one
    for one, other in itertools.combinations([plain_grams(item["text"]) for item in items], 2):
        assert len(one & other) <= LIMIT * min(len(one), len(other))
    bodies = {body["seed"]: body for body in stub.bodies}
    for item in (*items, *rejected):
        body = bodies[item["source"]["seed"]]
        assert item["text"] in reply(body, 0.3)
        assert item["topic"] in body["messages"][-1]["content"]
        assert item["source"].keys() == {"model", "prompt", "seed", "order", "temperature"}
    assert list(items[0]) == ["split", "facet", "topic", "person", "text", "source"]
    assert KEY not in said
    assert all(KEY.encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_the_same_answers_give_the_same_bench(run, tmp_path, reference):
    with Stub(bad=0.2, share=0.05, delay=0.005) as stub:
        assert run(stub, tmp_path / "out", "--concurrency", "3")[0] == 0
        assert stub.failed
    assert (tmp_path / "out" / "questions.jsonl").read_bytes() == reference[0]
    with Stub(bad=0.2) as stub:
        assert run(stub, tmp_path / "other", "--seed", "1")[0] == 0
    assert (tmp_path / "other" / "questions.jsonl").read_bytes() != reference[0]


def test_killed_at_any_moment_it_goes_on(tmp_path, reference, cli_environment):
    """The union is that of an undisturbed build, byte by byte, and only requests in flight are asked again."""
    rng, out, kills = random.Random(3), tmp_path / "out", 0
    with Stub(bad=0.2, delay=0.05) as stub:
        command = [*COMMAND, *arguments(stub, out, "--concurrency", "4")]
        for _ in range(5):
            with subprocess.Popen(command, env=cli_environment, stderr=subprocess.DEVNULL) as process:
                before = stub.requests
                stub.hold = before + 12  # it cannot be done before it is killed, however late that is
                while stub.requests == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.6))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
        stub.hold = None
        assert kills == 5
        assert 0 < stub.requests < reference[1]
        done = subprocess.run(command, env=cli_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert reference[1] <= stub.requests <= reference[1] + 4 * kills
        assert (out / "questions.jsonl").read_bytes() == reference[0]
        asked = stub.requests
        assert subprocess.run(command, env=cli_environment, capture_output=True).returncode == 0
        assert stub.requests == asked
    orders = [line["order"] for line in lines(out / "work" / "answers.jsonl")]
    assert len(orders) == len(set(orders)) == reference[1]


def test_interrupted_it_writes_what_it_has(tmp_path, reference, cli_environment):
    out = tmp_path / "out"
    with Stub(bad=0.2, delay=0.05) as stub:
        with subprocess.Popen(
            [*COMMAND, *arguments(stub, out)], env=cli_environment, stderr=subprocess.PIPE, text=True
        ) as process:
            stub.hold = 40
            while stub.requests < 40:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=180)[1]
        assert process.returncode == 130
        assert "goes on" in said
        assert "Traceback" not in said
        some = (out / "questions.jsonl").read_bytes()
        assert reference[0].startswith(some)
        assert not json.loads((out / "build.json").read_text(encoding="utf-8"))["complete"]
        stub.hold = None
        assert npti(*arguments(stub, out), environment=cli_environment, cwd=tmp_path).returncode == 0
    assert (out / "questions.jsonl").read_bytes() == reference[0]


def test_a_torn_last_line_is_asked_again(run, tmp_path, reference):
    out = tmp_path / "out"
    journal = out / "work" / "answers.jsonl"
    with Stub(bad=0.2) as stub:
        run(stub, out)
        whole = journal.read_bytes()
        for index in (out / "work").glob("index*"):
            index.unlink()
        journal.write_bytes(whole[:-30])
        asked = stub.requests
        code, report, said = run(stub, out)
        assert (code, stub.requests) == (0, asked + 1)
        assert "had not been written whole" in said
        assert report["answers"] == reference[1]
        assert (out / "questions.jsonl").read_bytes() == reference[0]
        assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_damaged_files_are_named(run, tmp_path, reference):
    out = tmp_path / "out"
    work = out / "work"
    with Stub(bad=0.2) as stub:
        run(stub, out)
        index, journal = work / "index.sqlite", work / "answers.jsonl"
        index.write_bytes(b"not a database " * 500)
        code, _, said = run(stub, out)
        assert (code, "is damaged" in said, "delete it" in said) == (2, True, True)
        index.unlink()
        asked = stub.requests
        assert run(stub, out)[0] == 0  # made again from the answers, without asking for any
        assert stub.requests == asked
        assert (out / "questions.jsonl").read_bytes() == reference[0]
        index.unlink()
        whole = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*whole[:4], b'{"order": "x"}\n', *whole[5:]]))
        code, _, said = run(stub, out)
        assert (code, "answers.jsonl:5: is damaged; delete this line" in said) == (2, True)
        journal.write_bytes(b"".join([*whole[:4], *whole[5:]]))
        assert run(stub, out)[0] == 0
        assert stub.requests == asked + 1
        assert (out / "questions.jsonl").read_bytes() == reference[0]
        (work / "plan.json").unlink()
        code, _, said = run(stub, out)
        assert (code, "plan.json: is missing" in said) == (2, True)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE item SET text = replace(text, 'a', 'b') WHERE id = 7",
        "UPDATE item SET text = CAST(X'61ff62' AS TEXT) WHERE id = 7",
        "DELETE FROM item WHERE id = (SELECT MAX(id) FROM item)",
        "UPDATE taken SET count = count + 1",
        "UPDATE state SET value = value - 1 WHERE key = 'done'",
        "PRAGMA user_version = 0",
    ],
)
def test_an_index_that_holds_other_values_is_not_believed(run, tmp_path, reference, damage):
    """To SQLite it is as good as before."""
    out, sizes = tmp_path / "out", ("--search", "12", "--test", "6", "--per-request", "6")
    index = out / "work" / "index.sqlite"
    with Stub() as stub:
        assert run(stub, out, sizes=sizes)[0] == 0
        whole = (out / "questions.jsonl").read_bytes()
        with contextlib.closing(sqlite3.connect(index)) as database, database:
            database.execute(damage)
        code, _, said = run(stub, out, sizes=sizes)
        assert (code, "is damaged" in said, "delete it" in said) == (2, True, True), said
        assert (out / "questions.jsonl").read_bytes() == whole
        index.unlink()
        assert run(stub, out, sizes=sizes)[0] == 0
    assert (out / "questions.jsonl").read_bytes() == whole


def test_another_plan_is_refused(run, tmp_path):
    out = tmp_path / "out"
    with Stub() as stub:
        assert run(stub, out)[0] == 0
        before = (out / "questions.jsonl").read_bytes()
        for changed in (("--seed", "4"), ("--model", "other"), ("--search", "301"), ("--words", "9-80"), ("--judge",)):
            code, _, said = run(stub, out, *changed)
            assert code == 2
            assert "was begun with another plan" in said
        assert "seed was 0, is 4" in run(stub, out, "--seed", "4")[2]
        assert (out / "questions.jsonl").read_bytes() == before
        assert run(stub, out, "--seed", "4", "--force")[0] == 0
        assert (out / "questions.jsonl").read_bytes() != before
        assert len(lines(out / "questions.jsonl")) == 360


def test_one_process_at_a_time(tmp_path, cli_environment):
    from npti_export.bench.definition import read_definition
    from npti_export.bench.making.plan import Plan

    bench = cli.__file__.replace("cli/__init__.py", "bench")
    plan = Plan(
        "questions", read_definition(Folder(tmp_path).root.joinpath(bench, "data", "openness")), (("a", 1),), "m"
    )
    with Stub() as stub, Folder(tmp_path / "out").opened(plan, force=False):
        done = npti(*arguments(stub, tmp_path / "out"), environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 2
        assert "another process is building there" in done.stderr
        assert stub.requests == 0


def test_folders_with_other_things_are_left_alone(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with Stub() as stub:
        code, _, said = run(stub, tmp_path, "--force")
        assert (code, "thesis.txt" in said) == (2, True)
        code, _, said = run(stub, tmp_path / "thesis.txt")
        assert (code, "is a file" in said) == (2, True)
        code, _, said = run(stub, tmp_path / "no" / "out")
        assert (code, "does not exist" in said) == (2, True)
        assert stub.requests == 0


def test_it_says_what_is_short_and_goes_on_with_more_rounds(run, tmp_path):
    out = tmp_path / "out"
    with Stub(bad=1.0) as stub:
        code, report, _ = run(stub, out, "--rounds", "2")
        assert stub.requests == report["answers"] <= 2 * 252
    assert code == 5
    assert not report["complete"]
    kept = sum(report["kept"].values())
    assert sum(cell["lacks"] for cell in report["short"]) == 360 - kept > 300
    assert report["short"][0].keys() == {"facet", "topic", "person", "split", "lacks"}
    assert len(lines(out / "questions.jsonl")) == kept
    with Stub() as stub:
        code, report, _ = run(stub, out, "--rounds", "6")
    assert (code, report["complete"], sum(report["kept"].values())) == (0, True, 360)


def test_an_endpoint_that_goes_away(run, tmp_path, reference):
    out = tmp_path / "out"
    with Stub([None] * 30 + ["reset"] * 1000, bad=0.2) as stub:
        code, _, said = run(stub, out, "--patience", "0")
    assert (code, "cannot be reached" in said) == (2, True)
    some = (out / "questions.jsonl").read_bytes()
    assert some
    assert reference[0].startswith(some)
    with Stub(bad=0.2) as stub:
        assert run(stub, out)[0] == 0
        assert stub.requests <= reference[1] - 30 + 8
    assert (out / "questions.jsonl").read_bytes() == reference[0]


def test_answers_without_a_text_do_not_go_on_for_ever(run, tmp_path):
    with Stub(["null"] * 1000) as stub:
        code, _, said = run(stub, tmp_path / "out")
        assert stub.requests < 60
    assert (code, "25 answers in a row" in said, "--max-tokens" in said) == (2, True, True)


def test_characters_that_no_file_should_hold(run, tmp_path):
    out = tmp_path / "out"
    with Stub(["surrogate"] * 20) as stub:
        code, report, said = run(stub, out, "--keep-rejected")
        assert code == 0
        # Another run takes the answers from the journal, and must read the same in them.
        for index in (out / "work").glob("index*"):
            index.unlink()
        asked, before = stub.requests, (out / "rejected.jsonl").read_bytes()
        assert run(stub, out, "--keep-rejected")[0] == 0
        assert stub.requests == asked
    assert (out / "rejected.jsonl").read_bytes() == before
    assert report["rejected"]["format"] >= 20
    assert "\x1b" not in said
    assert "control or invisible characters" in {item["fault"] for item in lines(out / "rejected.jsonl")}


def test_a_judge_of_its_own(run, tmp_path):
    sizes = ("--search", "40", "--test", "0")
    with Stub() as stub, Stub() as judge:
        judge.keep = True
        more = ("--judge", "--judge-endpoint", judge.url, "--judge-model", "wise", "--keep-rejected")
        code, report, _ = run(stub, tmp_path / "out", *more, sizes=sizes)
        assert code == 0
        assert report["judge"]["endpoint"] == judge.url
        assert {body["model"] for body in judge.bodies} == {"wise"}
        assert report["requests"] == stub.requests + judge.requests
        assert judge.bodies[0]["response_format"]["type"] == "json_schema"
    kept, rejected = lines(tmp_path / "out" / "questions.jsonl"), lines(tmp_path / "out" / "rejected.jsonl")
    assert len(kept) == 40
    assert all(len(item["text"]) % 3 > 0 for item in kept)  # what the stub's judge goes by
    judged = [item for item in rejected if item["rule"] == "judge"]
    assert len(judged) == report["rejected"]["judge"] > 0
    assert all(len(item["text"]) % 3 == 0 for item in judged)
    assert kept[0]["source"]["judge"] == "wise"


def test_a_judge_that_says_nothing_lets_nothing_through(run, tmp_path):
    with Stub() as stub, Stub(["json"] * 1000) as judge:
        more = ("--judge", "--judge-endpoint", judge.url, "--judge-model", "broken", "--rounds", "1", "--keep-rejected")
        code, report, _ = run(stub, tmp_path / "out", *more, sizes=("--search", "4", "--test", "0"))
    assert (code, report["kept"]) == (5, {})
    faults = {item["fault"] for item in lines(tmp_path / "out" / "rejected.jsonl")}
    assert "the judge gave no clear verdict" in faults


def test_personas(run, tmp_path):
    out = tmp_path / "out"
    with Stub(bad=0.1) as stub:
        code, report, _ = run(stub, out, "--what", "personas", sizes=("--personas", "50"))
    assert (code, report["kept"]) == (0, {"+": 50, "-": 50})
    items = lines(out / "personas.jsonl")
    assert list(items[0]) == ["pole", "facet", "text", "source"]
    counts = Counter((item["pole"], item["facet"]) for item in items)
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) == 1


def test_what_is_built_is_a_bench(run, tmp_path):
    """Questions and personas in one folder, read by the loader that identification uses, and clean to the linter."""
    bench, other = tmp_path / "bench", tmp_path / "personas"
    with Stub() as stub:
        assert run(stub, bench)[0] == 0
        assert run(stub, other, "--what", "personas", sizes=("--personas", "12"))[0] == 0
        (other / "personas.jsonl").rename(bench / "personas.jsonl")
        loaded = load_bench("extraversion", bench)
        assert len(loaded.questions) == 360
        assert len(loaded.personas) == 24
        assert near_duplicates([question.text for question in loaded.questions]) == []
        # A file that somebody made by hand is not replaced unasked.
        (other / "questions.jsonl").write_text("mine", encoding="utf-8")
        for path in (other / "work").iterdir():
            path.unlink()
        code, _, said = run(stub, other)
        assert (code, "questions.jsonl: is there already" in said) == (2, True)
        assert (other / "questions.jsonl").read_text(encoding="utf-8") == "mine"
        assert run(stub, bench, "--force")[0] == 0
    assert load_bench("extraversion", bench).personas == loaded.personas


def test_a_dry_run_asks_nothing_and_is_about_right(run, tmp_path):
    out, prices = tmp_path / "out", ("--price-in", "1", "--price-out", "1")
    with Stub() as stub:
        code, plan, _ = run(stub, out, *prices, "--dry-run")
        assert code == 0
        assert not stub.requests
        assert not out.exists()
        report = run(stub, out, *prices)[1]
        assert plan["items"] == 360
        assert plan["requests"] == plan["orders"] == 252
        assert plan["requests"] <= stub.requests <= plan["requests_at_most"]
    # The stub counts four letters a token and writes about 22 words an item, of 8 to 80 allowed.
    assert plan["tokens"]["in"] / 1.2 < report["tokens"]["in"] < 1.2 * plan["tokens"]["in"]
    assert plan["tokens"]["out"] / 4 < report["tokens"]["out"] < plan["tokens"]["out"]
    assert plan["cost"] == pytest.approx(sum(plan["tokens"].values()) / 1e6, abs=1e-4)


def test_a_trait_of_ones_own_in_the_folder_that_defines_it(capsys, tmp_path):
    toml = """name = "pirate"
description = "How much somebody lives like a pirate."
poles.high = { name = "swashbuckling", description = "Somebody loud and bold who lives for plunder." }
poles.low = { name = "landlubbing", description = "Somebody orderly who stays ashore." }
facets = [{ name = "boldness", high = "Takes what is there", low = "Asks first" }]
"""
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate" / "trait.toml").write_text(toml, encoding="utf-8")
    folder = str(tmp_path / "pirate")
    with Stub() as stub, pytest.raises(SystemExit) as ended:
        stub.keep = True
        more = ["--endpoint", stub.url, "--model", "stub", "--search", "50", "--test", "10"]
        cli.main(["bench", "build", folder, "--out", folder, *more])
    assert ended.value.code == 0, capsys.readouterr().err
    assert {item["facet"] for item in lines(tmp_path / "pirate" / "questions.jsonl")} == {"boldness"}
    assert all("swashbuckling" in body["messages"][-1]["content"] for body in stub.bodies)
    assert (tmp_path / "pirate" / "trait.toml").read_text(encoding="utf-8") == toml


def test_topics_of_ones_own_and_the_printed_table(tmp_path, capsys):
    (tmp_path / "topics.txt").write_text("sailing\nchess\n", encoding="utf-8")
    more = ("--topics", tmp_path / "topics.txt", "--price-in", "1")
    with Stub(bad=0.2) as stub, pytest.raises(SystemExit) as ended:
        cli.main(arguments(stub, tmp_path / "out", *more))
    assert ended.value.code == 0
    assert {item["topic"] for item in lines(tmp_path / "out" / "questions.jsonl")} == {"sailing", "chess"}
    printed = capsys.readouterr()
    assert re.search(r"kept, search +300", printed.out)
    assert re.search(r"rejected, format +\d", printed.out)
    assert re.search(r"cost +0\.\d\d", printed.out)
    assert "kept 360 of 360" in printed.err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--words", "80-8"), "fewest and the most"),
        (("--personas", "3"), "--what personas"),
        (("--what", "personas", "--judge"), "--what questions"),
        (("--judge-model", "m"), "--judge"),
        (("--extra", "top_p=x"), "--extra"),
        (("--threads", "2"), "local model"),
        (("--search", "0", "--test", "0"), "ask for 1 to"),
        (("--topics", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_sentences(run, tmp_path, more, complaint):
    with Stub() as stub:
        code, report, said = run(stub, tmp_path / "out", *more)
        assert (code, report, stub.requests) == (2, None, 0)
    assert complaint in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["extraversion", "--endpoint", "http://127.0.0.1:1/v1"], "no --model"),
        (["./no/such"], "there is no such folder"),
        (["extraversion", "--timeout", "3"], "--endpoint"),
        (["grumpiness", "--model", "m", "--endpoint", "http://127.0.0.1:1/v1"], "grumpiness"),
        (["extraversion", "--model", "m", "--endpoint", "127.0.0.1:1"], "give its address"),
    ],
)
def test_mistakes_without_a_server(given, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "build", *given, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (ended.value.code, complaint in said) == (2, True), said
