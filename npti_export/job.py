"""A job made ready: everything that can be checked or read before anything expensive starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from npti_export.base_file import BasePlan, check_layout, check_request, made_base, plan_base
from npti_export.bench import TraitBench
from npti_export.benches import held_out, load_benches
from npti_export.endings.base import BAKED
from npti_export.errors import AdapterError, ModelError, OutputError, ProfileError, RecipeError
from npti_export.export.gguf import strip
from npti_export.files import sha256_file
from npti_export.gguf.imatrix import ImportanceMatrix
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.shards import read_model, shard_paths
from npti_export.job_checks import (
    bakes,
    check_outputs,
    refuse_idle_options,
    refuse_idle_settings,
    refuse_other_profiles,
    refuse_shared_paths,
    steers_neurons,
)
from npti_export.loader import Timings
from npti_export.models import ModelSource, gguf_source, resolve_model
from npti_export.profile import NeuronProfile
from npti_export.profile_io import load_profile
from npti_export.progress import Progress
from npti_export.recipe import Recipe, recipe_from_json, select_recipe
from npti_export.request import Job
from npti_export.rule_io import SavedRule, Where, artifact_format, base_name, load_rule
from npti_export.temporaries import TemporaryFolder
from npti_export.traits import TraitSpec, parse_recorded

QUESTION_TOKENS = 48  # what a question and its answer bring at least: decides how many the compiler asks
_FOR_NEURONS = ("prompt.", "identify.", "select.", "rule.percentile=")  # what it says of how they are found
_AFTER_THE_RULE = ("compile.", "verify.")  # what a recipe still says of an artifact whose rule is there


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were checked and read, with nothing computed yet.

    Attributes:
        job: what was asked for.
        source: the model.
        base: the GGUF to bake into, for that format; see :func:`with_base` for what is not there yet.
        plan: how to make it.
        saved: the rule of an earlier artifact.
        traits: poles, the job's or the earlier artifact's.
        recipe: resolved.
        kept: of the neurons in a profile that is kept: how they are found, and which of them a published file holds.
        benches: personas and questions by trait.
        profiles: given profiles by trait.
    """

    job: Job
    source: ModelSource
    base: GGUFFile | None
    plan: BasePlan | None
    saved: SavedRule | None
    traits: tuple[TraitSpec, ...]
    recipe: Recipe
    kept: Recipe
    benches: dict[str, TraitBench]
    profiles: dict[str, NeuronProfile]

    @property
    def where(self) -> Where:
        """Positions that the rule is meant for: the job's, else the earlier artifact's, else all."""
        return self.job.where or (self.saved.where if self.saved is not None else "all")


@contextmanager
def prepared(job: Job) -> Iterator[Prepared]:
    """Check everything that can be checked at once; within the block, the model of an earlier artifact is at hand.

    Raises:
        NptiError: whatever is wrong with the job.
    """
    matrix = check_request(job.model, job.base, job.converter, job.requantize, job.imatrix) if bakes(job) else None
    saved = None if job.rule_from is None else load_rule(job.rule_from)
    with _source(job, saved) as source:
        yield _prepare(job, saved, source, matrix)


def _prepare(job: Job, saved: SavedRule | None, source: ModelSource, matrix: ImportanceMatrix | None) -> Prepared:
    traits = job.traits if saved is None else tuple(parse_recorded(text) for text in saved.about.trait.split())
    refuse_idle_options(job, source)
    names = sorted({spec.trait for spec in traits})
    outputs = check_outputs(job, names)
    if len({spec.pole for spec in job.traits}) < len(job.traits):
        raise ProfileError("the same pole is given twice; give it once, with a strength such as openness+:1.5")
    refuse_shared_paths(job, source, outputs)
    writes_or_reads = job.out is not None or saved is not None
    base = _base_of(job, source) if writes_or_reads and job.format in BAKED else None
    plan = _plan(job, source, base, matrix) if bakes(job) else None
    if base is not None and base.shards and job.out is not None and plan is None and job.format == "gguf":
        paths = shard_paths(job.out, len(base.shards))
        others = [path for path in outputs if path != job.out]
        job = replace(job, out=paths[0])
        refuse_shared_paths(job, source, [*others, *paths])
    profiles = {} if saved else _load_profiles(job, source)
    identifies = job.out is None and job.save_profile is not None
    neurons = job.format == "dial" or identifies or _lack_matched(traits, profiles)
    recipe = _recipe(job, saved, source, neurons=neurons)
    refuse_idle_settings(job, recipe, traits, None if saved is None else saved.rule)
    if bakes(job):
        check_layout(source, base, recipe.compile.layout)
    if saved is not None and saved.where == "response" and job.format != "peft" and job.where is None:
        raise OutputError(
            f"{job.rule_from}: steers the response only, and weights steer every position; pass --where all for that"
        )
    benches = load_benches(traits, job.bench, job.trait_dirs)
    kept = _kept_recipe(job, recipe, traits, source)
    refuse_other_profiles(job, source, kept, benches, profiles)
    if saved is None:
        for name, bench in benches.items():
            if name not in profiles:
                _check_questions(job, bench, traits, recipe, kept)
    if writes_or_reads:
        held_out(benches, recipe, recipe.verify.prompts)
    return Prepared(job, source, base, plan, saved, traits, recipe, kept, benches, profiles)


def _check_questions(job: Job, bench: TraitBench, traits: Sequence[TraitSpec], recipe: Recipe, kept: Recipe) -> None:
    """There are as many search questions as neurons are counted on, where they are, and constants matched on."""
    if job.save_profile is not None or steers_neurons(recipe, traits):
        bench.search(kept.identify.questions, kept.identify.seed)
    if any(recipe.for_pole(spec.pole).rule.matched for spec in traits if spec.trait == bench.trait):
        bench.search(recipe.identify.matched_questions, recipe.identify.seed)


@contextmanager
def with_base(ready: Prepared, progress: Progress, timings: Timings) -> Iterator[Prepared]:
    """The job with its base file made, where it has to be, for as long as the block lasts.

    A file made of the model itself is the model from then on; one quantised from ``--base`` is only baked into.

    Raises:
        NptiError: see :func:`npti_export.base_file.made_base`.
    """
    if ready.plan is None:
        yield ready
        return
    assert ready.job.out is not None
    old = ready.source
    with made_base(ready.plan, ready.job.out, progress, timings) as path:
        made, base = gguf_source(path), read_model(path)
        if ready.job.base is None:
            made = replace(made, hub_id=old.hub_id, license=made.license or old.license, digest=sha256_file(path))
        yield replace(ready, base=base, source=made if ready.job.base is None else old)


@contextmanager
def _source(job: Job, saved: SavedRule | None) -> Iterator[ModelSource]:
    """The model: the named one, or that of an earlier artifact.

    A steered GGUF holds its base, which is taken out into a temporary file for as long as the block lasts.
    """
    if saved is None or job.model is not None:
        source = resolve_model(job.model)
        if saved is not None:
            check_same_model(saved, source, any_model=job.any_model)
        yield source
        return
    assert job.rule_from is not None
    if artifact_format(job.rule_from) == "gguf":
        with TemporaryFolder() as folder:
            steered = read_model(job.rule_from)
            base = folder / base_name(steered)
            strip(job.rule_from, base, force=False)
            yield gguf_source(shard_paths(base, len(steered.parts))[0])
        return
    yield _recorded_source(saved)


def _recorded_source(saved: SavedRule) -> ModelSource:
    """The model that an adapter, checkpoint or control vector names: the embedded default, or a place or hub id."""
    default = resolve_model(None)
    if default.fingerprint == saved.about.fingerprint.float32:
        return default
    if saved.about.base is None:
        raise ModelError(f"the rule is for {saved.about.model}, and where that is was not recorded; name it by --model")
    try:
        source = resolve_model(saved.about.base)
    except ModelError as error:
        raise ModelError(f"the rule's own model is not to be had ({error}); name it by --model") from error
    check_same_model(saved, source, any_model=False)
    return source


def check_same_model(saved: SavedRule, source: ModelSource, *, any_model: bool) -> None:
    """Raise unless a rule is for a model.

    Raises:
        AdapterError: other sizes, or another fingerprint and not ``any_model``.
    """
    layers, width = saved.rule.shift.shape
    if (layers, width) != (source.shape.layers, source.shape.width):
        raise AdapterError(
            f"the rule is for {layers} layers of {width} neurons, and {source.name} has {source.shape}; name the right "
            "model by --model"
        )
    if saved.about.fingerprint.float32 != source.fingerprint and not any_model:
        raise AdapterError(
            f"the rule was made for another model ({saved.about.model}) than {source.name}; name the right one by "
            "--model, or pass --any-model to use it all the same"
        )


def _lack_matched(traits: Sequence[TraitSpec], profiles: Mapping[str, NeuronProfile]) -> bool:
    """Whether a given profile knows of neurons only, as the published ones do."""
    return any(spec.trait in profiles and profiles[spec.trait].matched(spec.sign) is None for spec in traits)


def _recipe(job: Job, saved: SavedRule | None, source: ModelSource, *, neurons: bool) -> Recipe:
    """The requested recipe, the earlier artifact's own, or the one for the model.

    Args:
        job: what was asked for.
        saved: the earlier artifact.
        source: the model.
        neurons: nothing but neurons will do.
    """
    if saved is not None:
        for override in job.overrides:
            if not override.strip().startswith(_AFTER_THE_RULE):
                raise RecipeError(
                    f"--set {override}: the rule is there already; only {' '.join(_AFTER_THE_RULE)} count"
                )
    if saved is not None and job.recipe is None:
        try:
            return recipe_from_json(saved.about.recipe, job.overrides)
        except RecipeError:
            if job.overrides:
                raise
    return select_recipe(job.recipe, source.fingerprint, job.overrides, neurons=neurons)


def _kept_recipe(job: Job, recipe: Recipe, traits: Sequence[TraitSpec], source: ModelSource) -> Recipe:
    """The job's own, or, where nobody named one and it steers no neuron, the one for neurons of this model."""
    if job.save_profile is None or job.recipe is not None or steers_neurons(recipe, traits):
        return recipe
    overrides = [one for one in job.overrides if one.strip().startswith(_FOR_NEURONS)]
    return select_recipe(None, source.fingerprint, overrides, neurons=True)


def _base_of(job: Job, source: ModelSource) -> GGUFFile | None:
    """The GGUF to bake into or to verify against; None if it is yet to be converted from the model."""
    if job.base is None and source.kind != "gguf":
        if bakes(job):
            return None
        raise ModelError(
            f"{source.name}: is a transformers model; pass the GGUF that was baked into by --base FILE.gguf"
        )
    path = job.base or source.path
    if job.base is not None and gguf_source(job.base).fingerprint != source.fingerprint:
        raise ModelError(f"{path}: is not the same model as {source.name} (their norm weights differ)")
    return read_model(path)


def _plan(job: Job, source: ModelSource, base: GGUFFile | None, matrix: ImportanceMatrix | None) -> BasePlan | None:
    trusts, kind = job.runtime.trust_remote_code, job.requantize
    return plan_base(source, base, converter=job.converter, requantize=kind, trust_remote_code=trusts, imatrix=matrix)


def _load_profiles(job: Job, source: ModelSource) -> dict[str, NeuronProfile]:
    wanted = {spec.trait for spec in job.traits}
    profiles: dict[str, NeuronProfile] = {}
    for path in job.profiles:
        profile = load_profile(path, source.shape)
        if profile.trait not in wanted:
            raise ProfileError(f"{path}: is a profile of {profile.trait}, which no --trait asks for")
        if profile.trait in profiles:
            raise ProfileError(f"{path}: is a second profile of {profile.trait}; give one")
        profile.check_model(source, any_model=job.any_model)
        profiles[profile.trait] = profile
    return profiles


__all__: Sequence[str] = ("QUESTION_TOKENS", "Job", "Prepared", "check_same_model", "prepared", "with_base")
