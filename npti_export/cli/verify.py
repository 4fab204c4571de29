"""``npti-export verify``: does an artifact do what the rule inside it says?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.options import FILE, runtime_options, runtime_settings, trait_dir_option
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import echo_json, tame_console


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--model", metavar="FILE|DIR|ID", help="The unsteered model [default: the one that the artifact names]")
@click.option("--base", type=FILE, metavar="FILE", help="The GGUF that a steered GGUF was baked from, with --model")
@click.option("--any-model", is_flag=True, help="Accept the rule of another model of the same shape")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe with the limits [default: the artifact's own]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, as verify.prompts=16")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@trait_dir_option
@runtime_options
@click.pass_context
def verify(context: click.Context, /, artifact: Path, as_json: bool, **options: Any) -> None:
    """Measure an adapter, a steered checkpoint or a steered GGUF against its rule, in its own runtime.

    The rule is applied to the unsteered model in float32; the exit code is 3 if the artifact is not faithful.

    \b
      npti-export verify model.gguf
      npti-export verify calm/ --model ./Llama-3.2-1B-Instruct
      npti-export verify pirate.gguf --trait-dir ./pirate
    """

    from npti_export.pipeline import Job, verify_artifact
    from npti_export.report import render_verdict
    from npti_export.rule_io import artifact_format

    settings = runtime_settings(options)
    with RichProgress(tame_console(stderr=True)) as progress:
        job = Job(
            traits=(),
            out=None,
            rule_from=artifact,
            format=artifact_format(artifact),
            overrides=options.pop("overrides"),
            runtime=settings,
            **options,
        )
        verdict = verify_artifact(job, progress)
    if as_json:
        echo_json(verdict)
    else:
        render_verdict(verdict, tame_console())
    context.exit(3 if verdict["fault"] else 0)
