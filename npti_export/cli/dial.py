"""``npti-export dial``: sliders for each request in stock llama-server, and the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.options import FILE, base_options, job_options, model_options, rule_options
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import echo, echo_json, tame_console


@click.group(invoke_without_command=True)
@click.option("--traits", metavar="POLES", help="all, or poles such as extraversion+,calm")
@click.option("--out", type=FILE, metavar="DIR", help="Directory to write")
@click.option(
    "--mix",
    "mixed",
    type=click.IntRange(2, 5),
    default=2,
    show_default=True,
    metavar="N",
    help="Most poles that are mixed at once where they clamp neurons in common; each more takes more files",
)
@rule_options
@base_options
@model_options
@click.pass_context
def dial(context: click.Context, /, traits: str | None, out: Path | None, mixed: int, **options: Any) -> None:
    """Make personality sliders that a stock llama-server takes with each request.

    Writes a directory with the model, widened by neurons that change nothing, LoRA adapters of each pole that use them,
    an index of these, and a page that says how to start the server.

    \b
      npti-export dial --traits all --out persona/
      npti-export dial --traits extraversion+,calm --model Llama-3.2-1B-Instruct-Q4_K_M.gguf --out persona/
      npti-export dial --traits openness+,openness- --profile openness.safetensors --out persona/
      npti-export dial --traits ./pirate+,calm --out persona/
      npti-export dial request persona/ extraversion+:0.7,calm
    """
    if context.invoked_subcommand is not None:
        default = click.core.ParameterSource.DEFAULT
        if any(context.get_parameter_source(name) not in (default, None) for name in context.params):
            raise click.UsageError(f"dial {context.invoked_subcommand} takes no options of dial")
        return
    if traits is None:
        raise click.UsageError("no --traits; give all, or poles such as extraversion+,calm")
    if out is None:
        raise click.UsageError("no --out; name a directory to write")
    _make(traits, out, mixed, options)


def _make(traits: str, out: Path, mixed: int, options: dict[str, Any]) -> None:

    from npti_export.dial.index import parse_poles

    specs = parse_poles(traits)
    fields = job_options(options)

    from npti_export.dial.page import closing_lines
    from npti_export.dial.run import make_dial
    from npti_export.job import Job

    job = Job(traits=specs, out=out, format="dial", **fields)
    with RichProgress(tame_console(stderr=True)) as progress:
        index = make_dial(job, mixed, progress)
    for line in closing_lines(index, str(out)):
        echo(line)


@dial.command()
@click.argument("folder", type=FILE)
@click.argument("mix", default="")
@click.option("--message", metavar="TEXT", help="Print a whole chat request that asks this")
def request(folder: Path, mix: str, message: str | None) -> None:
    """Print what a request carries for a MIX of poles at their strengths; without one, for the unsteered model.

    \b
      npti-export dial request persona/ extraversion+:0.7,calm
      npti-export dial request persona/ calm:1.5 --message "How was your day?" |
        curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d @-
    """

    from npti_export.dial.adapters import check_adapters
    from npti_export.dial.index import load_dial, parse_mix

    made = load_dial(folder)
    check_adapters(folder, made, some_missing=True)
    body = made.request(parse_mix(mix, {pole[:-1] for pole in made.poles}))
    if message is not None:
        body = {"messages": [{"role": "user", "content": message}], **body}
    echo_json(body, indent=None)
