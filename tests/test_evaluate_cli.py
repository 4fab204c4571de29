"""``npti-export evaluate``: what it writes, what it prints, and what it refuses in one line."""

import json

import pytest
from evaluations import bake, saved_rule, small_trait, strong_rule
from jobs import npti

from npti_export.evaluate.card import section
from npti_export.evaluate.document import read_document
from npti_export.files import sha256_file

QUICK = ["--questions", "2", "--answer-tokens", "4", "--personas", "1", "--baselines", "none", "--no-prompts"]
QUICK += ["--threads", "1"]
SKIPS = ["--skip", "inventory", "--skip", "capability", "--skip", "cross-talk"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A steered file, and the folder of its trait."""
    folder = tmp_path_factory.mktemp("evaluate")
    bake(tiny, folder / "m.gguf", saved_rule(tiny, strong_rule()))
    small_trait(folder / "pirate")
    return folder


def evaluate(*arguments, environment, folder, skips=SKIPS):
    options = [*QUICK, *skips, "--trait-dir", "pirate"]
    return npti("evaluate", *options, *arguments, environment=environment, cwd=folder)


def test_the_figures_go_into_a_card(folder, cli_environment):
    card = folder / "card.md"
    card.write_text("# Mine\n")
    done = evaluate("m.gguf", "--card", "card.md", "--json", "c.json", environment=cli_environment, folder=folder)
    assert done.returncode == 0, done.stderr
    assert card.read_text(encoding="utf-8") == f"# Mine\n\n{section(read_document(folder / 'c.json'))}\n"
    assert "wrote card.md" in done.stdout
    for name, words in (("card.txt", "ends in .md"), ("c.md", "is named for something else")):
        done = evaluate("m.gguf", "--card", name, "--html", "c.md", environment=cli_environment, folder=folder)
        assert refused(done, "--card", words)


def refused(done, *words):
    """In one line, with exit code 2, and nothing left half-written."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("npti-export:")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line
    return True


def test_it_writes_what_it_prints(folder, cli_environment):
    done = evaluate("m.gguf", "--json", "r.json", "--html", "r.html", environment=cli_environment, folder=folder)
    assert done.returncode == 0, done.stderr
    document = read_document(folder / "r.json")
    assert {"inventory", "judge", "cross_talk", "baselines"} <= set(json.loads((folder / "r.json").read_text()))
    assert (document.inventory, document.judge, document.cross_talk, document.baselines) == (None, None, None, {})
    steered = document.conditions[1]
    for shown in ("pirate+", "Unsteered", f"{steered.contrast.mean:+.3f}", f"{steered.gain.low:+.3f}", "KL"):
        assert shown in done.stdout
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "Steered" in page
    assert "wrote r.json" in done.stdout
    assert document.artifact["sha256"] == sha256_file(folder / "m.gguf")
    written = [(folder / name).read_bytes() for name in ("r.json", "r.html")]
    again = evaluate("m.gguf", "--json", "new.json", "--html", "r.html", environment=cli_environment, folder=folder)
    assert refused(again, "r.html", "--force")
    assert not (folder / "new.json").exists()
    forced = evaluate(
        "m.gguf", "--json", "r.json", "--force", "--seed", "1", environment=cli_environment, folder=folder
    )
    assert forced.returncode == 0, forced.stderr
    assert read_document(folder / "r.json").settings["seed"] == 1
    assert (folder / "r.html").read_bytes() == written[1]


def test_refused_before_any_work(folder, tiny, cli_environment, monkeypatch):
    def never(*_more, **_given):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("npti_export.loader.Models.fast", never)
    monkeypatch.setattr("npti_export.loader.Models.llama", never)
    (folder / "there.json").write_text("precious")
    before = sorted(folder.iterdir())
    for arguments, words in (
        (("m.gguf", "--json", "there.json"), ("there.json", "--force")),
        (("m.gguf", "--html", "nowhere/r.html"), ("nowhere",)),
        (("m.gguf", "--json", "x", "--html", "./x"), ("two outputs",)),
        (("m.gguf", "--json", "m.gguf", "--force"), ("is an input of this very job",)),
        (("m.gguf", "--json", "pirate/x.json"), ("is an input of this very job",)),
        (("m.gguf", "--baselines", "null,magic"), ("'magic'", "mean-shift", "fine-tuned")),
        (("m.gguf", "--trait", "calm"), ("--trait calm", "pirate+")),
        (("m.gguf", "--trait", "sailor+"), ("sailor",)),
        (("m.gguf", "--questions", "9"), ("9 test questions", "has 4")),
        (("m.gguf", "--inventory", "none.csv"), ("none.csv",)),
        (("m.gguf", "--tasks", "none.jsonl"), ("none.jsonl",)),
        (("m.gguf", "--judge", "nonsense"), ("nonsense",)),
        (("m.gguf", "--inventory", "x.csv", "--skip", "inventory"), ("x.csv", "left out by --skip inventory")),
        (("m.gguf", "--tasks", "x.jsonl", "--skip", "capability"), ("x.jsonl", "left out by --skip capability")),
        (("m.gguf", "--judge-journal", "j"), ("--judge-journal", "no --judge")),
        (("m.gguf", "--judge-max-tokens", "9"), ("--judge-max-tokens", "give --judge URL=MODEL")),
        (("m.gguf", "--judge", "http://h/v1=m", "--judge-extra", "top_p"), ("--judge-extra top_p", "top_p=0.9")),
        (("m.gguf", "--judge", "http://h/v1=m", *("--judge-key-env", "A") * 2), ("2 for 1 judges",)),
        (("m.gguf", "--baselines", "null,null"), ("null", "twice")),
        (("none.gguf",), ("none.gguf", "no such file")),
        (("pirate",), ("pirate", "not an output of ours")),
        ((tiny,), ("holds no steering rule", "--trait", "--base")),
    ):
        assert refused(evaluate(*arguments, environment=cli_environment, folder=folder, skips=()), *words)
    assert sorted(folder.iterdir()) == before
    assert (folder / "there.json").read_text() == "precious"


def test_a_page_that_fails_leaves_nothing_of_it(folder, cli_environment, monkeypatch):
    from npti_export.errors import EvaluationError

    def fails(_document):
        raise EvaluationError("no picture of this")

    monkeypatch.setattr("npti_export.report_page.page.render_page", fails)
    done = evaluate("m.gguf", "--json", "k.json", "--html", "k.html", environment=cli_environment, folder=folder)
    assert refused(done, "no picture of this")
    assert read_document(folder / "k.json").traits == ["pirate+"]  # what was measured is not lost
    assert [one.name for one in folder.iterdir() if one.name.startswith(("k.", ".k"))] == ["k.json"]


def test_a_file_of_somebody_else(folder, tiny, make_tiny, cli_environment):
    theirs = make_tiny(seed=1)
    arguments = (theirs, "--base", tiny, "--trait", "./pirate+", "--json", "theirs.json", "--html", "theirs.html")
    done = npti("evaluate", *arguments, *QUICK, *SKIPS, environment=cli_environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert read_document(folder / "theirs.json").layers == []
    assert "<html" in (folder / "theirs.html").read_text(encoding="utf-8")
