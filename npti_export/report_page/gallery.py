"""Which pictures an evaluation gives, and why the others are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import Document, LayerShape
from npti_export.evaluate.poles import judged_otherwise
from npti_export.evaluate.supplements import PROMPT
from npti_export.report_page import figures_effect as effect
from npti_export.report_page import figures_rule as rule
from npti_export.report_page import tables
from npti_export.report_page.svg import inline_svg, write_figure
from npti_export.report_page.theme import HALF, PHONE, WIDE, Look
from npti_export.report_page.wording import judged, number, steered_traits, traits_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    Attributes:
        name: of its files, and of its place on the page.
        title: heading.
        caption: what to look for, in a sentence or two.
        label: what it shows, in words, for who cannot see it.
        draw: draws it, or raises an :class:`EvaluationError` that says what is missing.
        width: in inches, on a desk.
    """

    name: str
    title: str
    caption: str
    label: str
    draw: Callable[[Look], Figure]
    width: float = HALF


@dataclass(frozen=True)
class Shown:
    """A picture as it stands on the page: for a desk and for a phone, or why it is not there."""

    picture: Picture
    desk: str = ""
    phone: str = ""
    reason: str = ""


def pictures(document: Document, others: Sequence[Document] = ()) -> list[Picture]:
    """Every picture there could be, in the order of the page."""
    found = [*_of_effect(document), *_of_rule(document)]
    if others:
        every = [document, *others]
        found.append(
            Picture(
                "matrix",
                "Cross-talk of all",
                "A row is one steered model, a column one trait: blue moves towards its + pole, orange towards its "
                "− pole, the stronger the further. Framed: what was meant to move. *: the interval is clear of zero.",
                f"Heat map of cross-talk, {len(every)} steered models by trait; the table below has the numbers.",
                lambda look: effect.cross_talk_matrix(every, look),
                WIDE,
            )
        )
    return found


def _of_effect(document: Document) -> list[Picture]:
    conditions, moved = document.conditions, document.cross_talk or {}
    facets = {key: one for key, one in document.trait_contrast.by_facet.items() if key}
    return [
        Picture(
            "conditions",
            "Every way to get this personality, on the same questions",
            "Bars are 95% intervals. Gain: right of the line is more of the personality. Fluency: the line is the "
            "unsteered model.",
            "Dot plot of gain and fluency by condition. "
            + "; ".join(f"{one.label}: gain {number(one.gain.mean, sign=True)}" for one in conditions if one.gain),
            lambda look: effect.conditions_figure(conditions, look),
            WIDE,
        ),
        Picture(
            "tradeoff",
            "Personality against fluency",
            "The top right corner is the place to be. A condition below and left of another is worse in both.",
            "Scatter plot of gain against fluency, one mark a condition; the table of conditions has the numbers.",
            lambda look: effect.tradeoff_figure(conditions, look),
        ),
        Picture(
            "facets",
            "Gain by facet",
            "Whether the whole trait moves, or one side of it. Bars are 95% intervals.",
            "Dot plot of the gain by facet. "
            + "; ".join(f"{facet} {number(one.mean, sign=True)}" for facet, one in facets.items()),
            lambda look: effect.facets_figure(facets, look),
        ),
        Picture(
            "cross-talk",
            "What else moves",
            f"Each trait's move towards its + pole. Meant to move (round): {traits_of(document)}; the others should "
            "stay at the line.",
            "Dot plot of cross-talk. "
            + "; ".join(f"{trait} {number(one.mean, sign=True)}" for trait, one in moved.items()),
            lambda look: effect.cross_talk_figure(moved, steered_traits(document), look),
        ),
        Picture(
            "radar",
            "The five traits, before and after",
            "Moves of the answers towards each + pole, nats per token; the dashed ring is the unsteered model."
            if effect.radar_of_answers(document)
            else f"What the model says of itself, 1 to 5. {tables.BY_ORDER}",
            "Radar chart of the traits, unsteered against steered; the tables of cross-talk and inventory have the "
            "numbers.",
            lambda look: effect.radar_figure(document, look),
        ),
    ]


def _of_rule(document: Document) -> list[Picture]:
    gamma = next((sweep.points for sweep in document.sweeps if sweep.setting in ("gamma", "γ")), [])
    prompts = next((sweep.points for sweep in document.sweeps if sweep.setting == PROMPT), [])
    prompt = max(prompts, key=lambda one: one.gain.mean, default=None)
    return [
        Picture(
            "layers",
            "Where the rule steers",
            _what_steers(document.layers),
            f"Chart by layer. {_what_steers(document.layers)}",
            lambda look: rule.layers_figure(document.layers, look),
            WIDE,
        ),
        Picture(
            "sweep",
            "Trait and fluency against the strength",
            "More strength is not always more personality; it always costs fluency. Bands are 95% intervals. "
            + _of_sweeps(document, prompt is not None),
            "Line charts of gain and fluency against gamma. "
            + "; ".join(f"{one.value}: {number(one.gain.mean, sign=True)}" for one in gamma),
            lambda look: rule.sweep_figure(gamma, prompt, look),
        ),
        Picture(
            "pareto",
            "What the tuner tried",
            "On search questions, never on the test questions. A mark below and right of another is worse in both."
            + _note(document, "trials"),
            f"Scatter plot of {len(document.pareto)} trials, gain against damage.",
            lambda look: rule.pareto_figure(document.pareto, look),
        ),
        Picture(
            "distribution",
            "Activations of the pole's neurons",
            f"{_whose_neurons(document)}; under personas of both poles, before any steering. The further apart, the "
            "better they tell.",
            "Histograms of activations under the wanted and the opposite pole.",
            lambda look: _distribution(document, look),
        ),
    ]


def _of_sweeps(document: Document, prompted: bool) -> str:
    """What the curves were measured on, which is not what the figures above them were, and of which rule."""
    found = document.settings.get("sweeps")
    about = found if isinstance(found, dict) else {}
    count, split = about.get("questions"), about.get("split")
    where = f"On {count} {split} questions of the ablation" if count and split else "On the ablation's own questions"
    line = "the dashed line is the better prompt on the same ones" if prompted else "no prompt was measured on them"
    return f"{where}; {line}.{_note(document, 'sweeps')}"


def _note(document: Document, name: str) -> str:
    about = document.settings.get(name)
    note = about.get("note") if isinstance(about, dict) else None
    return f" {note}" if note else ""


def _what_steers(layers: Sequence[LayerShape]) -> str:
    """The rule in a sentence: its neurons, its constants, or both."""
    shifted, clamped = (sum(getattr(one, name) for one in layers) for name in ("shift", "clamp"))
    constants = sum(one.constant > 0 for one in layers)
    if constants and not (shifted or clamped):
        return f"No neuron is shifted or clamped; a constant is added in {constants} of {len(layers)} layers."
    added = f"; a constant is added in {constants} of them" if constants else ""
    return f"{shifted:,} neurons are shifted and {clamped:,} clamped, in {len(layers)} layers{added}."


def _whose_neurons(document: Document) -> str:
    """Which neurons the histogram is of, as :func:`npti_export.evaluate.distribution.trait_neurons` picks them."""
    shifts = any(one.shift for one in document.layers)
    if shifts and not judged_otherwise(document):
        return "Those that the rule shifts"
    why = "the rule is not of this pole alone" if shifts else "no rule shifts any"
    return f"Those of {judged(document)} that NPTI would shift, as {why}"


def _distribution(document: Document, look: Look) -> Figure:
    if document.distribution is None:
        raise EvaluationError("the evaluation has no histogram of activations")
    return rule.distribution_figure(document.distribution, look)


def shown(picture: Picture) -> Shown:
    """Draw a picture for the page, or say why there is none."""
    try:
        desk = inline_svg(picture.draw(Look(width=picture.width)), picture.name, picture.label)
        phone = inline_svg(picture.draw(Look(width=PHONE)), f"{picture.name}-phone", picture.label)
    except EvaluationError as error:
        return Shown(picture, reason=str(error))
    return Shown(picture, desk, phone)


def write_figures(document: Document, folder: Path, others: Sequence[Document] = ()) -> Iterator[Path]:
    """Write every picture that there is as SVG and as PNG, light and dark, into a folder that is there.

    Yields:
        What was written. Pictures whose data is missing are left out.
    """
    for picture in pictures(document, others):
        with suppress(EvaluationError):
            yield from write_figure(picture.draw, folder, picture.name, picture.label, picture.width)
