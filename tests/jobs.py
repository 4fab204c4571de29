"""Running the command line: in this process, or as one of its own where that is what is tested."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, "-c", "from npti_export.cli import main; main()"]
# Linux ends it with the thread that started it, however that ended: a killed test leaves no job behind.
ENDS_WITH_US = "import ctypes, signal; ctypes.CDLL(None).prctl(1, signal.SIGKILL)"
# Small enough for a tiny random model, and no profile of a pole may come out empty.
QUICK = ["--questions", "6", "--max-new-tokens", "8", "--batch-size", "4"]
QUICK += ["--set", "select.at_least=20", "--set", "select.at_most=20", "--set", "verify.prompts=2"]
QUICK += ["--set", "verify.answer_tokens=8"]


def npti_process(*arguments, environment, cwd, **options):
    """A process of its own: to be killed, to have limits, or to be seen as a user's shell sees it."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd, **options
    )


def npti(*arguments, environment, cwd):
    """The same without the seconds that imports take: what it writes to both streams, C libraries included."""
    from npti_export.cli import main

    with _streams() as streams, _surroundings(environment, cwd):
        try:
            main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (stream.read_text(encoding="utf-8", errors="replace") for stream in streams)
    return subprocess.CompletedProcess(list(arguments), code, out, err)


@contextlib.contextmanager
def _surroundings(environment, cwd):
    from huggingface_hub import constants  # which reads its variables once

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, environment.get("HF_HUB_OFFLINE") == "1"
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    was, here = dict(os.environ), Path.cwd()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        os.chdir(here)
        os.environ.clear()
        os.environ.update(was)
        for name, handler in handlers.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def _streams():
    """Files that the descriptors 1 and 2 write to, and Python's streams with them."""
    kept = os.dup(1), os.dup(2)
    was = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        try:
            for path, descriptor in zip(paths, (1, 2), strict=True):
                with path.open("wb") as file:
                    os.dup2(file.fileno(), descriptor)
            sys.stdout, sys.stderr = (
                open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
                for descriptor in (1, 2)
            )
            yield paths
        finally:
            sys.stdout, sys.stderr = was
            for copy, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def main_job(tiny, out, *more):
    return ["--trait", "extraversion+", "--model", tiny, "--recipe", "npti", *QUICK, "--out", out, *more]
