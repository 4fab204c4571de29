"""``npti-export identify``: stop after the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.options import FILE, RichProgress, job_options, model_options
from npti_export.terminal import echo, tame_console


@click.command()
@click.option(
    "--trait",
    required=True,
    metavar="NAME|DIR",
    help="One of the Big Five, or a trait's folder; both poles at once",
)
@click.option(
    "--out",
    required=True,
    type=FILE,
    metavar="FILE",
    help="Profile to write: .safetensors, or .json in the published format",
)
@model_options
def identify(trait: str, out: Path, **options: Any) -> None:
    """Find the neurons of a trait and save their profile.

    \b
      npti-export identify --trait extraversion --out extraversion.safetensors
      npti-export identify --trait extraversion --out Extraversion_dict.json
      npti-export identify --trait ./pirate --out pirate.safetensors
    """

    from npti_export.traits import parse_whole

    spec = parse_whole(trait)

    from npti_export.pipeline import Job, identify_only

    with RichProgress(tame_console(stderr=True)) as progress:
        job = Job(traits=(spec,), out=None, save_profile=out, **job_options(options))
        profile, seconds = identify_only(job, progress)
    plus, minus = (int((profile.delta * sign >= 0.1).sum()) for sign in (1, -1))
    tokens = profile.origin["tokens"]
    echo(
        f"{spec.trait}: {plus} neurons fire for + and {minus} for - with |delta| >= 0.1, "
        f"over {tokens['+']} + {tokens['-']} tokens"
    )
    echo(f"wrote {out} ({seconds.get('identify', 0):.0f} s)")
