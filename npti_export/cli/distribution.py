"""Options of commands whose questions may be asked by several workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from npti_export.cli.options import Command, decorated

if TYPE_CHECKING:
    from npti_export.distribute.plan import Distribution


def distribution_options(command: Command) -> Command:
    """Which engine asks, with how many workers, and where."""
    return decorated(
        command,
        [
            click.option(
                "--engine",
                "asked_by",
                default="local",
                show_default=True,
                type=click.Choice(["local", "ray"]),
                help="Who asks the questions: this process, or workers on Ray",
            ),
            click.option(
                "--workers",
                type=click.IntRange(1),
                metavar="N",
                help="ray: processes that answer, each with the model [default: what GPUs hold, or one for four cores]",
            ),
            click.option(
                "--gpus",
                type=click.IntRange(1),
                metavar="N",
                help="ray: of each worker, over which it spreads the model [default: 1, with --device map a node's]",
            ),
            click.option(
                "--address",
                metavar="HOST:PORT|auto|local",
                help="ray: a cluster to join, as Ray writes it [default: RAY_ADDRESS, or a Ray of this machine]",
            ),
        ],
    )


def distribution_of(options: dict[str, Any]) -> Distribution | None:
    """Take those options out of ``options``; None: this process."""
    from npti_export.distribute.cluster import import_ray
    from npti_export.distribute.plan import Distribution

    engine, workers, address, gpus = (options.pop(name) for name in ("asked_by", "workers", "address", "gpus"))
    if engine == "local":
        for name, value in (("--workers", workers), ("--address", address), ("--gpus", gpus)):
            if value is not None:
                raise click.UsageError(f"{name} goes with --engine ray; this process has no workers")
        return None
    import_ray()  # said before a model is read
    return Distribution(workers, address, gpus)
