"""``npti-export chat``: talk to a steered model, and to its base beside it."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from npti_export.cli.options import FILE, llama_options, llama_settings
from npti_export.terminal import echo_json, tame_console


@click.command()
@click.argument("model", type=FILE)
@click.option("--compare", "base", type=FILE, metavar="FILE", help="GGUF beside it [default: the base inside MODEL]")
@click.option("--alone", is_flag=True, help="Nothing beside it")
@click.option("--message", "messages", multiple=True, metavar="TEXT", help="Say this, print what comes, exit; repeat")
@click.option("--json", "as_json", is_flag=True, help="With --message: print the conversation as JSON")
@click.option("--system", metavar="TEXT", help="Instruction that comes first")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, metavar="X", help="0: greedy")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the sampling")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Longest answer"
)
@llama_options
def chat(model: Path, base: Path | None, alone: bool, messages: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Talk to a steered GGUF, with its base answering beside it.

    A steered file holds what its base is restored from; for any other file, name one to compare with. Commands: /reset,
    /system TEXT, /save FILE, /quit; Ctrl-C stops an answer.

    \b
      npti-export chat model.gguf
      npti-export chat calm.gguf --compare nervous.gguf --temperature 0
      npti-export chat model.gguf --message "How was your day?" --json
    """
    if base is not None and alone:
        raise click.UsageError("--compare names a model beside it, and --alone wants none; give one of the two")
    if as_json and not messages:
        raise click.UsageError("--json prints what --message asks; give a --message")

    from npti_export.chat import Sampling, open_conversation
    from npti_export.chat_view import show, talk

    for name in ("SIGTERM", "SIGHUP"):  # Ctrl-C stops an answer, these the command
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _leave)
    settings = llama_settings(options)
    sampling = Sampling(options["temperature"], options["seed"], options["max_new_tokens"])
    console = tame_console(highlight=False)
    with open_conversation(
        model, base, sampling, settings=settings, system=options["system"], alone=alone
    ) as conversation:
        for message in messages:
            if as_json:
                for _ in conversation.ask(message):
                    pass
            else:
                show(conversation, console, message)
        if as_json:
            echo_json(conversation.to_dict())
        elif not messages:
            talk(conversation, console, _asked)


def _asked() -> str:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  what input() edits lines with
    return input("> ")


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
