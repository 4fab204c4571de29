"""``npti-export traits``: what --trait understands."""

from __future__ import annotations

import click


@click.command()
def traits() -> None:
    """List the traits, their facets and the everyday names."""
    from npti_export.traits import EVERYDAY, FACETS

    for trait, facets in FACETS.items():
        click.echo(f"{trait}: {', '.join(facets)}")
        for sign in "+-":
            names = [name for name, pole in EVERYDAY.items() if pole == trait + sign]
            click.echo(f"  {trait + sign:<20}{', '.join(names)}")
    click.echo("A strength may follow: neuroticism-:0.5, calm:1.5")
    click.echo("A folder may define another trait: ./pirate+ (npti-export bench new pirate makes one to fill in)")
