"""How progress is drawn."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from npti_export.cli.long_runs import ProgressLog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class RichProgress:
    """Draws a bar a stage on stderr, with tokens per second and the time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._bars: Bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._tokens = 0
        self._log = ProgressLog()

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """See :class:`npti_export.progress.Progress`."""
        self._log.start(stage, total)
        self._bars.start()  # not before there is something to show: bad input gets its one line only
        self._task = self._bars.add_task(stage, total=total, rate="")
        self._tokens = 0
        if not self._console.is_terminal:
            self._console.print(f"{stage} …", style="dim")

    def advance(self, steps: int, tokens: int = 0) -> None:
        """See :class:`npti_export.progress.Progress`."""
        if self._task is None:
            return
        self._log.advance(steps, tokens)
        self._bars.advance(self._task, steps)
        if tokens:
            self._tokens += tokens
            elapsed = self._bars.tasks[self._bars.task_ids.index(self._task)].elapsed or 0.0
            if elapsed > 0:
                self._bars.update(self._task, rate=f"{self._tokens / elapsed:.0f} tokens/s")

    def note(self, text: str) -> None:
        """See :class:`npti_export.progress.Progress`."""
        self._log.note(text)
        self._console.print(text, style="dim", markup=False)
