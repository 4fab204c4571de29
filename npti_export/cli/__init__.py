"""The command line: parses, calls the library, renders. No logic lives here."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 3 unfaithful file, 4 disk full, 130 interrupted."""
    import click

    # Read when numpy is imported: its idle threads sleep at once instead of spinning on the cores that llama.cpp needs.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

    from npti_export.cli.root import cli
    from npti_export.errors import NptiError

    for name in ("SIGTERM", "SIGHUP"):  # so that temporary files are removed then, too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what has no such character must not cost the summary, or the chat
    try:
        code = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except NptiError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        from npti_export.cli.long_runs import interrupted

        _fail(interrupted(sys.argv[1:] if arguments is None else arguments), 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        from npti_export.files import NO_ROOM

        said = f"{error.filename or 'a file'}: {error.strerror or error}"
        if error.errno in NO_ROOM:
            _fail(f"{said}; make room, also where temporary files go, and run the command again", 4)
        _fail(said, 2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail("out of memory; use a smaller model, or --batch-size 8 where the command has it", 4)
    sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if it is not loaded, it cannot have raised this
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    from npti_export.terminal import printable

    print(f"npti-export: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
