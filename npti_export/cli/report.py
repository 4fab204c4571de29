"""``npti-export report``: a page to look at, and pictures, of what ``evaluate --json`` wrote."""

from __future__ import annotations

from pathlib import Path

import click

from npti_export.cli.options import FILE
from npti_export.terminal import echo


@click.command("report")
@click.argument("evaluations", type=FILE, nargs=-1, required=True, metavar="R.JSON...")
@click.option("--html", type=FILE, metavar="FILE", help="Write the page: one file that needs nothing else")
@click.option("--figures", type=FILE, metavar="DIR", help="Write the pictures, as SVG and PNG, light and dark")
@click.option("--force", is_flag=True, help="Replace what is there")
def report_command(evaluations: tuple[Path, ...], html: Path | None, figures: Path | None, force: bool) -> None:
    """Draw the report of an evaluation: a page for the browser, and its pictures.

    The page is about the first evaluation; with more of them it opens with a summary of all and a map of how far each
    moves which trait.

    \b
      npti-export report calm.json --html calm.html
      npti-export report calm.json --figures calm-figures/
      npti-export report calm.json kind.json curious.json --html all.html
    """
    if html is None and figures is None:
        raise click.UsageError("neither --html nor --figures; name what to write")

    from npti_export.report_page.delivery import write_report

    for line in write_report(evaluations, html=html, figures=figures, force=force):
        echo(f"wrote {line}")
