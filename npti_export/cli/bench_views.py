"""``npti-export bench lint``, ``stats`` and ``show``: what is in a bench, and what is weak in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from npti_export.terminal import echo_json, tame_console

if TYPE_CHECKING:
    from npti_export.bench import Question, TraitBench
    from npti_export.bench.stats import By

PLACE = "TRAIT|FOLDER"


@click.command()
@click.argument("place", metavar=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@click.pass_context
def lint(context: click.Context, /, place: str, as_json: bool) -> None:
    """Say what is weak in a trait's personas and questions, where, and how to mend it.

    The exit code is 2 if the trait cannot be used at all, else 0.

    \b
      npti-export bench lint ./pirate
      npti-export bench lint extraversion --json
    """
    from rich.text import Text

    from npti_export.bench.lint import lint as findings_of
    from npti_export.bench.lint import unusable
    from npti_export.benches import bench_folder

    trait, folder = bench_folder(place)
    found = findings_of(trait, folder)
    if as_json:
        echo_json([one.to_dict() for one in found])
    else:
        console = tame_console(soft_wrap=True)
        for one in found:
            style = {"error": "bold red", "warning": "yellow", "note": "dim"}[one.severity]
            console.print(Text.assemble((one.severity, style), f" {one.place}: {one.text}; {one.mend}"))
        kinds = ("error", "warning", "note")
        counts = ((kind, sum(one.severity == kind for one in found)) for kind in kinds)
        said = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts if count)
        console.print(f"{trait}: {said or 'nothing to mend'}", highlight=False, markup=False)
    if unusable(found):
        context.exit(2)


@click.command()
@click.argument("places", metavar=f"[{PLACE}]...", nargs=-1)
@click.option("--by", type=click.Choice(["facet", "topic", "person"]), help="Count by it, in a table a trait")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: counts by trait")
def stats(places: tuple[str, ...], by: By | None, as_json: bool) -> None:
    """Count personas and questions, of the Big Five if nothing is named.

    \b
      npti-export bench stats
      npti-export bench stats ./pirate openness --by facet
    """
    from npti_export.bench.stats import balance, counts

    if by is not None and as_json:
        raise click.UsageError("--by makes tables, and --json counts by trait only; give one of the two")
    benches = opened(places)
    if as_json:
        echo_json({bench.trait: counts(bench) for bench in benches})
        return
    columns = ("personas +", "personas -", "search", "test")
    if by is None:
        rows: list[list[Any]] = []
        for bench in benches:
            found = counts(bench)
            rows.append([bench.trait, *found["personas"].values(), found["search"], found["test"]])
        _table("", ["trait", *columns], rows)
        return
    for bench in benches:
        kinds = [name for name in columns if by == "facet" or not name.startswith("personas")]
        rows = [[value or "(untagged)", *found.values()] for value, found in balance(bench, by)]
        _table(bench.trait, [by, *kinds], rows)


@click.command()
@click.argument("place", metavar=PLACE)
@click.option("--count", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="How many")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the choice")
@click.option("--split", type=click.Choice(["search", "test"]), help="Questions of that split only")
@click.option("--facet", metavar="FACET", help="Of that facet only")
@click.option("--personas", is_flag=True, help="Personas instead of questions")
def show(place: str, count: int, seed: int, split: str | None, facet: str | None, personas: bool) -> None:
    """Show some questions or personas at random, the same ones for the same seed.

    \b
      npti-export bench show extraversion --facet gregariousness
      npti-export bench show ./pirate --personas --count 3
    """
    from npti_export.bench.stats import sample_personas, sample_questions

    if personas and split is not None:
        raise click.UsageError("--split tells questions apart; leave it out with --personas")
    (bench,) = opened((place,))
    if personas:
        rows = [[one.line, one.pole, one.facet or "", one.text] for one in sample_personas(bench, count, seed, facet)]
        _table(f"{bench.trait}: personas", ["line", "pole", "facet", "text"], rows)
        return
    questions = sample_questions(bench, count, seed, split, facet)
    found = [[one.line, "\n".join(filter(None, _tags(one))), one.text] for one in questions]
    _table(f"{bench.trait}: questions", ["line", "tags", "text"], found)


def _tags(question: Question) -> tuple[str | None, ...]:
    return question.split, question.facet, question.topic, question.person


def opened(places: tuple[str, ...]) -> list[TraitBench]:
    """The named benches, or those of the Big Five; they need not be complete, but no line may be malformed.

    Raises:
        BenchError: a malformed line, or a trait is named twice.
        TraitError: neither a trait nor a folder.
    """
    from npti_export.bench import definition_of, read_bench
    from npti_export.benches import bench_folder
    from npti_export.errors import BenchError
    from npti_export.traits import FACETS

    benches: dict[str, TraitBench] = {}
    for trait, folder in map(bench_folder, places or tuple(FACETS)):
        bench, faults = read_bench(definition_of(trait, folder), folder)
        if faults:
            raise BenchError(f"{faults[0]} (npti-export bench lint {folder} lists all)")
        if trait in benches:
            raise BenchError(f"{trait}: is named twice, by {benches[trait].folder} and {folder}; name it once")
        benches[trait] = bench
    return list(benches.values())


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", show_lines=columns[-1] == "text")
    for place, column in enumerate(columns):
        number = bool(rows) and isinstance(rows[0][place], int)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    tame_console().print(table)
