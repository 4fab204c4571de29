"""``npti-export bake-vector``: a control vector or a constant, as biases inside a GGUF."""

from __future__ import annotations

from typing import Any

import click

from npti_export.cli.options import FILE, llama_options, llama_settings
from npti_export.cli.progress_bars import RichProgress
from npti_export.terminal import echo_json, tame_console


@click.command("bake-vector")
@click.argument("vector", type=FILE)
@click.option(
    "--model", metavar="FILE|ID:FILE", help="The GGUF to bake into [default: SmolLM2-135M-Instruct, embedded]"
)
@click.option("--out", required=True, type=FILE, metavar="FILE", help="The steered GGUF")
@click.option("--scale", default=1.0, show_default=True, metavar="X", help="Multiplies the vector; may be negative")
@click.option("--any-model", is_flag=True, help="Accept a vector that says it is for another model of the same shape")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, as verify.prompts=16")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@click.option("--force", is_flag=True, help="Replace an existing file")
@llama_options
def bake_vector(as_json: bool, **options: Any) -> None:
    """Bake a control vector of llama.cpp or repeng into a GGUF, as biases: exact, no neuron added, no byte of a weight
    changed.

    VECTOR may also be a constant for the inputs of the down projections (.safetensors or .json, as DPN-LE adds). The
    file is measured against llama.cpp with the control vector before it is delivered; npti-export strip gives the
    unsteered file back.

    \b
      npti-export bake-vector happy.gguf --model Llama-3.2-1B-Instruct-Q4_K_M.gguf --scale 0.8 --out happy-llama.gguf
    """

    from npti_export.bake_vector import VectorJob
    from npti_export.bake_vector import bake_vector as bake
    from npti_export.report import render_vector

    job = VectorJob(settings=llama_settings(options), **options)
    with RichProgress(tame_console(stderr=True)) as progress:
        report = bake(job, progress)
    if as_json:
        echo_json(report)
    else:
        render_vector(report, tame_console())
