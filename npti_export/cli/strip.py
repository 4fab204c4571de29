"""``npti-export strip``: the base file back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import click

from npti_export.cli.options import FILE
from npti_export.terminal import echo


@click.command()
@click.argument("file", type=FILE)
@click.option("--out", required=True, type=FILE, metavar="FILE", help="Where the base file goes")
@click.option("--force", is_flag=True, help="Replace an existing file")
def strip(file: Path, out: Path, force: bool) -> None:
    """Take the steering out of a GGUF: restores the base file bit for bit.

    \b
      npti-export strip model.gguf --out base.gguf
    """
    from npti_export.export.gguf import strip as strip_file
    from npti_export.gguf.shards import read_model, shard_paths

    digest = strip_file(file, out, force=force)
    first, *others = shard_paths(out, len(read_model(file).parts))
    echo(f"wrote {first}, the base file bit for bit (sha256 {digest})")
    for path in others:
        echo(f"wrote {path}, bit for bit")
