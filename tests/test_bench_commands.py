"""``npti-export bench``: what the commands print, refuse and leave behind."""

import json
from pathlib import Path

import click
import pytest
from own_trait import command, write_jsonl, write_trait

from npti_export.bench import load_bench
from npti_export.bench.scaffold import scaffold
from npti_export.bench.stats import balance, counts, sample_questions
from npti_export.errors import BenchError, OutputError, TraitError
from npti_export.traits import FACETS

EXAMPLE = Path(__file__).parents[1] / "examples" / "traits" / "pirate"


@pytest.fixture
def pirate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_trait(tmp_path / "pirate")


def test_new_makes_what_lint_refuses_until_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("bench", "new", "sea-dog") == 0
    assert "--trait ./sea-dog+" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "sea-dog").iterdir()) == [
        "personas.jsonl",
        "questions.jsonl",
        "trait.toml",
    ]
    assert command("bench", "lint", "./sea-dog", "--json") == 2
    errors = [one for one in json.loads(capsys.readouterr().out) if one["severity"] == "error"]
    assert {one["check"] for one in errors} == {"placeholder"}
    assert {(one["file"], one["line"]) for one in errors} == {
        ("sea-dog/trait.toml", 0),
        *(("sea-dog/personas.jsonl", line) for line in range(1, 5)),
        *(("sea-dog/questions.jsonl", line) for line in range(1, 5)),
    }
    assert {one["text"].split("'")[1] for one in errors if one["line"] == 0} >= {"poles.low.name", "facets[2].high"}
    for name in ("trait.toml", "personas.jsonl", "questions.jsonl"):
        with pytest.raises(BenchError, match=r"is still a placeholder|'facet' is 'placeholder one'"):
            load_bench("sea-dog", tmp_path / "sea-dog")
        text = (EXAMPLE / name).read_text(encoding="utf-8").replace('name = "pirate"', 'name = "sea-dog"')
        (tmp_path / "sea-dog" / name).write_text(text, encoding="utf-8")
    assert load_bench("sea-dog", tmp_path / "sea-dog").search()
    assert command("bench", "lint", "./sea-dog") == 0


def test_new_refuses(tmp_path):
    (tmp_path / "there").mkdir()
    for name, error, says in [
        ("there", OutputError, "exists already"),
        ("calm", BenchError, "is taken, which means neuroticism-"),
        ("openness", BenchError, "is taken, one of the Big Five"),
        ("Two Words", BenchError, "cannot be a trait's name"),
        ("../up", BenchError, "cannot be a trait's name"),
    ]:
        with pytest.raises(error, match=says):
            scaffold(name, tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        scaffold("new", tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_stats(pirate, capsys):
    assert command("bench", "stats", "--json") == 0
    same = {"personas": {"+": 84, "-": 84}, "search": 408, "test": 90}
    assert json.loads(capsys.readouterr().out) == dict.fromkeys(FACETS, same)
    assert command("bench", "stats", "./pirate", "openness", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["pirate", "openness"]
    assert found["pirate"] == {"personas": {"+": 2, "-": 2}, "search": 6, "test": 2}
    command("bench", "stats", "./pirate")
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[3].split("│")]
    assert cells[1:-1] == ["pirate", "2", "2", "6", "2"]


def test_balance(pirate, capsys):
    bench = load_bench("pirate", pirate)
    assert counts(bench) == {"personas": {"+": 2, "-": 2}, "search": 6, "test": 2}
    assert balance(bench, "facet") == [
        ("speech", {"+": 1, "-": 1, "search": 3, "test": 0}),
        ("greed", {"+": 1, "-": 1, "search": 3, "test": 0}),
        (None, {"+": 0, "-": 0, "search": 0, "test": 2}),
    ]
    assert balance(bench, "person") == [("second", {"search": 6, "test": 0}), (None, {"search": 0, "test": 2})]
    command("bench", "stats", "./pirate", "--by", "topic")
    printed = capsys.readouterr().out
    assert "(untagged)" in printed
    assert "personas" not in printed
    with pytest.raises(click.UsageError, match="give one of the two"):
        command("bench", "stats", "--by", "facet", "--json")


def test_stats_of_what_cannot_be_read(pirate):
    with pytest.raises(BenchError, match="pirate: is named twice"):
        command("bench", "stats", "./pirate", "./pirate")
    with pytest.raises(TraitError, match="neither a trait nor a folder"):
        command("bench", "stats", "parrot")
    (pirate / "questions.jsonl").write_text("{\n")
    with pytest.raises(BenchError, match=r"questions\.jsonl:1: not a JSON object"):
        command("bench", "stats", "./pirate")


def test_show(pirate, capsys):
    bench = load_bench("pirate", pirate)
    assert len(sample_questions(bench, 5, 0)) == 5
    assert len(sample_questions(bench, 50, 0)) == 8
    assert sample_questions(bench, 3, 1) == sample_questions(bench, 3, 1)
    assert len({tuple(one.line for one in sample_questions(bench, 3, seed)) for seed in range(20)}) > 5
    assert {one.facet for one in sample_questions(bench, 9, 0, "search", "greed")} == {"greed"}
    assert {one.split for one in sample_questions(bench, 9, 0, "test")} == {"test"}
    command("bench", "show", "./pirate", "--count", "1", "--facet", "greed")
    printed = capsys.readouterr().out
    assert "greed" in printed
    assert "speech" not in printed
    command("bench", "show", "./pirate", "--personas", "--facet", "speech")
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "You are a loud pirate who" in printed
    assert "clerk" in printed
    assert "captain" not in printed
    with pytest.raises(BenchError, match="--facet 'noise': pirate has speech, greed"):
        command("bench", "show", "./pirate", "--facet", "noise")
    with pytest.raises(BenchError, match="nothing to show"):
        command("bench", "show", "./pirate", "--split", "test", "--facet", "greed")
    with pytest.raises(click.UsageError, match="leave it out with --personas"):
        command("bench", "show", "./pirate", "--personas", "--split", "test")


def test_export_and_import(pirate, capsys):
    assert command("bench", "export", "npti", "./pirate", "calm") == 0
    assert command("bench", "import", "npti", "--out", "back") == 0
    printed = capsys.readouterr().out
    assert "pirate: 2 personas +, 2 personas -, 6 search questions, 2 test questions\nwritten to back" in printed
    assert Path("back/neuroticism/questions.jsonl").is_file()
    with pytest.raises(OutputError, match="--force"):
        command("bench", "export", "npti", "./pirate")
    assert command("bench", "export", "npti", "./pirate", "--force") == 0
    assert not Path("npti/search/Neuroticism.json").exists()


def test_import_says_what_it_left_out(pirate, capsys):
    write_jsonl(Path("i.jsonl"), [{"text": "Sing.", "trait": "pirate", "key": "+"}] + [{"text": "x"}] * 25)
    assert command("bench", "import", "i.jsonl", "--out", "pirate", "--skip-bad") == 0
    printed = capsys.readouterr()
    assert "columns: text = text, trait = trait, keyed = key\npirate: 1 items\n" in printed.out
    assert printed.err.startswith("malformed lines left out: 25\n  i.jsonl:2: has no 'trait'\n")
    assert printed.err.endswith("and 5 more\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["q.txt", "--column", "text=a"], "--column does nothing here, as q.txt is plain text"),
        (["q.txt", "--force"], "--force does nothing here"),
        (["i.csv", "--split", "test"], "--split does nothing here, as i.csv is an inventory"),
        ([".", "--sheet", "a"], "--sheet does nothing here, as . is a folder in the published layout"),
        (["q.txt", "--as", "personas"], "--as personas goes with --pole"),
        (["q.txt", "--pole", "+"], "--pole goes with --as personas"),
        (["i.csv", "--column", "text"], "give MEANING=HEADER, with one of text, trait"),
        (["i.csv", "--column", "word=a"], "give MEANING=HEADER"),
        (["i.csv", "--column", "text=a", "--column", "text=b"], "is given twice"),
    ],
)
def test_import_refuses_idle_options(pirate, arguments, says):
    with pytest.raises(click.UsageError) as error:
        command("bench", "import", *arguments, "--out", "pirate")
    assert says in str(error.value)
