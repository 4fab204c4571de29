"""What reaches a terminal: foreign text is spelt out there, never obeyed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

_LAYOUT = "\n\t"  # control characters that a text may hold
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # could turn what follows round


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters other than tab and newline are spelt out.

    A model's output is nobody's word: an escape sequence in it could move the cursor, set the title, or worse.
    """
    return "".join(
        one if one in _LAYOUT or not _acts(one) else one.encode("unicode_escape").decode("ascii") for one in text
    )


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


def tame_console(**options: Any) -> Console:
    """A console of rich on which whatever text is printed, from whatever model or file, is :func:`printable`.

    Args:
        options: of :class:`rich.console.Console`.
    """
    from rich.console import Console

    class Tame(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # What rich itself does to the terminal is in control segments and styles.
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return Tame(**options)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line, :func:`printable`."""
    import click

    click.echo(printable(text), err=err)


def echo_json(value: object, *, indent: int | None = 2) -> None:
    """Print JSON, indented or on one line, in which what acts on a terminal is escaped as JSON has it."""
    import json

    import click

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    click.echo("".join(f"\\u{ord(one):04x}" if one != "\n" and _acts(one) else one for one in text))
