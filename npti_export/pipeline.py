"""The main job: traits (or an earlier artifact) in, a verified artifact and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.benches import held_out, searched
from npti_export.endings.base import SINGLE_FILES, Ending, Written
from npti_export.errors import FidelityError, ModelError, NptiError
from npti_export.files import set_aside
from npti_export.job import QUESTION_TOKENS, Job, Prepared, prepared, with_base
from npti_export.loader import Models, Timings
from npti_export.models import ModelSource, gguf_source
from npti_export.obtain import keep_profiles, obtain_profiles
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.publish import check_publication
from npti_export.recipe import Recipe
from npti_export.report import peak_rss_mb
from npti_export.rule import build_rule, compose
from npti_export.rule_io import Provenance, SavedRule
from npti_export.runtimes.base import chat
from npti_export.temporaries import sweep_folders
from npti_export.version import __version__

if TYPE_CHECKING:
    from npti_export.compiler.passes import Compiled
    from npti_export.verify import Fidelity, LayerErrors


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The whole main job.

    Returns:
        The report; see the README for its fields.

    Raises:
        FidelityError: the artifact was written but does not do what the rule says; it is kept as ``OUT.rejected``.
        NptiError: bad input, or an output that cannot be written; nothing is left behind.
    """
    started = time.perf_counter()
    timings = Timings({"identify": 0.0})
    if job.out is None:
        raise ModelError("the main job needs an output")
    with prepared(job) as asked:
        check_publication(asked)
        with (
            with_base(asked, progress, timings) as ready,
            open_models(ready, timings, progress, verifies=True) as models,
            open_ending(ready, models) as ending,
        ):
            assert ready.job.out is not None
            ending.check_output(ready.job.out, force=job.force)
            saved, profiles = obtain_rule(ready, models, timings, progress)
            try:
                report = _deliver(ready, saved, ending, models, timings, progress)
            except FidelityError:
                keep_profiles(ready, profiles)  # which are none the worse for it
                raise
            keep_profiles(ready, profiles)  # last: a run that was stopped must not meet its own output
    report["profiles"] = {trait: profile.origin for trait, profile in profiles.items()}
    report["seconds"] = {key: round(value, 3) for key, value in timings.seconds.items()}
    report["seconds"]["total"] = round(time.perf_counter() - started, 3)
    return report


def open_models(ready: Prepared, timings: Timings, progress: Progress, *, verifies: bool) -> Models:
    """The job's model, not loaded yet, see :class:`npti_export.loader.Models`; room that killed jobs took is freed."""
    sweep_folders()
    sequences = max(one.identify.batch_size for one in (ready.recipe, ready.kept))
    return Models(ready.source, ready.job.runtime, timings, progress, verifies=verifies, sequences=sequences)


def open_ending(ready: Prepared, models: Models) -> Ending:
    """The ending of the job's format.

    Raises:
        ArchitectureError: the model cannot be written in it; said by name, with the formats that can.
    """
    job = ready.job
    if job.format == "peft":
        from npti_export.endings.peft import PeftEnding

        return PeftEnding(models.exact, identity_checked=job.out is not None or not job.any_model)
    if job.format == "control-vector":
        from npti_export.endings.control_vector import ControlVectorEnding

        questions = searched(ready.benches, ready.recipe, ready.recipe.verify.prompts)
        return ControlVectorEnding(ready.source, ready.recipe, models.settings.llama, questions)
    ready.source.check_compilable()
    if job.format == "checkpoint":
        from npti_export.endings.checkpoint import CheckpointEnding

        questions = calibration_questions(ready)
        return CheckpointEnding(ready.source, models.exact, ready.recipe, job.checkpoint_dtype, questions)
    from npti_export.endings.gguf import GGUFEnding

    assert ready.base is not None
    return GGUFEnding(ready.base, ready.recipe, models.settings.llama, calibration_questions(ready))


def calibration_questions(ready: Prepared) -> list[str]:
    """Search questions for as many tokens as programs are fitted on."""
    return searched(ready.benches, ready.recipe, -(-ready.recipe.compile.calibration_tokens // QUESTION_TOKENS))


def obtain_rule(
    ready: Prepared, models: Models, timings: Timings, progress: Progress
) -> tuple[SavedRule, dict[str, NeuronProfile]]:
    """The rule, and the profile of each trait."""
    if ready.saved is not None:
        return SavedRule(ready.saved.rule, _described_again(ready, ready.saved.about), ready.where), {}
    profiles = obtain_profiles(ready, models, timings, progress)
    models.release_fast()
    with timings.measure("rule"):
        rule = compose([build_rule(profiles[spec.trait], spec, ready.recipe) for spec in ready.traits])
    about = Provenance(
        trait=" ".join(map(str, ready.traits)),
        gamma=ready.recipe.rule.gamma,
        recipe=ready.recipe.to_json(),
        **_identity(ready),
    )
    return SavedRule(rule, about, ready.where), profiles


def _described_again(ready: Prepared, about: Provenance) -> Provenance:
    """The provenance of an earlier artifact's rule: of this model, if that is another one."""
    if about.fingerprint.float32 != ready.source.fingerprint:
        about = replace(about, **_identity(ready))
    base = ready.job.base_id or about.base
    if not _keeps_places(ready.job) and base is not None and Path(base).is_absolute():
        base = None
    return replace(about, base=base, version=__version__, fidelity={})


def _identity(ready: Prepared) -> dict[str, Any]:
    """The fields of a provenance that say which model it is."""
    source = ready.source
    place = str(source.path.resolve()) if _keeps_places(ready.job) else None
    return {
        "model": source.hub_id or (source.path.name if source.kind == "directory" else source.name),
        "model_type": source.model_type,
        "fingerprint": source.identity,
        "base": ready.job.base_id or source.hub_id or place,
        "license": source.license,
    }


def _keeps_places(job: Job) -> bool:
    """What needs its base says where on this machine that is, as PEFT does, unless it leaves it."""
    return job.format != "gguf" and job.push_to is None


def _deliver(
    ready: Prepared, saved: SavedRule, ending: Ending, models: Models, timings: Timings, progress: Progress
) -> dict[str, Any]:
    """Write, verify, describe and publish."""
    out = ready.job.out
    assert out is not None
    with ending.output(out, force=ready.job.force) as temporary:
        in_llamacpp = _runs_in_llamacpp(ready, models)
        if not in_llamacpp:
            models.exact()  # first: a checkpoint is written from it, and its loading is not part of the writing
        with timings.measure("compile"):
            compiled = ending.compile(saved, progress)
        progress.start("write", 1)
        with timings.measure("write"):
            written = ending.write(saved, temporary)
        progress.advance(1)
        with timings.measure("verify"):
            fidelity, layers = measure_artifact(ready, models, saved, ending, temporary, progress, compiled)
        saved = replace(saved, about=replace(saved.about, fidelity=asdict(fidelity)))
        exact = ending.exact(temporary)
        name = ready.base.path.name if ready.base else ready.source.name
        fault = fidelity.fault(ready.recipe, exact=exact, base=name, share=ending.share) or (layers and layers.fault())
        with timings.measure("sample"):
            sample = None if fault else _sample(ready, ending, temporary, progress)
        limit = fidelity.limit(ready.recipe, exact=exact, share=ending.share)
        report = _report(ready, saved, written, limit, sample)
        report["program"] = compiled and _described(ready.recipe, compiled)
        report["layers"] = layers and asdict(layers)
        ending.finish(temporary, saved, report)
        if fault is not None:
            raise FidelityError(f"{out}: not delivered: {fault}; it is kept as {set_aside(temporary, out)}")
        report["artifact"]["sha256"] = ending.digest(temporary)
    return report


def _described(recipe: Recipe, compiled: Compiled) -> dict[str, Any]:
    return {"kind": recipe.compile.program, "steps": [asdict(step) for step in compiled.steps]}


def measure_artifact(
    ready: Prepared,
    models: Models,
    saved: SavedRule,
    ending: Ending,
    path: Path,
    progress: Progress,
    compiled: Compiled | None = None,
) -> tuple[Fidelity, LayerErrors | None]:
    """Compare an artifact with its rule on held-out questions and the steered answers to them.

    What runs in llama.cpp is measured there, without torch, if the model is such a file itself; then each layer is
    compared, too: with the rule, or with a program that approximates it, where that is at hand (``compiled``).
    """
    recipe = ready.recipe
    questions = [chat(None, text) for text in held_out(ready.benches, recipe, recipe.verify.prompts)]
    if _runs_in_llamacpp(ready, models):
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
        from npti_export.verify_llamacpp import measure_file

        base, target = models.llama(), baked_into(ready)
        with ExitStack() as stack:
            file = None
            if target.path != ready.source.path:
                file = stack.enter_context(LlamaCppRuntime(target.path, models.settings.llama, source=target))
            artifact = ending.in_llamacpp(path, target)
            assert artifact is not None
            stack.enter_context(artifact)
            prompts = [base.encode(question) for question in questions]
            approximates = ending.exact(path) is None
            program = compiled.program if compiled is not None and approximates else None
            fidelity, layers = measure_file(
                base, artifact, saved.rule, prompts, recipe, progress, file=file, program=program
            )
            return fidelity, None if approximates and program is None else layers
    from npti_export.verify import measure

    runtime = models.exact()
    prompts = [runtime.encode(question) for question in questions]
    return measure(runtime, saved.rule, ending.artifact(path), ending.base(), prompts, recipe, progress), None


def baked_into(ready: Prepared) -> ModelSource:
    """The GGUF that extra neurons are added to: the model itself, or ``--base``, the same model in another type."""
    if ready.base is None or ready.base.path == ready.source.path:
        return ready.source
    return gguf_source(ready.base.path)


def _runs_in_llamacpp(ready: Prepared, models: Models) -> bool:
    return ready.job.format in SINGLE_FILES and models.engine == "llama.cpp"


def _sample(ready: Prepared, ending: Ending, artifact: Path, progress: Progress) -> dict[str, str] | None:
    """One held-out question answered by the base and by the artifact, in the artifact's runtime.

    The artifact is verified by then: if the sample cannot be had, a note says so and there is none.
    """
    question = held_out(ready.benches, ready.recipe, 1)[0]
    progress.start("sample answers", 1)
    try:
        answers = ending.answers(artifact, chat(None, question), ready.recipe.identify.repetition_penalty)
    except NptiError as error:
        progress.note(f"no sample answers: {error}")
        return None
    progress.advance(1)
    return {"question": question, **answers}


def _report(
    ready: Prepared, saved: SavedRule, written: Written, limit: float, sample: dict[str, str] | None
) -> dict[str, Any]:
    out, about, rule = ready.job.out, saved.about, saved.rule
    artifact: dict[str, Any] = {"path": str(out), "format": ready.job.format, "bytes": written.nbytes}
    if written.base_bytes is not None:
        artifact |= {"base_bytes": written.base_bytes, "base_sha256": written.base_sha256}
    hub_id = ready.job.base_id or ready.source.hub_id
    return {
        "version": __version__,
        "trait": about.trait,
        "traits": about.trait.split(),
        "poles": _poles(ready),
        "gamma": about.gamma,
        "model": {
            "name": about.model,
            "fingerprint": about.fingerprint.float32,
            "id": hub_id,
            "license": about.license,
        },
        "neurons": {
            "shift": rule.shifted,
            "clamp": rule.clamped,
            **({"constant": rule.constants} if rule.constants else {}),
            "shift_per_layer": (rule.shift != 0).sum(1).tolist(),
            "clamp_per_layer": rule.clamp.sum(1).tolist(),
            "width": rule.shift.shape[1],
            "extra_width": written.extra_width,
            "extra_width_mean": round(written.extra_width_mean, 1),
        },
        "fidelity": {key: float(value) for key, value in about.fidelity.items()} | {"limit": limit},
        "peak_rss_mb": peak_rss_mb(),
        "artifact": artifact,
        "sample": sample,
        "recipe": json.loads(ready.recipe.to_json()),
    }


def _poles(ready: Prepared) -> list[dict[str, str]]:
    """What each pole is called and means, by the definition of its trait."""
    found = []
    for spec in ready.traits:
        pole = ready.benches[spec.trait].definition.pole(spec.sign)
        found.append({"pole": spec.pole, "name": pole.name, "description": pole.description})
    return found


def identify_only(job: Job, progress: Progress) -> tuple[dict[str, NeuronProfile], dict[str, float]]:
    """The ``identify`` command: traits, both poles of each, and their profiles written to ``job.save_profile``."""
    timings = Timings()
    with prepared(job) as ready, open_models(ready, timings, progress, verifies=False) as models:
        profiles = obtain_profiles(ready, models, timings, progress)
        keep_profiles(ready, profiles)
    return profiles, timings.seconds


def verify_artifact(job: Job, progress: Progress) -> dict[str, Any]:
    """The ``verify`` command: measure the artifact ``job.rule_from`` against the rule inside it.

    Returns:
        ``fidelity``, its ``limit`` and ``fault`` (None if it is faithful), with what was measured.
    """
    assert job.rule_from is not None
    timings = Timings()
    with prepared(job) as ready:
        assert ready.saved is not None
        with open_models(ready, timings, progress, verifies=True) as models, open_ending(ready, models) as ending:
            fidelity, layers = measure_artifact(ready, models, ready.saved, ending, job.rule_from, progress)
            exact, share = ending.exact(job.rule_from), ending.share
            fault = fidelity.fault(ready.recipe, exact=exact, base=ready.source.name, share=share)
            fault = fault or (layers.fault() if layers else None)
    return {
        "artifact": str(job.rule_from),
        "format": job.format,
        "trait": ready.saved.about.trait,
        "model": ready.saved.about.model,
        "fidelity": asdict(fidelity),
        "limit": fidelity.limit(ready.recipe, exact=exact, share=share),
        "layers": layers and asdict(layers),
        "fault": fault,
    }


__all__: Sequence[str] = ("Job", "identify_only", "obtain_profiles", "run", "verify_artifact")
