"""How ``npti-export bench build`` is drawn: while it runs, and what it came to."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from npti_export.bench.making.builder import Tally
from npti_export.bench.making.report import cost

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LINE_SECONDS = 60.0  # between lines where there is no terminal to draw on
_SHOWN_CELLS = 10


class RichDisplay:
    """Draws a bar on stderr with counts, speed, tokens and cost; a line a minute where that is no terminal.

    Args:
        console: to draw on.
        prices: of a million tokens in and out, or None.
    """

    def __init__(self, console: Console, prices: tuple[float | None, float | None]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._prices = console, prices
        self._bars: Bars = Progress(
            TextColumn("kept"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[more]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._first: Tally | None = None
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> RichDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, tally: Tally) -> None:
        """See :class:`npti_export.bench.making.builder.Display`."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = tally, now
            self._bars.start()
            self._task = self._bars.add_task("", total=tally.wanted, completed=tally.kept, more="")
        drawn = self._console.is_terminal
        if tally.kept < tally.wanted and now - self._shown < (0.2 if drawn else _LINE_SECONDS):
            return
        self._shown, more = now, self._told(tally, now)
        assert self._task is not None
        self._bars.update(self._task, completed=tally.kept, more=more)
        if not drawn:
            self._console.print(f"kept {tally.kept} of {tally.wanted}, {more}", style="dim", markup=False)

    def _told(self, tally: Tally, now: float) -> str:
        assert self._first is not None
        seconds = max(now - self._begun, 1e-3)
        text = f"{tally.rejected} rejected, {(tally.kept - self._first.kept) / seconds:.1f}/s, "
        text += f"{tally.tokens_in + tally.tokens_out:,} tokens"
        spent = cost(tally.tokens_in, tally.tokens_out, self._prices)
        return text if spent is None else f"{text}, cost {spent:.2f}"

    def note(self, text: str) -> None:
        """See :class:`npti_export.bench.making.builder.Display`."""
        self._console.print(text, style="dim", markup=False)


def render(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Print what a build has come to."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, count in summary["kept"].items():
        table.add_row(f"kept, {name}", str(count))
    for name, count in summary["rejected"].items():
        table.add_row(f"rejected, {name}", str(count))
    tokens = summary["tokens"]
    table.add_row("answers", f"{summary['answers']}, {summary['unusable_answers']} of them unusable")
    table.add_row("tokens", f"{tokens['in']} in, {tokens['out']} out")
    if summary["cost"] is not None:
        table.add_row("cost", f"{summary['cost']:.2f}")
    console.print(table)
    short = summary["short"]
    if short:
        lacks = sum(cell["lacks"] for cell in short)
        console.print(
            f"{lacks} items are lacking in {len(short)} places after {summary['rounds']} rounds; the same command with "
            "more --rounds goes on:"
        )
        for cell in short[:_SHOWN_CELLS]:
            names = ", ".join(str(value) for name, value in cell.items() if name != "lacks")
            console.print(f"  {names}: {cell['lacks']}", markup=False)
        if len(short) > _SHOWN_CELLS:
            console.print(f"  … and {len(short) - _SHOWN_CELLS} more, in build.json")
    console.print(f"wrote {out}", markup=False)
