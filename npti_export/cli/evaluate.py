"""``npti-export evaluate``: does the personality show, and what did it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.endpoints import judge_options, judges_of
from npti_export.cli.options import FILE, runtime_options, runtime_settings, trait_dir_option
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import tame_console

_BASELINES = "npti,dpn-le,dpn-le-any,mean-shift,null"


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--base", "model", metavar="FILE|DIR|ID", help="The unsteered model [default: the artifact's own]")
@click.option("--trait", "trait", metavar="POLE", help="The pole to judge by, where the artifact has several")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write everything for machines")
@click.option(
    "--card", "card_path", type=FILE, metavar="FILE.md", help="Put the figures into a model card, or make one"
)
@click.option("--html", "html_path", type=FILE, metavar="FILE", help="Write a page that needs nothing else")
@click.option(
    "--questions", type=click.IntRange(min=0), help="Test questions, 0 for all [default: 32, or all of fewer]"
)
@click.option("--answer-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Longest answer")
@click.option("--personas", type=click.IntRange(min=1), default=2, show_default=True, help="Pairs that score an answer")
@click.option(
    "--baselines", default=_BASELINES, show_default=True, metavar="A,B", help="Other methods, none, fine-tuned"
)
@click.option("--no-prompts", is_flag=True, help="Leave the prompted conditions out")
@judge_options
@click.option("--inventory", type=FILE, metavar="FILE", help="Self-report items [default: ours]")
@click.option("--tasks", multiple=True, type=FILE, metavar="FILE", help="A further test of skill")
@click.option("--harness", metavar="TASK[,TASK]", help="Published tests of skill by lm-evaluation-harness (an extra)")
@click.option(
    "--harness-limit", type=click.IntRange(min=0), default=100, show_default=True, help="Documents of each, 0 for all"
)
@click.option(
    "--skip",
    "skips",
    multiple=True,
    type=click.Choice(["inventory", "capability", "cross-talk"]),
    help="Leave a part out",
)
@click.option("--pareto", "pareto_path", type=FILE, metavar="T.JSON", help="Trials of tune --json, for the report")
@click.option("--sweeps", "sweeps_path", type=FILE, metavar="A.JSON", help="Sweeps of ablate --json, likewise")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of intervals and of chance")
@click.option("--bench", type=FILE, metavar="DIR", help="Personas and questions instead of the shipped ones")
@click.option("--any-model", is_flag=True, help="Accept another model of the same shape as the base")
@click.option("--no-cache", is_flag=True, help="Neither use nor keep identifications")
@click.option("--force", is_flag=True, help="Replace what is there")
@trait_dir_option
@runtime_options
def evaluate(
    artifact: Path,
    json_path: Path | None,
    html_path: Path | None,
    card_path: Path | None,
    pareto_path: Path | None,
    sweeps_path: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Measure how far an artifact's personality shows on held-out test questions, beside prompts and other methods.

    Trait by likelihood contrast, inventory and judges; fluency; skill; what happens to the other traits; chance. Test
    questions choose nothing.

    \b
      npti-export evaluate model.gguf
      npti-export evaluate model.gguf --json r.json --html r.html
      npti-export evaluate calm/ --card calm/README.md
      npti-export evaluate calm/ --judge http://127.0.0.1:8080/v1=qwen3-8b
    """

    from npti_export.evaluate.delivery import deliver, evaluation_job

    settings = runtime_settings(options)
    options["judges"] = judges_of(options, settings)
    job = evaluation_job(artifact, settings, options)
    with RichProgress(tame_console(stderr=True)) as progress:
        deliver(
            job,
            tame_console(),
            progress,
            json_path=json_path,
            html_path=html_path,
            card_path=card_path,
            pareto_path=pareto_path,
            sweeps_path=sweeps_path,
            force=force,
        )
