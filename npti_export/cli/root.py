"""``npti-export --trait … --out …``: the main job, and the list of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npti_export.cli.ablate import ablate
from npti_export.cli.bake_vector import bake_vector
from npti_export.cli.bench import bench
from npti_export.cli.chat import chat
from npti_export.cli.compile import compile_command
from npti_export.cli.dial import dial
from npti_export.cli.evaluate import evaluate
from npti_export.cli.identify import identify
from npti_export.cli.inspect import inspect
from npti_export.cli.long_runs import end_plainly_on_lost_files, log_option
from npti_export.cli.options import (
    FILE,
    auto_rule_options,
    base_options,
    job_options,
    model_options,
    trait_dir_option,
)
from npti_export.cli.progress_bars import RichProgress
from npti_export.cli.report import report_command
from npti_export.cli.strip import strip
from npti_export.cli.traits import traits
from npti_export.cli.tune import tune
from npti_export.cli.verify import verify
from npti_export.terminal import echo, tame_console
from npti_export.version import __version__


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--trait",
    "trait_names",
    multiple=True,
    metavar="POLE",
    help="agreeableness+, neuroticism-:0.5, calm, ./pirate+ (a folder) …; repeat to compose",
)
@click.option("--out", type=FILE, metavar="PATH", help="What to write: a GGUF, or a directory for the other formats")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["gguf", "peft", "checkpoint", "control-vector"]),
    help="GGUF, PEFT adapter, steered transformers checkpoint, or control vector of llama.cpp [default: gguf]",
)
@click.option(
    "--from",
    "rule_from",
    type=FILE,
    metavar="ARTIFACT",
    help="Instead of --trait: an adapter, steered checkpoint or steered GGUF whose rule is used again",
)
@trait_dir_option
@auto_rule_options
@click.option(
    "--program",
    metavar="P",
    help="What a GGUF or checkpoint may cost: exact, bias (no extra neuron), lowrank:R, budget:N% (extra width), kl:X "
    "[compile.program]",
)
@click.option("--save-profile", type=FILE, metavar="FILE", help="Keep the profile, .safetensors or published .json")
@base_options
@click.option("--base-id", metavar="ID", help="Hub id to record as the base model")
@click.option(
    "--where",
    type=click.Choice(["all", "response"]),
    help="Positions that an adapter steers [default: all, or what --from says]",
)
@click.option(
    "--checkpoint-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Weights of a checkpoint made of a GGUF [default: float32]; a directory keeps its own",
)
@click.option("--push-to-hub", "push_to", metavar="REPO", help="Upload the result, with a model card, to owner/name")
@click.option("--evaluation", type=FILE, metavar="R.JSON", help="What evaluate --json wrote of it, for the model card")
@click.option("--private", is_flag=True, help="A new repository is private")
@click.option("--report", type=FILE, metavar="FILE", help="Write the report as JSON")
@model_options
@click.version_option(__version__, prog_name="npti-export")
@click.pass_context
def cli(context: click.Context, /, trait_names: tuple[str, ...], report: Path | None, **options: Any) -> None:
    """Give a language model a fixed personality, in a file that stock runtimes load.

    \b
      npti-export --trait agreeableness+ --out model.gguf
      npti-export --trait ./pirate+ --out pirate.gguf
      npti-export --trait calm --trait extraversion+:0.5 --model Llama-3.2-1B-Instruct-Q4_K_M.gguf --out calm.gguf
      npti-export --trait calm --model Llama-3.2-1B-Instruct-BF16.gguf --requantize Q4_K_M --out calm.gguf
      npti-export --trait openness- --profile openness.safetensors --gamma 1.0 --program bias --out plain.gguf
      npti-export --trait calm --model ./Qwen2.5-0.5B-Instruct --format peft --out calm/
      npti-export --from calm/ --format checkpoint --out calm-qwen/
      npti-export dial --traits all --out persona/

    What was identified is kept as it comes: the same command goes on where it was stopped or killed.
    """
    end_plainly_on_lost_files()
    if context.invoked_subcommand is not None:
        if _given(context):
            raise click.UsageError(f"give the options of {context.invoked_subcommand} after its name")
        return
    if not _given(context):
        click.echo(context.get_help())
        return
    if options["rule_from"] is not None:
        _refuse_beside_from(context)
    elif not trait_names:
        raise click.UsageError("no --trait; name a pole such as agreeableness+ (npti-export traits lists them)")
    if options["out"] is None:
        raise click.UsageError("no --out; name what to write (npti-export identify stops before that)")
    options["format"] = options.pop("format_name") or "gguf"
    program = options.pop("program")
    if program is not None:
        if options["format"] not in ("gguf", "checkpoint"):
            raise click.UsageError("--program says what extra neurons may cost; leave it out for this format")
        options["overrides"] = (*options["overrides"], f"compile.program={program}")
    _main_job(trait_names, report, options)


def _given(context: click.Context) -> bool:
    """Whether any option of the main job was on the command line."""
    default = click.core.ParameterSource.DEFAULT
    return any(context.get_parameter_source(name) not in (default, None) for name in context.params)


def _refuse_beside_from(context: click.Context) -> None:
    """The rule is there already: options that would make another one must not be dropped silently."""
    default = click.core.ParameterSource.DEFAULT
    for name in (
        "trait_names",
        "gamma",
        "profiles",
        "save_profile",
        "questions",
        "max_new_tokens",
        "seed",
        "batch_size",
        "until",
    ):
        if context.get_parameter_source(name) not in (default, None):
            flag = next(one.opts[0] for one in context.command.params if one.name == name)
            raise click.UsageError(f"{flag} makes a rule, and --from brings one; give one of the two")


def _main_job(trait_names: tuple[str, ...], report_path: Path | None, options: dict[str, Any]) -> None:

    from npti_export.traits import parse_trait

    specs = tuple(parse_trait(name) for name in trait_names)
    automatic = options["gamma"] == "auto"
    if automatic:
        options["gamma"] = None
    fields = job_options(options)

    from npti_export.pipeline import Job, run
    from npti_export.publish import push
    from npti_export.report import render, save_report

    job = Job(traits=specs, report=report_path, **fields)
    with RichProgress(tame_console(stderr=True)) as progress:
        if automatic:
            from npti_export.tuning.strength import with_strengths

            job = with_strengths(job, progress)
        report = run(job, progress)
    if report_path is not None:
        save_report(report, report_path, force=fields["force"])
    render(report, tame_console())
    if job.push_to is not None:
        with RichProgress(tame_console(stderr=True)) as progress:
            echo(f"pushed {push(job, report, progress)}")


COMMANDS = (
    ablate,
    bake_vector,
    bench,
    chat,
    compile_command,
    dial,
    evaluate,
    identify,
    inspect,
    report_command,
    strip,
    traits,
    tune,
    verify,
)
for command in COMMANDS:
    cli.add_command(command)
for command in (cli, ablate, evaluate, identify, tune):  # what may take hours
    command.params.append(log_option())
