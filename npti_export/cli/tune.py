"""``npti-export tune``: the settings that show a pole best within a budget of damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.options import FILE, trial_options
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import tame_console


@click.command()
@click.option("--minutes", type=float, default=30.0, show_default=True, help="Until all is done; one trial in any case")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Most, with those gone on from [default: any]")
@click.option("--questions", type=click.IntRange(min=1), default=32, show_default=True, help="Search questions a trial")
@click.option("--test-questions", type=click.IntRange(min=0), default=0, help="To confirm the pick by [default: all]")
@click.option("--max-kl", type=float, default=0.1, show_default=True, help="Most KL on neutral text, nats a token")
@click.option(
    "--max-fluency-loss",
    type=float,
    default=0.05,
    show_default=True,
    help="Most loss of the answers' log-likelihood per token, as a share of its size",
)
@click.option(
    "--methods",
    default="neurons,mean,matched",
    show_default=True,
    metavar="LIST",
    help="What rules may be made of; without the first two, no neuron is identified",
)
@click.option("--out", type=FILE, metavar="FILE.toml", help="Write a recipe with the pole's settings")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write all trials")
@click.option("--storage", type=FILE, metavar="FILE", help="SQLite file to go on from [default: one in the cache]")
@trial_options
def tune(out: Path | None, json_path: Path | None, force: bool, **options: Any) -> None:
    """Search for the settings of a pole that move the answers most within a budget of damage.

    Methods, strength, neurons, layers and constants are tried on search questions; the pick is measured on the test
    questions, once, beside the persona prompt. The same command goes on with the trials that it made before. With
    --force, a recipe that tune wrote keeps its other poles.

    \b
      npti-export tune --trait extraversion+ --out tuned.toml
      npti-export tune --trait calm --model Llama-3.2-1B-Instruct-Q4_K_M.gguf --minutes 60 --max-kl 0.05 --json t.json
    """

    from npti_export.cli.options import trial_subject

    subject = trial_subject(options)

    from npti_export.tuning.budget import Budget
    from npti_export.tuning.delivery import deliver_tuning
    from npti_export.tuning.tune import TuneJob

    budget = Budget(options.pop("max_kl"), options.pop("max_fluency_loss"))
    methods = tuple(dict.fromkeys(name.strip() for name in options.pop("methods").split(",")))
    job = TuneJob(subject, budget=budget, methods=methods, **options)
    with RichProgress(tame_console(stderr=True)) as progress:
        deliver_tuning(job, tame_console(), progress, out=out, json_path=json_path, force=force)
