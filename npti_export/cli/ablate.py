"""``npti-export ablate``: what each setting of a recipe does to the trait, the fluency and neutral text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.options import FILE, trial_options
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import tame_console


@click.command()
@click.option("--questions", type=click.IntRange(min=1), default=24, show_default=True, help="How many are asked")
@click.option(
    "--split",
    type=click.Choice(["search", "test"]),
    default="search",
    show_default=True,
    help="Which; test questions are for what is chosen already",
)
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write the sweeps for machines")
@trial_options
def ablate(json_path: Path | None, force: bool, **options: Any) -> None:
    """Vary one setting of a recipe at a time: strength, threshold, parts, and which tokens are steered.

    \b
      npti-export ablate --trait extraversion+
      npti-export ablate --trait calm --recipe npti --json calm-sweeps.json
    """

    from npti_export.cli.options import trial_subject

    subject = trial_subject(options)

    from npti_export.tuning.ablate import AblationJob
    from npti_export.tuning.delivery import deliver_ablation

    job = AblationJob(subject, **options)
    with RichProgress(tame_console(stderr=True)) as progress:
        deliver_ablation(job, tame_console(), progress, json_path=json_path, force=force)
