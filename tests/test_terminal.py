"""Whatever a file or a model says, a terminal is not told what to do by it."""

import io
import json
import re

import pytest
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from npti_export.cli import main
from npti_export.terminal import echo, echo_json, printable, tame_console

ATTACKS = [
    "\x1b]0;owned\x07 title",
    "\x1b[2J\x1b[H clear",
    "\x9b31m C1",
    "\x9d0;owned\x9c C1 title",
    "a\rb",
    "a\x08b",
    "\x00\x7f",
    "\u202ereversed\u202c",
    "\u2066isolated\u2069",
    "\x1b]8;;file:///etc/passwd\x1b\\link\x1b]8;;\x1b\\",
    "\x1bP+q544e\x1b\\",
    "\ud800",
]
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself writes: styles, and where the cursor goes


def drawn(*renderables, **options):
    stream = io.StringIO()
    console = tame_console(file=stream, width=100, **options)
    for one in renderables:
        console.print(one)
    return stream.getvalue()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_character_acts(attack):
    assert not ACTS.search(printable(attack))
    table = Table("name", title=escape(attack))
    table.add_row(escape(attack))
    for text in (drawn(escape(attack), table), drawn(table, force_terminal=True, color_system="truecolor")):
        assert not ACTS.search(OWN.sub("", text).replace("\r", "")), ascii(text)


def test_styles_of_our_own_stay():
    assert "\x1b[1m" in drawn("[bold]loud[/]", force_terminal=True, color_system="truecolor")
    assert drawn("plain\ttext", highlight=False).split() == ["plain", "text"]


def test_progress_bars_still_move_the_cursor():
    stream = io.StringIO()
    with Progress(console=tame_console(file=stream, force_terminal=True, width=80)) as progress:
        progress.add_task("\x1b]0;owned\x07", total=2)
    assert "\x1b[?25l" in stream.getvalue()
    assert "\x1b]0" not in stream.getvalue()


@pytest.mark.parametrize("attack", ATTACKS)
def test_lines_and_json(attack, capsys):
    echo(attack)
    assert not ACTS.search(capsys.readouterr().out)
    echo_json({"said": attack, attack: ["é", 1]})
    out = capsys.readouterr().out
    assert not ACTS.search(out)
    assert json.loads(out) == {"said": attack, attack: ["é", 1]}


def test_errors_too(tmp_path, monkeypatch, capsys):
    """A file's name, and what is in it, stand in messages."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a\x1b]0;owned\x07"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "\\u001b]0;owned\\u0007"}')
    with pytest.raises(SystemExit) as left:
        main(["inspect", folder.name])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "adapter" in said
    assert not ACTS.search(said)
