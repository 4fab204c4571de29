"""``npti-export --trait … --out …``: the main job, and the list of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.identify import identify
from npti_export.cli.inspect import inspect
from npti_export.cli.options import FILE, RichProgress, job_options, model_options
from npti_export.cli.strip import strip
from npti_export.cli.traits import traits
from npti_export.version import __version__


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--trait",
    "trait_names",
    multiple=True,
    metavar="POLE",
    help="agreeableness+, neuroticism-:0.5, calm …; repeat to compose",
)
@click.option("--out", type=FILE, metavar="FILE", help="GGUF to write")
@click.option("--gamma", type=float, metavar="X", help="Strength of the shift [rule.gamma]")
@click.option(
    "--profile",
    "profiles",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Re-use a profile, .safetensors or published .json",
)
@click.option("--save-profile", type=FILE, metavar="FILE", help="Keep the profile, .safetensors or published .json")
@click.option("--any-model", is_flag=True, help="Accept a profile of another model of the same shape")
@click.option("--base", type=FILE, metavar="FILE", help="GGUF to bake into, where --model is not one")
@click.option("--report", type=FILE, metavar="FILE", help="Write the report as JSON")
@model_options
@click.version_option(__version__, prog_name="npti-export")
@click.pass_context
def cli(context: click.Context, /, trait_names: tuple[str, ...], report: Path | None, **options: Any) -> None:
    """Give a language model a fixed personality, in a GGUF that stock llama.cpp loads.

    \b
      npti-export --trait agreeableness+ --out model.gguf
      npti-export --trait calm --trait extraversion+:0.5 --model Llama-3.2-1B-Instruct-Q4_K_M.gguf --out calm.gguf
      npti-export --trait openness- --profile openness.safetensors --gamma 1.0 --out plain.gguf
    """
    if context.invoked_subcommand is not None:
        if _given(context):
            raise click.UsageError(f"give the options of {context.invoked_subcommand} after its name")
        return
    if not _given(context):
        click.echo(context.get_help())
        return
    if not trait_names:
        raise click.UsageError("no --trait; name a pole such as agreeableness+ (npti-export traits lists them)")
    if options["out"] is None:
        raise click.UsageError("no --out; name the GGUF to write (npti-export identify stops before that)")
    _main_job(trait_names, report, options)


def _given(context: click.Context) -> bool:
    """Whether any option of the main job was on the command line."""
    default = click.core.ParameterSource.DEFAULT
    return any(context.get_parameter_source(name) not in (default, None) for name in context.params)


def _main_job(trait_names: tuple[str, ...], report_path: Path | None, options: dict[str, Any]) -> None:
    from rich.console import Console

    from npti_export.traits import parse_trait

    specs = tuple(parse_trait(name) for name in trait_names)
    fields = job_options(options)

    from npti_export.pipeline import Job, run
    from npti_export.report import render, save_report

    with RichProgress(Console(stderr=True)) as progress:
        report = run(Job(traits=specs, report=report_path, **fields), progress)
    if report_path is not None:
        save_report(report, report_path, force=fields["force"])
    render(report, Console())


for command in (identify, inspect, strip, traits):
    cli.add_command(command)
