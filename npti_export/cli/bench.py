"""``npti-export bench``: the questions and personas that traits are shown by."""

from __future__ import annotations

import click

from npti_export.cli.bench_build import build


@click.group()
def bench() -> None:
    """Work on benches: the questions and personas that traits are shown by."""


bench.add_command(build)
