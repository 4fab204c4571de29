"""``npti-export compile``: what programs cost and lose."""

from __future__ import annotations

from typing import Any

import click

from npti_export.cli.options import base_options, job_options, model_options, rule_options
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import echo_json, tame_console


@click.command("compile")
@click.option("--trait", "trait_names", multiple=True, required=True, metavar="POLE", help="calm, ./pirate+ …")
@click.option(
    "--program",
    "programs",
    multiple=True,
    metavar="P",
    help="exact, bias, lowrank:R, budget:N% or kl:X; repeat to compare [default: the recipe's]",
)
@click.option("--explain", "explained", is_flag=True, help="Show every pass of the compiler, not only the result")
@click.option("--measure", "measures", is_flag=True, help="Measure KL to the rule, too: runs the model once a program")
@rule_options
@base_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def compile_command(
    trait_names: tuple[str, ...],
    programs: tuple[str, ...],
    explained: bool,
    measures: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what a steered GGUF would cost and lose, without writing it.

    \b
      npti-export compile --trait calm --recipe npti --explain
      npti-export compile --trait calm --recipe npti --program exact --program bias --program budget:5% --measure
    """

    from npti_export.traits import parse_trait

    specs = tuple(parse_trait(name) for name in trait_names)
    fields = job_options(options)

    from npti_export.explain import explain
    from npti_export.pipeline import Job
    from npti_export.report import render_programs

    with RichProgress(tame_console(stderr=True)) as progress:
        found = explain(Job(traits=specs, out=None, **fields), programs, progress, measures=measures)
    if as_json:
        echo_json(found)
    else:
        console = tame_console()
        render_programs(found, console if console.is_terminal else tame_console(width=160), every_pass=explained)
