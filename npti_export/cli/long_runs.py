"""What long runs need of the command line: a log file, and a plain end where a file vanishes under them."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from npti_export.errors import NptiError, OutputError
from npti_export.files import translate_os_errors
from npti_export.generators.address import without_secrets
from npti_export.version import __version__

LOGGER = logging.getLogger("npti_export")
_LOST = (
    b"npti-export: a file that was being read became shorter, or its disk failed (bus error); see whether the model is "
    b"still whole and run the same command again; nothing was half-written\n"
)
_FIRST = "npti-export "  # in the first line of a log
_BEGINNING = 4096  # bytes that hold it
_EVERY = 10.0  # seconds between lines of one stage
_ANEW = "begins anew, as --no-cache keeps nothing"
_callbacks: list[Any] = []  # which C code keeps pointers to


def end_plainly_on_lost_files() -> None:
    """End with one line and exit code 2, not a crash, where a file that llama.cpp has mapped is cut short.

    Reading behind its new end raises SIGBUS in the middle of C code, which cannot go on, so no Python handler would
    ever run. Temporary files of this job stay; the next one removes them.
    """
    if not hasattr(signal, "SIGBUS") or _callbacks:
        return
    import ctypes

    def end(_signal: int) -> None:
        os.write(2, _LOST)
        os._exit(NptiError.exit_code)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _callbacks.append(callback)
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGBUS), callback)


class _LogFile(logging.FileHandler):
    """Says once if a line cannot be written; the job goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002
        if not self.failed:
            self.failed = True
            print(f"npti-export: {self.baseFilename}: the log breaks off ({sys.exc_info()[1]})", file=sys.stderr)


def log_option() -> click.Option:
    """``--log FILE`` for any command; the command itself never sees it."""
    return click.Option(
        ["--log"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Add times, stages, notes and how it ended to a text file",
        expose_value=False,
        callback=_begin,
    )


def _begin(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is None or context.resilient_parsing:
        return
    _check_log(path)
    with translate_os_errors(path):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.info("%s%s: %s", _FIRST, __version__, shlex.join(map(without_secrets, sys.argv[1:])))
    began = time.monotonic()
    context.call_on_close(lambda: _end(handler, began))


def _check_log(path: Path) -> None:
    """Only a log is written on.

    Raises:
        OutputError: it is another kind of file.
    """
    with translate_os_errors(path):
        if not path.is_file() or not path.stat().st_size:
            return
        with path.open("rb") as stream:
            begins = stream.read(_BEGINNING)
    if _FIRST.encode() not in begins.partition(b"\n")[0]:
        raise OutputError(f"--log {path}: is there already, and is no log of npti-export; name another file")


def _end(handler: logging.Handler, began: float) -> None:
    error = sys.exc_info()[1]
    LOGGER.info("ended after %.1f s: %s", time.monotonic() - began, "done" if error is None else _ending(error))
    LOGGER.removeHandler(handler)
    with suppress(OSError):  # what a full disk did not take was said when it was written
        handler.close()


def _ending(error: BaseException) -> str:
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return interrupted(sys.argv[1:])
    if isinstance(error, click.exceptions.Exit):
        return f"exit code {error.exit_code}"
    said = error.format_message() if isinstance(error, click.ClickException) else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}"


def interrupted(arguments: Sequence[str]) -> str:
    """What Ctrl-C leaves behind, and how to go on, by what the command keeps."""
    after = _after(arguments)
    return f"interrupted; nothing was half-written{f', and the same command {after}' if after else ''}"


def _after(arguments: Sequence[str]) -> str:
    """What the same command does; nothing of one that keeps nothing in any case."""
    given = {one.partition("=")[0] for one in arguments}
    # names stand before all options; without any it is the main job
    names = list(itertools.takewhile(lambda one: not one.startswith("-"), arguments))
    if names[:2] == ["bench", "build"]:
        return "without --force goes on from the last answer" if "--force" in given else "goes on from the last answer"
    keeps = not names or names[0] in ("identify", "compile", "tune", "evaluate", "ablate") or names == ["dial"]
    if not keeps or "--from" in given:
        return ""
    name, kept = names[0] if names else "", [] if "--no-cache" in given else ["batch"]
    if name == "tune" and (kept or "--storage" in given):
        kept.append("trial")
    if name in ("evaluate", "ablate"):
        kept = ["identifications"] if kept else []
        kept += ["verdicts"] if "--judge-journal" in given else []
        return f"takes up its {' and '.join(kept)}, and asks for answers again" if kept else _ANEW
    return f"goes on from the last finished {' or '.join(kept)}" if kept else _ANEW


class ProgressLog:
    """Writes progress to the log, if there is one; see :class:`npti_export.progress.Progress`."""

    def __init__(self) -> None:
        self._stage, self._total, self._done, self._tokens = "", 0, 0, 0
        self._began = self._told = time.monotonic()

    def start(self, stage: str, total: int) -> None:
        """A line for each stage."""
        self._stage, self._total, self._done, self._tokens = stage, total, 0, 0
        self._began = self._told = time.monotonic()
        LOGGER.info("%s: begins, %d to do", stage, total)

    def advance(self, steps: int, tokens: int = 0) -> None:
        """A line at the end of a stage, and every ten seconds before."""
        now = time.monotonic()
        self._done, self._tokens = self._done + steps, self._tokens + tokens
        if self._done >= self._total or now - self._told >= _EVERY:
            self._told = now
            counted = f", {self._tokens} tokens" if self._tokens else ""
            LOGGER.info("%s: %d of %d in %.1f s%s", self._stage, self._done, self._total, now - self._began, counted)

    def note(self, text: str) -> None:
        """A line for each note."""
        LOGGER.info("%s", " ".join(text.split()))
