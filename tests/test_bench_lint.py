"""Lint finds each kind of weakness where it is, and nothing in benches that have none."""

import json
from pathlib import Path

import pytest
from own_trait import command, persona, question, write_jsonl, write_trait

from npti_export.bench import load_bench, shipped_folder
from npti_export.bench.lint import lint, unusable
from npti_export.errors import BenchError
from npti_export.traits import FACETS

PIRATE = Path(__file__).parents[1] / "examples" / "traits" / "pirate"


@pytest.mark.parametrize("trait", FACETS)
def test_the_shipped_bench_is_clean(trait):
    assert {one.severity for one in lint(trait, shipped_folder(trait))} <= {"note"}


def test_the_example_is_clean_and_large_enough():
    assert lint("pirate", PIRATE) == []
    bench = load_bench("pirate", PIRATE)
    assert len(bench.definition.facet_names) >= 3
    assert len(bench.split("search")) >= 60
    assert len(bench.split("test")) >= 24
    assert min(len(bench.pole(sign)) for sign in "+-") >= 24


@pytest.fixture
def lines():
    """Lines of a bench that has no weakness, to be spoilt."""
    read = {name: (PIRATE / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("personas", "questions")}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in read.items()}


def found(tmp_path, lines, check=None):
    folder = tmp_path / "pirate"
    folder.mkdir()
    (folder / "trait.toml").write_text((PIRATE / "trait.toml").read_text(encoding="utf-8"), encoding="utf-8")
    for name, items in lines.items():
        write_jsonl(folder / f"{name}.jsonl", items)
    findings = lint("pirate", folder)
    if check is not None:
        assert {one.check for one in findings} == {check}
    assert all(one.mend and one.text and one.path.parent == folder for one in findings)
    return [(one.severity, one.path.stem, one.line, one.text) for one in findings]


def test_too_few(tmp_path, lines):
    poles = [one for one in lines["personas"] if one["facet"] != "crew"][:10] + lines["personas"][-2:]
    lines["personas"] = poles
    lines["questions"] = [one for one in lines["questions"] if one["split"] == "search"][:8] + lines["questions"][-24:]
    says = [text for severity, _, _, text in found(tmp_path, lines) if severity == "warning"]
    assert "6 personas of pole +; the shipped traits have 84" in says
    assert "8 search questions; the shipped traits have 408" in says
    assert not any("test questions; the" in text for text in says)


def test_a_rare_facet(tmp_path, lines):
    crew = [one for one in lines["personas"] if one["facet"] == "crew" and one["pole"] == "+"]
    lines["personas"] = [one for one in lines["personas"] if one not in crew[:4]]
    assert found(tmp_path, lines, "imbalance") == [
        ("warning", "personas", 0, "personas of pole +: facet 'sea talk' has 6, 'crew' only 2")
    ]


def test_rare_topics_and_persons(tmp_path, lines):
    for one in lines["questions"]:
        one["person"] = "second"
        if one["topic"] == "food" and one["split"] == "search":
            one["topic"] = "work"
    lines["questions"][0]["topic"] = "food"
    says = found(tmp_path, lines, "imbalance")
    assert ("note", "questions", 0, "search questions: topic 'work' has 13, 'food' only 1") in says
    assert sum("first and third person in less than 10%" in text for *_, text in says) == 2


def test_repeats_worst_between_splits(tmp_path, lines):
    questions = lines["questions"]
    questions[70]["text"] = "Tomorrow " + questions[3]["text"]
    questions[12]["text"] = questions[5]["text"]
    lines["personas"][1]["text"] = lines["personas"][2]["text"]
    says = found(tmp_path, lines, "repeats")
    kinds = {(file, line): text for severity, file, line, text in says if severity == "warning"}
    assert len(kinds) == len(says) == 3
    assert "a search question repeats a test one" in kinds["questions", 4]
    assert "in line 71" in kinds["questions", 4]
    assert "100% of its runs of three words are in line 6" in kinds["questions", 13]
    assert kinds["personas", 3].endswith("in line 2, too, of the other pole")


def test_leaks(tmp_path, lines):
    lines["questions"][1]["text"] = "A neighbour comes to your party as a Pirate. What do you say to her at the door?"
    lines["questions"][2]["text"] = "The captain of your team is late again today. How do you go on without her?"
    lines["questions"][3]["text"] = "My sister finds me too businesslike for a party. What do you think I should do?"
    lines["questions"][4]["text"] = "My cousin has pirated a film and wants to show it. Would you come and watch?"
    assert [(severity, line, text[:18]) for severity, _, line, text in found(tmp_path, lines, "leaks")] == [
        ("warning", 2, "names 'pirate': 'A"),
        ("warning", 3, "names 'captain': '"),
        ("note", 4, "holds 'businesslik"),
    ]


def test_form_and_length(tmp_path, lines):
    lines["questions"][1]["text"] = "Your bicycle has been standing in the rain for two whole weeks by now."
    lines["questions"][2]["text"] = "Why?"
    lines["questions"][3]["text"] = "Somebody asks. " * 30 + "What do you say?"
    lines["personas"][4]["text"] = lines["personas"][4]["text"].replace("You", "I").replace("you", "me")
    says = {(file, line): text for _, file, line, text in found(tmp_path, lines)}
    assert says["questions", 2].startswith("asks nothing")
    assert says["questions", 3].startswith("1 words")
    assert says["questions", 4].startswith("64 words")
    assert says["personas", 5].startswith("does not speak to 'you'")
    assert len(says) == 4


@pytest.mark.parametrize("asks", ["Describe your evening.", "Now tell me why.", '"Explain yourself," she says.'])
def test_a_request_is_as_good_as_a_question(tmp_path, lines, asks):
    lines["questions"][1]["text"] = f"The lights have gone out in the whole street once more. {asks}"
    assert found(tmp_path, lines) == []


def test_poles_of_unlike_length(tmp_path, lines):
    for one in lines["personas"]:
        if one["pole"] == "-":
            one["text"] = " ".join(one["text"].split()[:25])
    says = found(tmp_path, lines, "lengths")
    assert says[0][:3] == ("warning", "personas", 0)
    assert "- 25" in says[0][3]


def test_untagged(tmp_path, lines):
    for one in lines["questions"]:
        del one["topic"]
    del lines["personas"][6]["facet"]
    assert found(tmp_path, lines, "untagged") == [
        ("note", "personas", 7, "1 of 48 without 'facet', the first of them here"),
        ("note", "questions", 1, "84 of 84 without 'topic', the first of them here"),
    ]


def test_unusable(tmp_path):
    personas = [persona("+", "PLACEHOLDER: You are …"), {"pole": "+"}]
    folder = write_trait(tmp_path / "x", "calm", personas=personas, questions=[question("test", "Why?", facet="none")])
    findings = lint("calm", folder)
    assert unusable(findings)
    errors = [(one.check, one.path.name, one.line) for one in findings if one.severity == "error"]
    assert errors == [
        ("line", "personas.jsonl", 2),
        ("line", "questions.jsonl", 1),
        ("name", "trait.toml", 0),
        ("placeholder", "personas.jsonl", 1),
        ("missing", "personas.jsonl", 0),
        ("missing", "questions.jsonl", 0),
        ("missing", "questions.jsonl", 0),
    ]
    assert [one.severity for one in findings] == sorted(
        (one.severity for one in findings), key=["error", "warning", "note"].index
    )


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trait(tmp_path / "pirate")
    assert command("bench", "lint", "./pirate", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed[0]["severity"] == "warning"
    assert printed[0]["file"].endswith("personas.jsonl")
    assert printed[0]["text"] == "2 personas of pole +; the shipped traits have 84"
    assert command("bench", "lint", PIRATE) == 0
    assert capsys.readouterr().out == "pirate: nothing to mend\n"
    write_trait(tmp_path / "empty", personas=[])
    assert command("bench", "lint", "empty") == 2
    out = capsys.readouterr().out
    assert "error empty/personas.jsonl: is empty" in out
    with pytest.raises(BenchError, match=r"trait\.toml: not valid TOML"):
        (tmp_path / "pirate" / "trait.toml").write_text("[")
        command("bench", "lint", "./pirate")
