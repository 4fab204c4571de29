"""``npti-export identify``: stop after the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.distribution import distribution_of, distribution_options
from npti_export.cli.options import FILE, job_options, model_options
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import echo, tame_console


@click.command()
@click.option(
    "--trait",
    "names",
    required=True,
    multiple=True,
    metavar="NAME|DIR",
    help="One of the Big Five, or a trait's folder; both poles at once; repeat for several in one pass",
)
@click.option(
    "--out",
    required=True,
    type=FILE,
    metavar="FILE",
    help="Profile to write: .safetensors, or .json in the published format; for several traits a folder",
)
@model_options
@distribution_options
def identify(names: tuple[str, ...], out: Path, **options: Any) -> None:
    """Find the neurons of a trait and save their profile.

    \b
      npti-export identify --trait extraversion --out extraversion.safetensors
      npti-export identify --trait extraversion --out Extraversion_dict.json
      npti-export identify --trait ./pirate --out pirate.safetensors
      npti-export identify --trait extraversion --trait openness --engine ray --workers 8 --out profiles/
    """

    from npti_export.traits import parse_whole

    specs = tuple({spec.trait: spec for spec in map(parse_whole, names)}.values())
    distribution = distribution_of(options)

    from npti_export.pipeline import Job, identify_only

    with RichProgress(tame_console(stderr=True)) as progress:
        job = Job(traits=specs, out=None, save_profile=out, distribution=distribution, **job_options(options))
        profiles, seconds = identify_only(job, progress)
    for name, profile in profiles.items():
        plus, minus = (int((profile.delta * sign >= 0.1).sum()) for sign in (1, -1))
        tokens = profile.origin["tokens"]
        echo(
            f"{name}: {plus} neurons fire for + and {minus} for - with |delta| >= 0.1, "
            f"over {tokens['+']} + {tokens['-']} tokens"
        )
    echo(f"wrote {out} ({seconds.get('identify', 0):.0f} s)")
