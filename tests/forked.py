"""Runs of the command line that cost no imports: each is a fork of a process that has imported everything.

Only for a process without threads of its own, that never ran a model itself: what they hold does not survive a fork.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 600.0  # seconds after which a run counts as hanging
BEFORE = "before the first stage"
_POLL = 0.001


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal, None where it hung; and what it said on stderr."""

    code: int | None
    said: str

    @property
    def fault(self):
        """What no run may do, or an empty string."""
        if self.code is None:
            return "hang"
        if "Traceback" in self.said:
            return "traceback"
        if self.code < 0:
            return f"signal {-self.code}"
        if self.code and not self.sentence.startswith("npti-export: "):
            return f"exit code {self.code} without a sentence"
        return ""

    @property
    def sentence(self):
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""

    @property
    def stage(self):
        """The last stage that had begun."""
        stages = [line.split(" tiny")[0].rstrip(" …") for line in self.said.splitlines() if line.endswith("…")]
        return stages[-1] if stages else BEFORE


class Run:
    """A run that has begun; ``prepare`` is called in it first, for limits and the like."""

    def __init__(self, arguments, folder, environment, prepare=None):
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(map(str, arguments)), folder, environment, self._said.fileno(), prepare)
        self._status = None

    def poll(self):
        """Whether it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def wait(self, limit=LIMIT):
        hung = False
        while not self.poll():
            if time.monotonic() - self.began > limit and not hung:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(_POLL)
        self._said.seek(0)
        return Ended(None if hung else self._status, self._said.read().decode(errors="replace"))

    def wait_until(self, moment):
        """Wait for a condition; False if the run ended before."""
        while not self.poll():
            if moment():
                return True
            time.sleep(_POLL)
        return False

    def kill(self):
        """Whether there was anything to kill; nothing of it runs afterwards."""
        alive = not self.poll()
        if alive:
            os.kill(self.pid, signal.SIGKILL)
        return alive


def _become(arguments, folder, environment, errors, prepare):
    code = 70
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody else would end one that hangs
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(errors, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        if prepare is not None:
            prepare()
        from npti_export.cli import main

        main(arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def import_what_a_run_imports(arguments, folder, environment):
    """Make one run to its end and import its modules here. Returns how it ended and how long it took."""
    names = Path(folder) / "modules.json"

    def prepare():  # its end is os._exit, behind which atexit has no say
        real = os._exit

        def leave(code):
            names.write_text(json.dumps(sorted(sys.modules)))
            real(code)

        os._exit = leave

    ended = Run(arguments, folder, environment, prepare).wait()
    for name in json.loads(names.read_text()):
        if name != "__main__":
            try:
                importlib.import_module(name)
            except Exception:
                continue
    names.unlink()
    return ended


def threads():
    """Threads of this process; a fork has one."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1
