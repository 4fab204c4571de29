"""Running another program: its output is kept to itself, and its last lines are there when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

_KEPT_LINES = 2  # the end of a traceback, or of a log, and what led to it


def run_captured(
    command: Sequence[str],
    *,
    environment: dict[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Run a program to its end; it is killed, with what it started, if this process is interrupted meanwhile.

    Args:
        command: program and arguments.
        environment: of the program; None passes this process's on.
        on_line: told of each line that it prints, on stdout or stderr.

    Returns:
        Its exit code (negative: the signal that ended it), and the last lines that say something, joined by `` / ``.

    Raises:
        OSError: the program cannot be started.
    """
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        start_new_session=True,  # a wrapper script and its program end together
    )
    try:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.strip()
            if any(map(str.isalnum, line)):  # rules and blank lines say nothing
                last.append(line)
            if on_line is not None:
                on_line(line)
        return process.wait(), " / ".join(last)
    finally:
        if process.poll() is None:
            _kill(process)
        if process.stdout is not None:
            process.stdout.close()


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ending(code: int, last_lines: str) -> str:
    """How a program failed, for a message: its last lines, and its exit code or signal."""
    how = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
    return f"{last_lines} ({how})" if last_lines else how
