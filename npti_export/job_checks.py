"""Of a job: options that would do nothing, and outputs that would replace something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npti_export.endings.base import BAKED, IN_LLAMACPP, SINGLE_FILES
from npti_export.errors import OutputError, ProfileError, RecipeError
from npti_export.files import check_files_writable, check_place, check_writable
from npti_export.gguf.shards import named_shards
from npti_export.loader import RuntimeSettings
from npti_export.models import ModelSource
from npti_export.profile_io import profile_files, profile_paths
from npti_export.recipe import Recipe
from npti_export.request import Job
from npti_export.rule import SteeringRule
from npti_export.runtimes.devices import MAP
from npti_export.traits import TraitSpec

_OTHER_RECIPE = ", or name a recipe that steers neurons, such as --recipe npti"
_HOW_MANY = "; how many questions constants are matched on is --set identify.matched_questions=N"
_FLAGS = {
    "identify.questions": "--questions",
    "identify.until": "--until",
    "compile.program": "--program",
    "compile.layout": "--layout",
}
_OF_IDENTIFYING = (
    "select.",
    "rule.percentile",
    "identify.questions",
    "identify.until",
    "identify.overlap",
    "identify.floor",
)
_OF_SHIFTS = ("rule.slope", "rule.center", "rule.effect_size", "rule.magnitude")
_OF_PROGRAMS = ("compile.",)


def check_outputs(job: Job, traits: Sequence[str]) -> list[Path]:
    """The files that the job will write beside its artifact can be written; returns all outputs."""
    files = [job.report] if job.report is not None else []
    if job.out is not None and job.format in SINGLE_FILES:
        files.append(job.out)
    profiles = [] if job.save_profile is None else _profile_outputs(job, job.save_profile, traits)
    for path in files:
        check_writable(path, force=job.force)
    files += profiles
    return files if job.out is None or job.format in SINGLE_FILES else [*files, job.out]


def _profile_outputs(job: Job, place: Path, traits: Sequence[str]) -> list[Path]:
    if len(traits) > 1 and job.out is not None:
        raise ProfileError("--save-profile takes one trait; npti-export identify saves several, into a folder")
    files = [
        file
        for path, trait in zip(profile_paths(place, traits), traits, strict=True)
        for file in profile_files(path, trait)
    ]
    if len(traits) > 1 and not place.exists():
        check_place(place, 0)  # the folder is made when there is something to put into it
    else:
        check_files_writable(files, force=job.force)
    return files


def refuse_idle_options(job: Job, source: ModelSource) -> None:
    """An option that would do nothing is a misunderstanding, not a detail."""
    idle = {
        "--base is the GGUF to bake into; it goes with --format gguf": job.base is not None and job.format not in BAKED,
        "--checkpoint-dtype goes with --format checkpoint and a GGUF model; a directory keeps its own dtype": (
            job.checkpoint_dtype is not None and (job.format != "checkpoint" or source.kind != "gguf")
        ),
        "--requantize quantises the GGUF to bake into; it goes with --format gguf": (
            job.requantize is not None and job.format not in BAKED
        ),
        "--imatrix weighs what --requantize rounds; it goes with --format gguf": (
            job.imatrix is not None and job.format not in BAKED
        ),
        "--converter makes a GGUF of a directory; it goes with --format gguf": (
            job.converter is not None and job.format not in BAKED
        ),
        "--layout says how wide the layers of a GGUF are; it goes with --format gguf": (
            any(one.startswith("compile.layout=") for one in job.overrides) and job.format not in BAKED
        ),
        "--private goes with --push-to-hub": job.private and job.push_to is None,
        "--evaluation is for the card of --push-to-hub; into another one, evaluate --card puts it": (
            job.evaluation is not None and job.push_to is None
        ),
        "--where response: weights steer every position; it goes with --format peft": (
            job.where == "response" and job.format != "peft"
        ),
    }
    for message, given in (idle | _idle_runtime_options(job, source)).items():
        if given:
            raise OutputError(message)


def _idle_runtime_options(job: Job, source: ModelSource) -> dict[str, bool]:
    settings = job.runtime
    in_llamacpp = settings.engine_for(source) == "llama.cpp"
    identifies_only = job.out is None and job.rule_from is None
    measured_in_llamacpp = job.format in IN_LLAMACPP and not identifies_only
    defaults = RuntimeSettings()
    llamas = ("threads", "gpu_layers", "prompt_batch", "context")
    return {
        f"--dtype is for transformers, and llama.cpp runs {source.name}; leave it out, or add --runtime transformers": (
            settings.dtype != "auto" and in_llamacpp
        ),
        f"--device is for transformers, and llama.cpp runs {source.name} (--gpu-layers); leave it out, or add "
        "--runtime transformers": (
            settings.device != "auto" and in_llamacpp and (identifies_only or measured_in_llamacpp)
        ),
        f"--device map is for identification, and {job.format} files are measured on one device; identify first "
        "(npti-export identify), and give what comes of it as --profile": (
            settings.device == MAP and not (identifies_only or measured_in_llamacpp)
        ),
        "--threads, --gpu-layers, --context and --prompt-batch are for llama.cpp, which runs nothing here": (
            any(getattr(settings, name) != getattr(defaults, name) for name in llamas)
            and not (in_llamacpp or measured_in_llamacpp)
        ),
    }


def steers_neurons(recipe: Recipe, traits: Sequence[TraitSpec]) -> bool:
    """Whether a recipe needs to know neurons for any of these poles."""
    return any(recipe.for_pole(spec.pole).rule.by_neurons for spec in traits)


def refuse_idle_settings(
    job: Job, recipe: Recipe, traits: Sequence[TraitSpec], rule: SteeringRule | None = None
) -> None:
    """A setting of neurons does nothing where a rule has none: matched constants need neither them nor a program.

    Args:
        job: what was asked for; its overrides are looked at, and whether it keeps a profile, which has neurons.
        recipe: resolved.
        traits: poles.
        rule: that of an earlier artifact, where that is used.

    Raises:
        RecipeError: the setting is named.
    """
    if rule is None and steers_neurons(recipe, traits):
        return
    if rule is not None and (rule.shifted or rule.clamped or rule.constant is None):
        return
    whose = f"the recipe {recipe.name} steers no neuron" if rule is None else f"{job.rule_from} steers no neuron"
    for override in job.overrides:
        key = override.partition("=")[0].strip()
        flag = f"{_FLAGS[key]} [{key}]" if key in _FLAGS else f"--set {key}"
        if key.startswith(_OF_PROGRAMS):
            raise RecipeError(
                f"{flag}: says how shifts and clamps are written, and {whose}: its constants are biases under every "
                f"program; leave it out{_OTHER_RECIPE if rule is None else ''}"
            )
        if key.startswith(_OF_SHIFTS) or (key.startswith(_OF_IDENTIFYING) and job.save_profile is None):
            raise RecipeError(
                f"{flag}: says how neurons are found and weighed, and {whose}; leave it out{_OTHER_RECIPE}"
                f"{_HOW_MANY if key == 'identify.questions' else ''}"
            )


def refuse_shared_paths(job: Job, source: ModelSource, outputs: Sequence[Path]) -> None:
    """No output may replace an input, or another output, whatever --force says."""
    resolved = [path.resolve() for path in outputs]
    places = (job.base, job.rule_from, job.bench, job.converter, job.imatrix, *(spec.folder for spec in job.traits))
    given = [path for path in (*places, job.evaluation, *job.trait_dirs) if path is not None]
    parts = [part for path in given for part in named_shards(path)]
    inputs = {path.resolve() for path in [source.path, *source.shards, *job.profiles, *parts]}
    for path, place in zip(outputs, resolved, strict=True):
        if any(one.is_relative_to(place) for one in inputs):
            raise OutputError(f"{path}: is an input of this very job, or holds one; choose another name for the output")
        if sum(one.is_relative_to(place) for one in resolved) > 1:
            raise OutputError(f"{path}: is named for two outputs, or holds another; give each its own place")


def bakes(job: Job) -> bool:
    """Whether a base file gets extra neurons."""
    return job.out is not None and job.format in BAKED
