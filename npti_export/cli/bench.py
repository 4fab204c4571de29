"""``npti-export bench``: the questions and personas that traits are shown by."""

from __future__ import annotations

import click

from npti_export.cli.bench_build import build
from npti_export.cli.bench_files import export_command, import_command, new
from npti_export.cli.bench_views import lint, show, stats


@click.group()
def bench() -> None:
    """Work on benches: the questions and personas that traits are shown by."""


for command in (build, export_command, import_command, lint, new, show, stats):
    bench.add_command(command)
