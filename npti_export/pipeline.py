"""The main job: traits in, a verified steered GGUF and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.bench import TraitBench, load_bench
from npti_export.compiler.exact import compile_exact
from npti_export.errors import FidelityError, ModelError, NptiError, OutputError, ProfileError
from npti_export.export.gguf import BakePlan, check_base, plan_bake, record, write_bake
from npti_export.files import atomic_output, check_writable, sha256_file
from npti_export.gguf.reader import GGUFFile, read_gguf
from npti_export.gguf.writer import Value
from npti_export.identify.collect import identify
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import ModelSource, gguf_source, resolve_model
from npti_export.profile import NeuronProfile
from npti_export.profile_io import load_profile, profile_files, save_profile
from npti_export.progress import Progress
from npti_export.recipe import Recipe, select_recipe
from npti_export.report import peak_rss_mb
from npti_export.rule import SteeringRule, build_rule, compose
from npti_export.runtimes.base import chat
from npti_export.traits import TraitSpec
from npti_export.version import __version__

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime
    from npti_export.verify import Fidelity

_SAMPLE_TOKENS, _SAMPLE_CONTEXT = 96, 2048


@dataclass(frozen=True)
class Job:
    """What a user asked for.

    Attributes:
        traits: poles to steer towards.
        out: the GGUF to write; None stops after the profile.
        model: see :func:`npti_export.models.resolve_model`.
        base: the GGUF to bake into, where ``model`` is not one.
        recipe: name or path; None picks by model.
        overrides: ``section.key=value`` strings.
        profiles: saved profiles to re-use.
        save_profile: where to keep the profile.
        report: where the caller will write the report; only checked here.
        bench: folder of personas and questions instead of the shipped ones (one trait only).
        any_model: accept a profile of another model of the same shape.
        force: replace existing outputs.
        cache: folder of resumable state; None keeps none.
    """

    traits: tuple[TraitSpec, ...]
    out: Path | None
    model: str | None = None
    base: Path | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    profiles: tuple[Path, ...] = ()
    save_profile: Path | None = None
    report: Path | None = None
    bench: Path | None = None
    any_model: bool = False
    force: bool = False
    cache: Path | None = None
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were checked and read, with nothing computed yet."""

    job: Job
    source: ModelSource
    base: GGUFFile | None
    recipe: Recipe
    benches: dict[str, TraitBench]
    profiles: dict[str, NeuronProfile]


def prepare(job: Job) -> Prepared:
    """Check everything that can be checked before anything expensive starts.

    Raises:
        NptiError: whatever is wrong with the job.
    """
    traits = sorted({spec.trait for spec in job.traits})
    outputs = [path for path in (job.out, job.report) if path is not None]
    if job.save_profile is not None:
        outputs += profile_files(job.save_profile, traits[0])
    for path in outputs:
        check_writable(path, force=job.force)
    if len({spec.pole for spec in job.traits}) < len(job.traits):
        raise ProfileError("the same pole is given twice; give it once, with a strength such as openness+:1.5")
    if job.save_profile is not None and len(traits) > 1:
        raise ProfileError("--save-profile takes one trait; save several with npti-export identify, one by one")
    source = resolve_model(job.model)
    _refuse_shared_paths(job, source, outputs)
    base = _base_of(job, source) if job.out is not None else None
    recipe = select_recipe(job.recipe, source.fingerprint, job.overrides)
    profiles = _load_profiles(job, source)
    benches = {trait: load_bench(trait, job.bench) for trait in traits}
    for trait, bench in benches.items():
        if trait not in profiles:
            bench.search(recipe.identify.questions, recipe.identify.seed)
    if job.out is not None and base is not None:
        _held_out(benches, recipe, recipe.verify.prompts)
        check_writable(job.out, force=job.force, need_bytes=base.size)
    return Prepared(job, source, base, recipe, benches, profiles)


def obtain_profiles(
    prepared: Prepared, models: Models, timings: Timings, progress: Progress
) -> dict[str, NeuronProfile]:
    """The profile of each trait: given, cached or identified now; saved where the job says."""
    job, profiles = prepared.job, dict(prepared.profiles)
    for trait, bench in prepared.benches.items():
        if trait in profiles:
            continue
        loaded = timings.seconds.get("load", 0.0)
        started = time.perf_counter()
        profiles[trait] = identify(
            models.fast,
            prepared.source,
            bench,
            prepared.recipe,
            progress,
            dtype=models.dtype(),
            device=models.device(),
            cache=job.cache,
        )
        loading = timings.seconds.get("load", 0.0) - loaded
        timings.seconds["identify"] = timings.seconds.get("identify", 0.0) + time.perf_counter() - started - loading
    if job.save_profile is not None:
        select = prepared.recipe.select
        (profile,) = profiles.values()
        save_profile(profile, job.save_profile, force=job.force, threshold=select.threshold, at_least=select.at_least)
    return profiles


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The whole main job.

    Returns:
        The report; see the README for its fields.

    Raises:
        FidelityError: the file was written but does not do what the rule says; it is kept as ``OUT.rejected``.
        NptiError: bad input, or an output that cannot be written; nothing is left behind.
    """
    started = time.perf_counter()
    timings = Timings({"identify": 0.0})
    prepared = prepare(job)
    if job.out is None or prepared.base is None:
        raise ModelError("the main job needs an output file")
    base = prepared.base
    with ThreadPoolExecutor(1) as pool:
        base_sha256: Future[str] = pool.submit(sha256_file, base.path)
        models = Models(prepared.source, job.runtime, timings, progress, verifies=True)
        profiles = obtain_profiles(prepared, models, timings, progress)
        models.release_fast()
        with timings.measure("compile"):
            rule = compose([build_rule(profiles[spec.trait], spec, prepared.recipe) for spec in job.traits])
            program = compile_exact(rule, prepared.recipe.compile.clamp_units)
            plan = plan_bake(base, program, _metadata(prepared, rule), base_sha256.result())
        with atomic_output(job.out, force=job.force) as temporary:
            progress.start("write", 1)
            with timings.measure("write"):
                write_bake(plan, temporary)
            progress.advance(1)
            runtime = models.exact()
            with timings.measure("verify"):
                fidelity = _verify(prepared, runtime, rule, temporary, progress)
            record(temporary, {f"fidelity.{key}": float(value) for key, value in asdict(fidelity).items()})
            _refuse_unfaithful(fidelity, prepared, temporary)
            digest = sha256_file(temporary)
    with timings.measure("sample"):
        sample = _sample(prepared, job.out, progress)
    timings.seconds["total"] = time.perf_counter() - started
    return _report(prepared, profiles, rule, plan, fidelity, sample, digest, timings)


def _refuse_shared_paths(job: Job, source: ModelSource, outputs: Sequence[Path]) -> None:
    """No output may replace an input, or another output, whatever --force says."""
    resolved = [path.resolve() for path in outputs]
    inputs = {path.resolve() for path in [source.path, *job.profiles, *([job.base] if job.base else [])]}
    for path, place in zip(outputs, resolved, strict=True):
        if place in inputs:
            raise OutputError(f"{path}: is an input of this very job; choose another name for the output")
        if resolved.count(place) > 1:
            raise OutputError(f"{path}: is named for two outputs; give each its own name")


def _base_of(job: Job, source: ModelSource) -> GGUFFile:
    if job.base is None and source.kind != "gguf":
        raise ModelError(
            f"{source.name}: is a transformers model, and a GGUF is baked into a GGUF; convert it with llama.cpp's "
            "convert_hf_to_gguf.py and pass the result as --base FILE.gguf"
        )
    path = job.base or source.path
    if job.base is not None and gguf_source(job.base).fingerprint != source.fingerprint:
        raise ModelError(f"{path}: is not the same model as {source.name} (their norm weights differ)")
    header = read_gguf(path)
    check_base(header)
    return header


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


def _ascii_name(path: Path) -> str:
    """A file's name with what is not ASCII escaped, fit for metadata whatever bytes the file system holds."""
    return path.name.encode("ascii", "backslashreplace").decode("ascii")


def _metadata(prepared: Prepared, rule: SteeringRule) -> dict[str, Value]:
    from npti_export.verify import Fidelity

    placeholders: dict[str, Value] = {f"fidelity.{name}": float("nan") for name in Fidelity.__dataclass_fields__}
    return {
        "version": __version__,
        "trait": " ".join(map(str, prepared.job.traits)),
        "gamma": prepared.recipe.rule.gamma,
        "recipe": prepared.recipe.to_json(),
        "model.fingerprint": prepared.source.fingerprint,
        "base.name": _ascii_name(prepared.base.path) if prepared.base else "",
        "neurons.shift": rule.shifted,
        "neurons.clamp": rule.clamped,
        **placeholders,
    }


def _verify(
    prepared: Prepared, runtime: TransformersRuntime, rule: SteeringRule, artifact: Path, progress: Progress
) -> Fidelity:
    from npti_export.verify import measure

    assert prepared.base is not None
    recipe = prepared.recipe
    prompts = [runtime.encode(chat(None, text)) for text in _held_out(prepared.benches, recipe, recipe.verify.prompts)]
    return measure(runtime, rule, artifact, prepared.base.path, prompts, recipe, progress)


def _held_out(benches: dict[str, TraitBench], recipe: Recipe, count: int) -> list[str]:
    """Test questions of the requested traits in turn, as the user would send them.

    Raises:
        BenchError: there are fewer.
    """
    share = -(-count // len(benches))
    pools = [bench.test(share) for bench in benches.values()]
    mixed = [question for turn in zip(*pools, strict=True) for question in turn]
    return [recipe.prompt.user.replace("{question}", question.text) for question in mixed[:count]]


def _refuse_unfaithful(fidelity: Fidelity, prepared: Prepared, temporary: Path) -> None:
    assert prepared.base is not None
    assert prepared.job.out is not None
    fault = fidelity.fault(prepared.base, prepared.recipe)
    if fault is None:
        return
    aside = prepared.job.out.with_name(prepared.job.out.name + ".rejected")
    temporary.replace(aside)
    raise FidelityError(f"{prepared.job.out}: not delivered: {fault}; the file is kept as {aside}")


def _sample(prepared: Prepared, artifact: Path, progress: Progress) -> dict[str, str] | None:
    """One held-out question answered by the base and by the steered file, in llama.cpp.

    The file is verified and delivered by then: if the sample cannot be had, a note says so and there is none.
    """
    from npti_export.runtimes.llamacpp import LlamaCppRuntime

    assert prepared.base is not None
    question = _held_out(prepared.benches, prepared.recipe, 1)[0]
    sample = {"question": question}
    progress.start("sample answers", 2)
    try:
        for name, path in (("base", prepared.base.path), ("steered", artifact)):
            with LlamaCppRuntime(path, context=_SAMPLE_CONTEXT, all_logits=False) as runtime:
                sample[name] = runtime.answer(
                    chat(None, question),
                    max_new_tokens=_SAMPLE_TOKENS,
                    repetition_penalty=prepared.recipe.identify.repetition_penalty,
                )
            progress.advance(1)
    except NptiError as error:
        progress.note(f"no sample answers: {error}")
        return None
    return sample


def _report(
    prepared: Prepared,
    profiles: dict[str, NeuronProfile],
    rule: SteeringRule,
    plan: BakePlan,
    fidelity: Fidelity,
    sample: dict[str, str] | None,
    digest: str,
    timings: Timings,
) -> dict[str, Any]:
    assert prepared.base is not None
    assert prepared.job.out is not None
    out = prepared.job.out
    return {
        "version": __version__,
        "trait": " ".join(map(str, prepared.job.traits)),
        "traits": [str(spec) for spec in prepared.job.traits],
        "gamma": prepared.recipe.rule.gamma,
        "model": {"name": prepared.source.name, "fingerprint": prepared.source.fingerprint},
        "neurons": {
            "shift": rule.shifted,
            "clamp": rule.clamped,
            "shift_per_layer": (rule.shift != 0).sum(1).tolist(),
            "clamp_per_layer": rule.clamp.sum(1).tolist(),
            "width": plan.program.width,
            "extra_width": plan.extra,
        },
        "fidelity": {key: float(value) for key, value in asdict(fidelity).items()}
        | {"limit": fidelity.limit(prepared.base, prepared.recipe)},
        "seconds": {key: round(value, 3) for key, value in timings.seconds.items()},
        "peak_rss_mb": peak_rss_mb(),
        "artifact": {
            "path": str(out),
            "bytes": plan.nbytes,
            "sha256": digest,
            "base_bytes": prepared.base.size,
            "base_sha256": plan.base_sha256,
        },
        "sample": sample,
        "profiles": {trait: profile.origin for trait, profile in profiles.items()},
        "recipe": json.loads(prepared.recipe.to_json()),
    }


def identify_only(job: Job, progress: Progress) -> tuple[NeuronProfile, dict[str, float]]:
    """The ``identify`` command: one trait, both poles, and its profile written to ``job.save_profile``."""
    timings = Timings()
    prepared = prepare(job)
    models = Models(prepared.source, job.runtime, timings, progress, verifies=False)
    profiles = obtain_profiles(prepared, models, timings, progress)
    (profile,) = profiles.values()
    return profile, timings.seconds


__all__: Sequence[str] = ("Job", "identify_only", "prepare", "run")
