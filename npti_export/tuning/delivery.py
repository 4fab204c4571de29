"""From a tuning or an ablation to files and a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npti_export.errors import EvaluationError, OutputError
from npti_export.evaluate.document import Condition
from npti_export.evaluate.estimate import interval
from npti_export.evaluate.supplements import AblationRecord, Confirmation, TrialRecord, TuningRecord
from npti_export.files import atomic_output, check_writable
from npti_export.progress import Progress
from npti_export.recipe import select_recipe
from npti_export.tuning.ablate import AblationJob, ablate
from npti_export.tuning.budget import Budget
from npti_export.tuning.recipe_file import check_recipe_path, write_recipe
from npti_export.tuning.tune import Tuned, TuneJob, tune

if TYPE_CHECKING:
    from rich.console import Console


def deliver_tuning(
    job: TuneJob,
    console: Console,
    progress: Progress,
    *,
    out: Path | None = None,
    json_path: Path | None = None,
    force: bool = False,
) -> TuningRecord:
    """Tune, write what is asked for, and print the Pareto front and what was picked.

    Raises:
        EvaluationError: no trial within the budget moves the answers towards the pole; the JSON and the front are
            there all the same.
        NptiError: something is wrong with the job, said before any work, or it cannot be done.
    """
    _check_outputs(job, out, json_path, force=force)
    tuned = tune(job, progress)
    record = tuned.record
    if json_path is not None:
        with atomic_output(json_path, force=force) as temporary:
            temporary.write_text(record.to_json(), encoding="utf-8")
    _print_front(record, console)
    wrote = [] if json_path is None else [str(json_path)]
    if tuned.point is not None:
        if record.confirmation is not None:
            _print_confirmation(record.confirmation, console)
        if out is not None:
            kept = _write(job, tuned, out, force=force)
            wrote.append(f"{out}" + (f", where {' '.join(kept)} stayed" if kept else ""))
    for line in wrote:
        console.print(f"wrote {line}", highlight=False, markup=False)
    if tuned.point is None:
        raise EvaluationError(_nothing(record, job.budget))
    return record


def _nothing(record: TuningRecord, budget: Budget) -> str:
    """Why there is no pick, and what came nearest."""
    advice = "no recipe was written: allow more, or go on with more --minutes"
    kept = [one for one in record.trials if one.within]
    if not kept:
        least = min(one.damage.mean for one in record.trials)
        return f"none of {len(record.trials)} trials keeps {budget} (the smallest KL is {least:.3g}); {advice}"
    best = max(kept, key=lambda one: one.gain.mean)
    return (
        f"none of {len(kept)} trials within {budget} moves the answers towards {record.pole}; the best, trial "
        f"{best.number} ({best.label}), gains {best.gain.mean:+.3f} at KL {best.damage.mean:.3f}; {advice}"
    )


def _check_outputs(job: TuneJob, out: Path | None, json_path: Path | None, *, force: bool) -> None:
    if out is not None:
        check_recipe_path(out, force=force)
    if json_path is not None:
        check_writable(json_path, force=force)
    recipe, model = job.subject.recipe, job.subject.model
    named = [path for path in (out, json_path, job.storage, recipe and Path(recipe), model and Path(model)) if path]
    places = [path.resolve() for path in named]
    for path, place in zip(named, places, strict=True):
        if places.count(place) > 1:
            raise OutputError(f"{path}: is named twice, for what is read and what is written; choose another name")


def _write(job: TuneJob, tuned: Tuned, out: Path, *, force: bool) -> list[str]:
    subject, record = job.subject, tuned.record
    assert tuned.point is not None
    plain = select_recipe(subject.recipe, record.model["fingerprint"])
    return write_recipe(
        out,
        subject.recipe or plain.name,
        plain,
        tuned.recipe,
        record.pole,
        tuned.space.section(tuned.point),
        fingerprint=record.model["fingerprint"],
        model=record.model["name"],
        comments=_comments(record),
        force=force,
    )


def _comments(record: TuningRecord) -> list[str]:
    chosen = next(one for one, point in zip(record.trials, record.pareto, strict=True) if point.chosen)
    lines = [
        f"Search questions ({chosen.gain.n}), best of {len(record.trials)} trials: gain {interval(chosen.gain)}, "
        f"KL {chosen.damage.mean:.3f}, fluency {chosen.fluency.mean:.2f} (unsteered {record.base_fluency:.2f})"
    ]
    told = record.confirmation
    if told is not None:
        base, steered, prompt = told.conditions
        assert steered.gain is not None
        assert prompt.gain is not None
        lines.append(
            f"Test questions ({told.questions}): gain {interval(steered.gain)}, KL {told.kl_neutral.mean:.3f}, fluency "
            f"{steered.fluency.mean:.2f} (unsteered {base.fluency.mean:.2f}); persona prompt {interval(prompt.gain)}, "
            f"fluency {prompt.fluency.mean:.2f}; the budget is {'kept' if told.within else 'exceeded'} there"
        )
    return lines


def _print_front(record: TuningRecord, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    title = f"{record.pole}: Pareto front of {len(record.trials)} trials, on {record.settings['questions']} questions"
    table = Table(title=Text(title), title_justify="left")
    for name in ("trial", "gain (95%)", "KL", "fluency", "budget", "settings"):
        table.add_column(name, justify="left" if name in ("budget", "settings") else "right")
    points = zip(record.trials, record.pareto, strict=True)
    front: list[tuple[TrialRecord, bool]] = [(one, at.chosen) for one, at in points if at.on_front or at.chosen]
    for one, chosen in sorted(front, key=lambda pair: pair[0].damage.mean):
        kept = "picked" if chosen else "kept" if one.within else "exceeded"
        figures = [interval(one.gain), f"{one.damage.mean:.3f}", f"{one.fluency.mean:.2f}", kept]
        table.add_row(str(one.number), *figures, Text(one.label), style="bold" if chosen else None)
    console.print(table)
    console.print(f"fluency    {record.base_fluency:.2f} unsteered", highlight=False, markup=False)


def _print_confirmation(told: Confirmation, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"On {told.questions} test questions, which chose nothing"), title_justify="left")
    for name in ("", "contrast", "gain (95%)", "fluency", "tokens"):
        table.add_column(name, justify="left" if not name else "right")
    for one in told.conditions:
        table.add_row(Text(one.label), *_cells(one))
    console.print(table)
    for line in (
        f"neutral    KL {told.kl_neutral.mean:.3f} nats a token from the unsteered model, on text that no trial saw",
        f"budget     {'kept' if told.within else 'not kept'} by both of these",
    ):
        console.print(line, highlight=False, markup=False)


def _cells(one: Condition) -> Sequence[str]:
    gain = "" if one.gain is None else interval(one.gain)
    return [f"{one.contrast.mean:+.3f}", gain, f"{one.fluency.mean:.2f}", f"{one.length.mean:.0f}"]


def deliver_ablation(
    job: AblationJob, console: Console, progress: Progress, *, json_path: Path | None = None, force: bool = False
) -> AblationRecord:
    """Vary one setting at a time, write what is asked for, and print one table.

    Raises:
        NptiError: something is wrong with the job, said before any work, or it cannot be done.
    """
    from rich.table import Table
    from rich.text import Text

    if json_path is not None:
        check_writable(json_path, force=force)
    record = ablate(job, progress)
    if json_path is not None:
        with atomic_output(json_path, force=force) as temporary:
            temporary.write_text(record.to_json(), encoding="utf-8")
    title = f"{record.pole}, {record.recipe}: {record.settings['questions']} {record.settings['split']} questions"
    table = Table(title=Text(title), title_justify="left")
    for name in ("setting", "value", "gain (95%)", "fluency", "KL"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for sweep in record.sweeps:
        for place, point in enumerate(sweep.points):
            value = point.value if isinstance(point.value, str) else f"{point.value:g}"
            damage = "" if point.kl_neutral is None else f"{point.kl_neutral.mean:.3f}"
            cells = [value, interval(point.gain), f"{point.fluency.mean:.2f}", damage]
            table.add_row("" if place else sweep.setting, *cells, end_section=place == len(sweep.points) - 1)
    console.print(table)
    console.print(f"fluency    {record.base_fluency:.2f} unsteered", highlight=False, markup=False)
    for line in [*record.notes, *([] if json_path is None else [f"wrote {json_path}"])]:
        console.print(line, highlight=False, markup=False)
    return record
