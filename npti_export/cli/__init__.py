"""The command line: parses, calls the library, renders. No logic lives here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 3 unfaithful file, 4 disk full, 130 interrupted."""
    import click

    from npti_export.cli.root import cli
    from npti_export.errors import NptiError

    signal.signal(signal.SIGTERM, _interrupt)  # so that temporary files are removed then, too
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
        _fail(
            "interrupted; nothing was half-written, and the same command goes on from the last finished batch",
            130,
        )
    except BrokenPipeError:
        sys.exit(0)
    except MemoryError:
        _fail("out of memory; use a smaller model or batch (--set identify.batch_size=8)", 4)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    print(f"npti-export: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
