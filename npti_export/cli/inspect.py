"""``npti-export inspect``: what a file or directory is, and where it came from."""

from __future__ import annotations

from pathlib import Path

import click

from npti_export.cli.options import FILE
from npti_export.terminal import echo, echo_json


@click.command()
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def inspect(file: Path, as_json: bool) -> None:
    """Print what an artifact or a profile is, and where it came from.

    \b
      npti-export inspect model.gguf
      npti-export inspect extraversion.safetensors --json
    """
    import json

    from npti_export.inspection import inspect_file

    found = inspect_file(file)
    if as_json:
        echo_json(found)
        return
    width = max(map(len, found))
    for key, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        echo(f"{key:<{width}}  {text}")
