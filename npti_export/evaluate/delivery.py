"""From options to an evaluation, and from it to files and a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.errors import AdapterError, OutputError
from npti_export.evaluate.card import check_card, update_card
from npti_export.evaluate.document import Condition, Document
from npti_export.evaluate.estimate import interval, share
from npti_export.evaluate.poles import judged_otherwise, judged_pole
from npti_export.evaluate.run import EvaluationJob, evaluate
from npti_export.evaluate.subject import SubjectJob
from npti_export.evaluate.supplements import (
    AblationRecord,
    TuningRecord,
    check_same,
    differs,
    read_ablation,
    read_tuning,
    supplemented,
)
from npti_export.files import atomic_output, check_writable
from npti_export.identify.collect import cache_folder
from npti_export.loader import RuntimeSettings
from npti_export.models import resolve_model
from npti_export.progress import Progress
from npti_export.recipe import Recipe, recipe_from_json
from npti_export.rule_io import load_rule
from npti_export.traits import parse_recorded, parse_trait

if TYPE_CHECKING:
    from rich.console import Console


def evaluation_job(artifact: Path, settings: RuntimeSettings, options: dict[str, Any]) -> EvaluationJob:
    """A job from parsed command-line options.

    Raises:
        EvaluationError: a baseline that is none.
    """
    subject = SubjectJob(
        artifact=artifact,
        model=options["model"],
        trait=options["trait"],
        bench=options["bench"],
        trait_dirs=tuple(options["trait_dirs"]),
        any_model=options["any_model"],
        # an artifact that runs in torch: what llama.cpp is told is meant for the judges
        runtime=replace(settings, threads=0, gpu_layers=-1) if options["judges"] and artifact.is_dir() else settings,
        cache=None if options["no_cache"] else cache_folder(),
    )
    names = [name.strip() for name in options["baselines"].split(",")]
    return EvaluationJob(
        subject,
        questions=options["questions"],
        answer_tokens=options["answer_tokens"],
        personas=options["personas"],
        baselines=tuple(name for name in names if name not in ("", "none")),
        prompted=not options["no_prompts"],
        judges=options["judges"],
        journal=options["judge_journal"],
        inventory=options["inventory"],
        skips=frozenset(options["skips"]),
        tasks=tuple(options["tasks"]),
        harness=tuple(name.strip() for name in (options["harness"] or "").split(",") if name.strip()),
        harness_limit=options["harness_limit"],
        seed=options["seed"],
    )


def deliver(
    job: EvaluationJob,
    console: Console,
    progress: Progress,
    *,
    json_path: Path | None = None,
    html_path: Path | None = None,
    card_path: Path | None = None,
    pareto_path: Path | None = None,
    sweeps_path: Path | None = None,
    force: bool = False,
) -> Document:
    """Evaluate, write what is asked for, and print the figures.

    Args:
        job: what is evaluated.
        console: for the figures.
        progress: told of each stage.
        json_path: to write.
        html_path: likewise.
        card_path: a model card that gets a section with the figures; made where there is none.
        pareto_path: trials of ``tune --json`` that become part of it.
        sweeps_path: sweeps of ``ablate --json``, likewise.
        force: replace what is there.

    Raises:
        OutputError: a file exists and ``force`` is not set, is an input, or both are one; said before any work.
        EvaluationError: trials or sweeps are damaged, or of another model or pole; said before any work, too.
        NptiError: see :func:`npti_export.evaluate.run.evaluate`.
    """
    outputs = [path for path in (json_path, html_path) if path is not None]
    _check_outputs(job, outputs, [pareto_path, sweeps_path], force=force)
    if card_path is not None:
        _check_card(card_path, [*outputs, pareto_path, sweeps_path, job.subject.artifact])
    tuning, ablation = _supplements(job, pareto_path, sweeps_path, progress)
    document = supplemented(evaluate(job, progress), tuning, ablation)
    if json_path is not None:
        with atomic_output(json_path, force=force) as temporary:
            temporary.write_text(document.to_json(), encoding="utf-8")
    if html_path is not None:
        from npti_export.report_page.page import render_page

        with atomic_output(html_path, force=force) as temporary:
            temporary.write_text(render_page(document), encoding="utf-8")
    if card_path is not None:
        update_card(card_path, document)
    render(document, console)
    for path in (json_path, html_path, card_path):
        if path is not None:
            console.print(f"wrote {path}", highlight=False, markup=False)
    return document


def _supplements(
    job: EvaluationJob, pareto: Path | None, sweeps: Path | None, progress: Progress
) -> tuple[TuningRecord | None, AblationRecord | None]:
    tuning = None if pareto is None else read_tuning(pareto)
    ablation = None if sweeps is None else read_ablation(sweeps)
    given = [(record, path) for record, path in ((tuning, pareto), (ablation, sweeps)) if record and path]
    for record, path in given:
        poles, fingerprint, recipe = _steered(job.subject)
        check_same(record, path, [parse_recorded(text).pole for text in poles], fingerprint)
        note = differs(record, recipe, poles)
        if note:
            progress.note(f"{path}: {note}")
    return tuning, ablation


def _steered(subject: SubjectJob) -> tuple[list[str], str, Recipe | None]:
    """Poles of an artifact with their strengths, the fingerprint of its model, and its recipe, if it has one."""
    try:
        about = load_rule(subject.artifact).about
    except AdapterError:
        if subject.trait is None or subject.model is None:
            raise
        return [parse_trait(subject.trait).pole], resolve_model(subject.model).fingerprint, None
    return about.trait.split(), about.fingerprint.float32, recipe_from_json(about.recipe)


def _check_outputs(job: EvaluationJob, paths: list[Path], supplements: list[Path | None], *, force: bool) -> None:
    for path in paths:
        check_writable(path, force=force)
    subject, resolved = job.subject, [path.resolve() for path in paths]
    if len(set(resolved)) < len(paths):
        raise OutputError(f"{paths[0]}: is named for two outputs; give each its own name")
    model = None if subject.model is None else Path(subject.model)
    inputs = [subject.artifact, model, subject.bench, *subject.trait_dirs, job.inventory, job.journal, *job.tasks]
    inputs += supplements
    places = {one.resolve() for one in inputs if one is not None}
    for path, place in zip(paths, resolved, strict=True):
        if not places.isdisjoint([place, *place.parents]):
            raise OutputError(f"{path}: is an input of this very job, or inside one; choose another name")


def _check_card(path: Path, others: list[Path | None]) -> None:
    if path.suffix.lower() != ".md" or path.is_dir():
        raise OutputError(f"--card {path}: a model card is a Markdown file; give a name that ends in .md")
    if path.resolve() in {one.resolve() for one in others if one is not None}:
        raise OutputError(f"--card {path}: is named for something else, too; choose another name")
    check_card(path)
    check_writable(path, force=True)


def render(document: Document, console: Console) -> None:
    """Print conditions and the main figures."""
    from rich.table import Table
    from rich.text import Text

    title = " ".join(document.traits)
    if judged_otherwise(document):
        title += f", judged by {judged_pole(document)}"
    table = Table(title=Text(title), title_justify="left")
    for name in ("", "contrast", "gain (95%)", "fluency", "repetition", "tokens"):
        table.add_column(name, justify="left" if not name else "right")
    for one in document.conditions:
        table.add_row(*_row(one))
    console.print(table)
    for line in _lines(document):
        console.print(line, highlight=False, markup=False)


def _row(one: Condition) -> list[Any]:
    from rich.text import Text

    gain = "" if one.gain is None else interval(one.gain)
    cells = [f"{one.contrast.mean:+.3f}", gain, f"{one.fluency.mean:.2f}", f"{one.repetition.mean:.0%}"]
    return [Text(one.label), *cells, f"{one.length.mean:.0f}"]


def _lines(document: Document) -> list[str]:
    contrast, capability = document.trait_contrast, document.capability
    lines = []
    if contrast.share_of_prompt is not None:
        lines.append(f"trait      {share(contrast)} of the better prompt's gain")
    lines.append(f"neutral    KL {capability.kl_neutral.mean:.3f} nats a token from the unsteered model")
    lines += [
        f"skill      {task.name}: {task.score.base.mean:.0%} -> {task.score.steered.mean:.0%} "
        f"({interval(task.score.change, 2)})"
        for task in capability.tasks
    ]
    if document.inventory is not None:
        moved = ", ".join(f"{name} {one.change.mean:+.2f}" for name, one in document.inventory.traits.items())
        lines.append(f"inventory  {moved}")
    if document.cross_talk is not None:
        moved = ", ".join(f"{name} {one.mean:+.3f}" for name, one in document.cross_talk.items())
        lines.append(f"all traits {moved}")
    for judge in document.judge.judges if document.judge else ():
        base, steered = judge.trait.get("unsteered"), judge.trait.get("steered")
        if base is not None and steered is not None:
            lines.append(f"judge      {judge.judge}: {base.mean:.2f} -> {steered.mean:.2f} of 5")
    lines.append(f"time       {document.seconds.get('total', 0):.0f} s")
    return lines
