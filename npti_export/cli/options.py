"""Options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from npti_export.loader import RuntimeSettings
    from npti_export.runtimes.llamacpp.context import Settings
    from npti_export.tuning.opening import ModelJob

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
_GAMMA = "Strength of all but clamps [rule.gamma]"


def decorated(command: Command, decorators: Sequence[Callable[[Command], Command]]) -> Command:
    """A command with options, in the order in which its help lists them."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def llama_options(command: Command) -> Command:
    """Options of every command that runs llama.cpp."""
    return decorated(
        command,
        [
            click.option(
                "--threads", type=click.IntRange(1), metavar="N", help="llama.cpp: threads [default: all cores]"
            ),
            click.option(
                "--gpu-layers", type=click.IntRange(-1), metavar="N", help="llama.cpp: layers on the GPU [default: all]"
            ),
            click.option(
                "--context",
                type=click.IntRange(256),
                metavar="N",
                help="llama.cpp: tokens in the KV cache, of all sequences together [default: as needed]",
            ),
            click.option(
                "--prompt-batch",
                type=click.IntRange(32),
                metavar="N",
                help="llama.cpp: tokens processed at once [default: 512]",
            ),
        ],
    )


def runtime_options(command: Command) -> Command:
    """Options of every command that runs a model: where and how."""
    return decorated(
        command,
        [
            click.option(
                "--runtime",
                "engine",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "llama.cpp", "transformers"]),
                help="What runs the model; auto takes llama.cpp for a GGUF",
            ),
            llama_options,
            click.option(
                "--weights",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "file", "bfloat16"]),
                help="llama.cpp: identify on the file as it is, or on a bfloat16 copy, where that is faster",
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                help="transformers: auto, cpu, cuda, cuda:1, mps, or map: layers spread over all GPUs, then memory",
            ),
            click.option(
                "--dtype",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                help="transformers: of identification; verification is always float32",
            ),
            click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model"),
        ],
    )


def model_options(command: Command) -> Command:
    """Options of every command that identifies neurons."""
    decorators = [
        click.option(
            "--model",
            metavar="FILE|DIR|ID",
            help="GGUF file, transformers directory, hub id or ID:FILE.gguf [default: SmolLM2-135M-Instruct, embedded]",
        ),
        click.option("--recipe", metavar="NAME|FILE", help="Recipe [default: the one tuned for the model, else npti]"),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override any recipe value, such as select.threshold=0.2",
        ),
        click.option(
            "--questions",
            type=click.IntRange(0),
            metavar="N",
            help="Search questions a trait, 0 for all [identify.questions]",
        ),
        click.option(
            "--max-new-tokens", type=int, metavar="N", help="Longest answer while identifying [identify.max_new_tokens]"
        ),
        click.option("--batch-size", type=int, metavar="N", help="Sequences decoded together [identify.batch_size]"),
        click.option(
            "--until",
            type=click.Choice(["stable", "all"]),
            help="Ask until the selected neurons have settled, or every question [identify.until]",
        ),
        click.option("--seed", type=int, metavar="N", help="Pairs questions with personas [identify.seed]"),
        click.option(
            "--bench",
            type=FILE,
            metavar="DIR",
            help="Instead of the shipped bench: a folder with openness/, extraversion/ …, each with personas.jsonl and "
            "questions.jsonl; or, for one trait, with these files",
        ),
        runtime_options,
        click.option(
            "--no-cache", is_flag=True, help="Neither use nor keep saved identifications [default: go on from them]"
        ),
        click.option("--resume", is_flag=True, help="Go on from a run that was stopped, and refuse to begin anew"),
        click.option("--force", is_flag=True, help="Replace existing outputs"),
    ]
    return decorated(command, decorators)


def trait_dir_option(command: Command) -> Command:
    """The option of commands that measure an artifact: where its own traits are defined."""
    return click.option(
        "--trait-dir",
        "trait_dirs",
        type=FILE,
        multiple=True,
        metavar="DIR",
        help="Folder of a trait that an artifact was made with and that is not one of the Big Five",
    )(command)


def _strength(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


def rule_options(command: Command) -> Command:
    """Options of every command that makes rules of profiles."""
    return _rule_options(command, click.option("--gamma", type=float, metavar="X", help=_GAMMA))


def auto_rule_options(command: Command) -> Command:
    """The same, where the strength may be looked for."""
    text = f"{_GAMMA}; auto looks for the one that moves answers most within a budget (about 5 minutes)"
    return _rule_options(command, click.option("--gamma", callback=_strength, metavar="X|auto", help=text))


def _rule_options(command: Command, gamma: Callable[[Command], Command]) -> Command:
    return decorated(
        command,
        [
            gamma,
            click.option(
                "--profile",
                "profiles",
                type=FILE,
                multiple=True,
                metavar="FILE",
                help="Re-use a profile, .safetensors or published .json",
            ),
            click.option("--any-model", is_flag=True, help="Accept a profile of another model of the same shape"),
        ],
    )


def trial_options(command: Command) -> Command:
    """Options of every command that tries settings of one pole."""
    return decorated(
        command,
        [
            click.option("--trait", "trait", required=True, metavar="POLE", help="agreeableness+, calm, ./pirate+ …"),
            click.option("--model", metavar="FILE|DIR|ID", help="As of the main job [default: the embedded one]"),
            click.option(
                "--recipe", metavar="NAME|FILE", help="To start from [default: the one tuned for the model, else npti]"
            ),
            click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override any recipe value"),
            click.option(
                "--answer-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Longest answer"
            ),
            click.option(
                "--personas",
                type=click.IntRange(min=1),
                default=2,
                show_default=True,
                help="Pairs that score an answer",
            ),
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of chance"),
            click.option(
                "--bench", type=FILE, metavar="DIR", help="Personas and questions instead of the shipped ones"
            ),
            runtime_options,
            click.option("--no-cache", is_flag=True, help="Neither use nor keep saved identifications and trials"),
            click.option("--force", is_flag=True, help="Replace what is there"),
        ],
    )


def base_options(command: Command) -> Command:
    """Options of every command that adds neurons to a GGUF: which one, and how it is made where there is none."""
    return decorated(
        command,
        [
            click.option("--base", type=FILE, metavar="FILE", help="GGUF to bake into, where --model is not one"),
            click.option(
                "--converter",
                type=FILE,
                metavar="FILE",
                help="llama.cpp's convert_hf_to_gguf.py, for a directory without --base [default: in LLAMA_CPP_DIR, "
                "else on PATH]",
            ),
            click.option(
                "--requantize",
                metavar="TYPE",
                help="Quantise a float GGUF or directory first, by llama.cpp: Q4_K_M, Q8_0, IQ4_XS …",
            ),
            click.option(
                "--imatrix",
                type=FILE,
                metavar="FILE",
                help="Importance matrix of the model for --requantize, as llama.cpp's llama-imatrix writes it; IQ2_XS "
                "and the like need one",
            ),
            click.option(
                "--layout",
                type=click.Choice(["uniform", "ragged"]),
                help="Widen all layers of a GGUF alike, or each as far as it needs: a smaller file, written as deci, "
                "which fewer programs know; for llama, qwen2 and deci [compile.layout]",
            ),
        ],
    )


def recipe_overrides(options: dict[str, Any]) -> tuple[str, ...]:
    """Take the flags that stand for a recipe value out of ``options``; return them and ``--set`` as overrides."""
    flags = {
        "gamma": "rule.gamma",
        "questions": "identify.questions",
        "max_new_tokens": "identify.max_new_tokens",
        "batch_size": "identify.batch_size",
        "seed": "identify.seed",
        "until": "identify.until",
        "layout": "compile.layout",
    }
    values = [(key, options.pop(name, None)) for name, key in flags.items()]
    return (*options.pop("overrides"), *(f"{key}={value}" for key, value in values if value is not None))


def job_options(options: dict[str, Any]) -> dict[str, Any]:
    """Turn parsed model options into fields of a :class:`npti_export.pipeline.Job`."""
    from npti_export.identify.collect import cache_folder

    options["overrides"] = recipe_overrides(options)
    if options["resume"] and options["no_cache"]:
        raise click.UsageError("--resume goes on from what --no-cache does not keep; give one of the two")
    options["cache"] = None if options.pop("no_cache") else cache_folder()
    options["runtime"] = runtime_settings(options)
    return options


def trial_subject(options: dict[str, Any]) -> ModelJob:
    """Take what says which model and pole out of the options of :func:`trial_options`."""
    from npti_export.identify.collect import cache_folder
    from npti_export.traits import parse_trait
    from npti_export.tuning.opening import ModelJob

    return ModelJob(
        parse_trait(options.pop("trait")),
        overrides=tuple(options.pop("overrides")),
        runtime=runtime_settings(options),
        cache=None if options.pop("no_cache") else cache_folder(),
        **{name: options.pop(name) for name in ("model", "recipe", "bench")},
    )


def llama_settings(options: dict[str, Any]) -> Settings:
    """Take llama.cpp's options out of ``options``."""
    from npti_export.loader import RuntimeSettings

    given = {name: options.pop(name) for name in ("threads", "gpu_layers", "context", "prompt_batch")}
    return RuntimeSettings(**{name: value for name, value in given.items() if value is not None}).llama


def runtime_settings(options: dict[str, Any]) -> RuntimeSettings:
    """Take the runtime options out of ``options``."""
    from npti_export.errors import ModelError
    from npti_export.loader import RuntimeSettings

    if not re.fullmatch(r"auto|map|cpu|mps|cuda(:\d+)?", options["device"]):
        raise ModelError(f"--device {options['device']!r}: give auto, cpu, mps, cuda, cuda:N or map")
    names = (
        "engine",
        "device",
        "dtype",
        "trust_remote_code",
        "threads",
        "gpu_layers",
        "context",
        "prompt_batch",
        "weights",
    )
    given = {name: options.pop(name) for name in names}
    return RuntimeSettings(**{name: value for name, value in given.items() if value is not None})
