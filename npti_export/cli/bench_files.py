"""``npti-export bench new``, ``export`` and ``import``: folders of traits, made and exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from npti_export.cli.bench_views import PLACE
from npti_export.cli.options import FILE
from npti_export.terminal import echo

if TYPE_CHECKING:
    from npti_export.bench.imports import Imported

# Options that do nothing for a kind of source.
_IDLE = {
    "a folder in the published layout": ("kind", "pole", "split", "columns", "sheet"),
    "plain text, which is added to what is there": ("columns", "sheet", "force"),
    "an inventory": ("kind", "pole", "split"),
}


@click.command()
@click.argument("name")
@click.option("--dir", "parent", type=FILE, default=".", metavar="D", help="Where to put it [default: here]")
def new(name: str, parent: Path) -> None:
    """Make the folder of a trait of your own, to be filled in.

    \b
      npti-export bench new pirate
    """
    from npti_export.bench.scaffold import scaffold

    folder = scaffold(name, parent)
    echo(f"{folder}: replace every PLACEHOLDER in trait.toml, personas.jsonl and questions.jsonl")
    echo(f"npti-export bench lint {folder} says what is left; then --trait {_typed(folder)}+")


def _typed(folder: Path) -> str:
    """A folder as ``--trait`` takes it for one."""
    return str(folder) if len(folder.parts) > 1 else f"./{folder}"


@click.command("export")
@click.argument("out", type=FILE, metavar="DIR")
@click.argument("places", metavar=f"[{PLACE}]...", nargs=-1)
@click.option("--force", is_flag=True, help="Replace an earlier export")
def export_command(out: Path, places: tuple[str, ...], force: bool) -> None:
    """Write benches, of the Big Five if nothing is named, in the layout of the NPTI authors' data.

    Facets, topics and persons have no place in it.

    \b
      npti-export bench export npti-data/
      npti-export bench export pirate-data/ ./pirate
    """
    from npti_export.bench import load_bench
    from npti_export.bench.published_layout import export_layout
    from npti_export.benches import bench_folder
    from npti_export.traits import FACETS

    benches = [load_bench(trait, folder) for trait, folder in map(bench_folder, places or tuple(FACETS))]
    export_layout(benches, out, force=force)
    echo(f"{out}: {', '.join(bench.trait for bench in benches)}")


@click.command("import")
@click.argument("source", type=FILE)
@click.option("--out", required=True, type=FILE, metavar="FOLDER", help="Folder for a folder a trait; or the trait's")
@click.option(
    "--as", "kind", type=click.Choice(["questions", "personas"]), help="What a plain text's lines are [questions]"
)
@click.option("--pole", type=click.Choice(["+", "-"]), help="Of a plain text's personas")
@click.option("--split", type=click.Choice(["search", "test"]), help="Of a plain text's questions [search]")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="MEANING=HEADER",
    help="Column of an inventory: text, trait, keyed, reversed, facet",
)
@click.option("--sheet", metavar="NAME", help="Of an XLSX [default: the first]")
@click.option("--skip-bad", is_flag=True, help="Leave malformed lines out, and count them")
@click.option("--force", is_flag=True, help="Replace an earlier import")
@click.pass_context
def import_command(
    context: click.Context, /, source: Path, out: Path, skip_bad: bool, force: bool, columns: tuple[str, ...],
    sheet: str | None, kind: str | None, pole: str | None, split: str | None,
) -> None:  # fmt: skip
    """Bring in the NPTI layout (a folder), an inventory (.jsonl, .csv, .xlsx) or plain text, a question a line.

    A folder of imported traits goes with --bench; lines of plain text are added to a trait's folder; an inventory's
    items are kept as inventory.jsonl in a folder a trait.

    \b
      npti-export bench import npti-data/ --out my-bench/
      npti-export bench import ipip.csv --out my-bench/ --column text=item --column trait=label
      npti-export bench import pirates.txt --as personas --pole + --out ./pirate
    """
    from npti_export.bench.imports import TEXTS, How, import_source

    layout, text, inventory = _IDLE
    _refuse(context, source, layout if source.is_dir() else text if source.suffix.lower() in TEXTS else inventory)
    if kind == "personas" and (pole is None or split is not None):
        raise click.UsageError("--as personas goes with --pole + or --pole -, and with no --split")
    if kind != "personas" and pole is not None:
        raise click.UsageError("--pole goes with --as personas")
    how = How(
        "personas" if kind == "personas" else "questions", pole or "+", split or "search", _columns(columns), sheet
    )
    _say(import_source(source, out, how, skip_bad=skip_bad, force=force), out)


def _refuse(context: click.Context, source: Path, kind: str) -> None:
    """An option that would do nothing is a misunderstanding."""
    for one in context.command.params:
        given = context.get_parameter_source(one.name or "") is not click.core.ParameterSource.DEFAULT
        if one.name in _IDLE[kind] and given:
            raise click.UsageError(f"{one.opts[0]} does nothing here, as {source} is {kind}; leave it out")


def _say(done: Imported, out: Path) -> None:
    if done.columns:
        echo(f"columns: {', '.join(f'{meaning} = {header}' for meaning, header in done.columns.items())}")
    names = {"+": "personas +", "-": "personas -", "search": "search questions", "test": "test questions"}
    for trait, counts in sorted(done.counts.items()):
        echo(f"{trait}: {', '.join(f'{counts[kind]} {names.get(kind, kind)}' for kind in sorted(counts))}")
    if done.repeated:
        echo(f"{done.repeated} were there already")
    if done.faults.count:
        echo(f"malformed lines left out: {done.faults.count}", err=True)
        for fault in done.faults.first:
            echo(f"  {fault}", err=True)
        if done.faults.count > len(done.faults.first):
            echo(f"  and {done.faults.count - len(done.faults.first)} more", err=True)
    echo(f"written to {out}")


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    from npti_export.bench.inventories import HEADERS

    columns: dict[str, str] = {}
    for one in given:
        meaning, separator, header = one.partition("=")
        if not separator or meaning not in HEADERS or not header:
            raise click.UsageError(f"--column {one!r}: give MEANING=HEADER, with one of {', '.join(HEADERS)}")
        if meaning in columns:
            raise click.UsageError(f"--column {meaning}: is given twice; give one")
        columns[meaning] = header
    return columns
