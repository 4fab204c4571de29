"""A conversation on a terminal: two columns where it is wide, one above the other where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from npti_export.chat import Conversation, Piece
from npti_export.errors import NptiError, OutputError
from npti_export.terminal import printable

_COLUMN = 40  # characters: narrower columns are hard to read
_FRAMES = 12  # a second
HELP = (
    "/reset begins anew · /system TEXT begins anew with an instruction · /save FILE writes JSON · /quit or Ctrl-D "
    "leaves · Ctrl-C stops an answer"
)


def talk(conversation: Conversation, console: Console, ask: Callable[[], str]) -> None:
    """Read messages and commands until there are no more.

    Args:
        conversation: who answers.
        console: where it is shown.
        ask: gives the next line; EOFError ends the conversation.
    """
    console.print(Text(HELP, style="dim"))
    while True:
        try:
            line = ask().strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("Ctrl-D or /quit leaves", style="dim"))
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not _command(conversation, console, line):
                    return
            else:
                show(conversation, console, line)
        except NptiError as error:
            console.print(Text(printable(str(error)), style="red"))


def _command(conversation: Conversation, console: Console, line: str) -> bool:
    """Do what a line that begins with a slash says; False ends the conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.reset(conversation.system)
        said = "a new conversation"
    elif name == "/system":
        conversation.reset(rest or None)
        said = "a new conversation with this instruction" if rest else "a new conversation without an instruction"
    elif name == "/save" and rest:
        try:
            path = Path(rest).expanduser()
        except RuntimeError as error:  # a home that nobody has
            raise OutputError(f"{rest}: {error}; choose another name") from error
        conversation.save(path)
        said = f"wrote {rest}"
    else:
        said = HELP
    console.print(Text(printable(said), style="dim"))
    return True


def show(conversation: Conversation, console: Console, message: str) -> None:
    """Ask, and draw the answers while they come; Ctrl-C stops them."""
    before, said = conversation.dropped, [""] * len(conversation.partners)
    names = [partner.name for partner in conversation.partners]
    stopped = False
    pieces = conversation.ask(message)
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                _draw(live, console, names, said, pieces)
        else:
            _gather(said, pieces)
    except KeyboardInterrupt:
        stopped = True
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator: what was said goes into the history now
    console.print(_columns(console, names, [Text(text) for text in said]))
    if stopped:
        console.print(Text("stopped", style="dim"))
    if conversation.dropped > before:
        console.print(Text(f"the oldest {conversation.dropped} messages no longer fit and are forgotten", style="dim"))


def _gather(said: list[str], pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        said[piece.partner] += piece.text


def _draw(live: Live, console: Console, names: list[str], said: list[str], pieces: Iterable[Piece]) -> None:
    from time import monotonic

    drawn = 0.0
    for piece in pieces:
        said[piece.partner] += piece.text
        if monotonic() - drawn > 1 / _FRAMES:
            drawn = monotonic()
            width, rows = _sizes(console, len(said))
            live.update(_columns(console, names, [_end(console, text, width, rows) for text in said]), refresh=True)


def _sizes(console: Console, count: int) -> tuple[int, int]:
    """Width of an answer, and how many rows of it fit on the screen while it grows."""
    if _wide(console, count):
        return (console.width - 3 * (count - 1)) // count, max(1, console.height - 4)
    return console.width, max(1, (console.height - 2) // count - 2)


def _wide(console: Console, count: int) -> bool:
    return console.width >= count * _COLUMN + 3 * (count - 1)


def _end(console: Console, text: str, width: int, rows: int) -> Text:
    """The last rows of a text, as it is wrapped."""
    return Text("\n").join(list(Text(text).wrap(console, width))[-rows:])


def _columns(console: Console, names: list[str], texts: list[Text]) -> RenderableType:
    titles = [f"[bold]{escape(printable(name))}[/]" for name in names]
    if len(names) == 1:
        return Group(*texts, "")
    if not _wide(console, len(names)):
        return Group(*(part for title, text in zip(titles, texts, strict=True) for part in (title, text, "")))
    table = Table(box=None, expand=True, padding=(0, 3, 0, 0), pad_edge=False)
    for title in titles:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*texts)
    return Group(table, "")
