"""Figures of what steering does: conditions, facets, the other traits, the Big Five as a radar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import Change, Condition, Document, Estimate
from npti_export.report_page.canvas import FONT, ROW, dots, drawing, few_ticks, rows, zero_line
from npti_export.report_page.theme import KINDS, WIDE, Look
from npti_export.report_page.wording import in_order, minus, number, short, traits_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAIN = "gain, nats per token"
FLUENCY = "fluency, nats per token"
STRONGEST = 0.46  # opacity of the heat map's largest figure: its text can still be read on it


def conditions_figure(conditions: Sequence[Condition], look: Look | None = None) -> Figure:
    """Gain and fluency of every condition beside each other, with intervals; the unsteered model has no gain.

    Marks have the gids ``gain-N`` and ``fluency-N``, N the place of the condition. On a phone the panels lie one
    below the other.

    Raises:
        EvaluationError: no condition.
    """
    look = look or Look(width=WIDE)
    _some(conditions, "conditions")
    theme = look.theme
    colours = [getattr(theme, KINDS[one.kind][0]) for one in conditions]
    markers = [KINDS[one.kind][1] for one in conditions]
    hollow = [one.kind == "base" for one in conditions]
    height = ROW * len(conditions) + 0.75
    shape = (2, 1) if look.narrow else (1, 2)
    with drawing(look, height * shape[0]) as figure:
        panels = figure.subplots(*shape, sharey=True)
        values: list[list[Estimate | None]] = [[one.gain for one in conditions], [one.fluency for one in conditions]]
        titles = ("Gain →", "Fluency →") if look.narrow else ("Gain: more personality →", "Fluency: reads better →")
        for axes, name, found, title in zip(panels, ("gain", "fluency"), values, titles, strict=True):
            dots(axes, found, colours, markers, name=name, hollow=hollow)
            rows(axes, [one.label for one in conditions], look)
            axes.set_title(title)
        zero_line(panels[0], look)
        panels[0].set_xlabel(GAIN)
        panels[1].set_xlabel(FLUENCY)
        base = next((one for one in conditions if one.kind == "base"), None)
        if base is not None:
            zero_line(panels[1], look, base.fluency.mean)
    return figure


def tradeoff_figure(conditions: Sequence[Condition], look: Look | None = None) -> Figure:
    """Gain against fluency: up is more personality, right reads better. Each mark bears its condition's number.

    Marks have the gids ``tradeoff-N``; the numbers count the conditions from 1, and a list names them.

    Raises:
        EvaluationError: no condition has a gain.
    """
    look = look or Look()
    theme = look.theme
    shown = [(place, one) for place, one in enumerate(conditions) if one.gain is not None or one.kind == "base"]
    if not any(one.gain for _, one in shown):
        raise EvaluationError("no condition of the evaluation has a gain, so none can be drawn against fluency")
    key = math.ceil(len(shown) / (1 if look.narrow else 2)) * 0.19
    with drawing(look, look.width * 0.7 + key) as figure:
        axes = figure.subplots()
        handles = []
        for place, one in shown:
            role, marker = KINDS[one.kind]
            colour = getattr(theme, role)
            gain = one.gain or Estimate(mean=0, low=0, high=0, n=0)
            axes.plot([one.fluency.mean] * 2, [gain.low, gain.high], color=colour, linewidth=1.6, alpha=0.5)
            axes.plot([one.fluency.low, one.fluency.high], [gain.mean] * 2, color=colour, linewidth=1.6, alpha=0.5)
            (mark,) = axes.plot([one.fluency.mean], [gain.mean], marker=marker, color=colour, markersize=6.5,
                                linestyle="none", label=f"{place + 1}  {short(one.label, 26)}")  # fmt: skip
            mark.set_gid(f"tradeoff-{place}")
            axes.annotate(str(place + 1), (one.fluency.mean, gain.mean), xytext=(5, 4), textcoords="offset points",
                          fontsize=FONT - 1, color=theme.ink)  # fmt: skip
            handles.append(mark)
        zero_line(axes, look, upright=False)
        axes.grid()
        few_ticks(axes, 5)
        axes.set_title("More personality ↑   reads better →")
        axes.set_xlabel(FLUENCY)
        axes.set_ylabel(GAIN)
        columns = 1 if look.narrow else 2
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.3, columnspacing=1.2)
    return figure


def facets_figure(gains: Mapping[str, Estimate], look: Look | None = None) -> Figure:
    """Gain by facet, in the order given. Marks have the gids ``facet-N``.

    Raises:
        EvaluationError: no facet.
    """
    look = look or Look()
    _some(gains, "facets")
    with drawing(look, ROW * len(gains) + 0.75) as figure:
        axes = figure.subplots()
        dots(axes, list(gains.values()), [look.theme.wanted] * len(gains), name="facet")
        rows(axes, list(gains), look)
        zero_line(axes, look)
        axes.set_xlabel(GAIN)
    return figure


def cross_talk_figure(cross_talk: Mapping[str, Estimate], steered: set[str], look: Look | None = None) -> Figure:
    """How far each trait moves towards its ``+`` pole. Marks have the gids ``cross-N``, in the usual order.

    Args:
        cross_talk: gain by trait.
        steered: the traits that were meant to move; they are in colour.
        look: of the figure.

    Raises:
        EvaluationError: no trait.
    """
    look = look or Look()
    _some(cross_talk, "traits")
    traits = in_order(cross_talk)
    meant = [trait in steered for trait in traits]
    colours = [look.theme.wanted if one else look.theme.base for one in meant]
    with drawing(look, ROW * len(traits) + 0.95) as figure:
        axes = figure.subplots()
        dots(axes, [cross_talk[trait] for trait in traits], colours, ["o" if one else "D" for one in meant],
             name="cross")  # fmt: skip
        rows(axes, traits, look)
        zero_line(axes, look)
        axes.set_title("← towards −", loc="left", color=look.theme.muted)
        axes.set_title("towards + →", loc="right", color=look.theme.muted)
        axes.set_xlabel(GAIN)
    return figure


def cross_talk_matrix(documents: Sequence[Document], look: Look | None = None) -> Figure:
    """A row an evaluation, a column a trait: how far it moves towards its ``+`` pole.

    Blue is towards ``+``, orange towards ``-``, the stronger the further; what was meant to move is framed. An asterisk
    marks figures whose interval is clear of zero. Cells are rectangles with the gids ``cell-ROW-COLUMN``, their opacity
    is the share of the largest figure. Evaluations without cross-talk are left out.

    Raises:
        EvaluationError: no evaluation has cross-talk.
    """
    from matplotlib.patches import Rectangle

    look = look or Look(width=WIDE)
    theme = look.theme
    found = [(one, one.cross_talk) for one in documents if one.cross_talk]
    _some(found, "cross-talk")
    traits = in_order(trait for _, values in found for trait in values)
    top = max(abs(value.mean) for _, values in found for value in values.values()) or 1.0
    with drawing(look, ROW * 1.15 * len(found) + 0.8) as figure:
        axes = figure.subplots()
        for row, (one, values) in enumerate(found):
            meant = {pole.partition(":")[0].rstrip("+-") for pole in one.traits}
            for column, trait in enumerate(traits):
                value = values.get(trait)
                mean = value.mean if value else 0.0
                cell = Rectangle(
                    (column - 0.47, row - 0.44), 0.94, 0.88,
                    facecolor=theme.wanted if mean >= 0 else theme.opposite,
                    alpha=STRONGEST * abs(mean) / top, linewidth=0,
                )  # fmt: skip
                cell.set_gid(f"cell-{row}-{column}")
                axes.add_patch(cell)
                if trait in meant:
                    axes.add_patch(Rectangle((column - 0.47, row - 0.44), 0.94, 0.88, fill=False,
                                             edgecolor=theme.ink, linewidth=1.3))  # fmt: skip
                clear = value is not None and (value.low > 0 or value.high < 0)
                text = "–" if value is None else _cell_text(mean, look) + "*" * clear
                axes.text(column, row, text, ha="center", va="center", fontsize=FONT - (2.5 if look.narrow else 0.5))
        _matrix_labels(axes, [_row_name(one, look) for one, _ in found], traits, look)
    return figure


def _cell_text(value: float, look: Look) -> str:
    return number(value, 2, sign=True).replace("0.", ".", 1) if look.narrow else number(value, 3, sign=True)


def _row_name(document: Document, look: Look) -> str:
    """What was steered; on a phone the trait is cut short, and never its sign."""
    names = [minus(trait) for trait in document.traits]
    if look.narrow and len(names) == 1 and len(names[0]) > 11 and names[0][-1] in "+−":
        return f"{names[0][:8]}. {names[0][-1]}"
    return short(traits_of(document), 13 if look.narrow else 30)


def _matrix_labels(axes: Axes, names: Sequence[str], traits: Sequence[str], look: Look) -> None:
    across = [f"{short(trait, 60)[:3]}." if look.narrow else short(trait, 18) for trait in traits]
    axes.set_xticks(range(len(traits)), across)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(traits) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0, labelcolor=look.theme.ink)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)


def radar_figure(document: Document, look: Look | None = None) -> Figure:
    """The traits, unsteered against steered: from the cross-talk, which is of answers, else from the inventory.

    The lines have the gids ``base`` and ``steered``; their radii are the values, the first once more at the end.

    Raises:
        EvaluationError: neither names three traits.
    """
    look = look or Look()
    theme = look.theme
    base, steered, limits = radar_values(document)
    traits = list(base)
    angles = [2 * math.pi * place / len(traits) for place in range(len(traits))]
    with drawing(look, look.width * 0.86, margin=0.12) as figure:
        axes: Any = figure.subplots(subplot_kw={"projection": "polar"})
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        around = [*angles, angles[0]]
        for name, values, colour, style in (("base", base, theme.base, "--"), ("steered", steered, theme.wanted, "-")):
            radii = [*values.values(), next(iter(values.values()))]
            (line,) = axes.plot(around, radii, color=colour, linestyle=style, marker="o", markersize=4.5,
                                label="unsteered" if name == "base" else "steered")  # fmt: skip
            line.set_gid(name)
            if name == "steered":
                axes.fill(around, radii, color=colour, alpha=0.14, linewidth=0)
        axes.set_ylim(*limits)
        axes.set_xticks(angles, [short(minus(trait), 20) for trait in traits], color=theme.ink)
        axes.yaxis.set_major_locator(_ticks(limits))
        axes.tick_params(axis="y", labelcolor=theme.muted, labelsize=FONT - 2)
        axes.tick_params(axis="x", pad=6)
        axes.set_rlabel_position(180 / len(traits))
        axes.spines["polar"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def radar_values(document: Document) -> tuple[dict[str, float], dict[str, float], tuple[float, float]]:
    """Unsteered and steered value by trait, and the ends of the radius.

    What a model says of itself comes second: a small one goes by where an option stands.

    Raises:
        EvaluationError: neither the inventory nor the cross-talk names three traits.
    """
    moved = document.cross_talk or {}
    if radar_of_answers(document):
        steered = {trait: moved[trait].mean for trait in in_order(moved)}
        reach = max(map(abs, steered.values())) * 1.15 or 1.0
        return dict.fromkeys(steered, 0.0), steered, (-reach, reach)
    inventory = document.inventory.traits if document.inventory else {}
    if len(inventory) < 3:
        raise EvaluationError("the evaluation has neither an inventory nor cross-talk over three traits or more")
    traits: Mapping[str, Change] = {trait: inventory[trait] for trait in in_order(inventory)}
    base = {trait: one.base.mean for trait, one in traits.items()}
    return base, {trait: one.steered.mean for trait, one in traits.items()}, (1.0, 5.0)


def radar_of_answers(document: Document) -> bool:
    """Whether the radar is drawn from the cross-talk."""
    return len(document.cross_talk or {}) >= 3


def _ticks(limits: tuple[float, float]) -> Any:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    return FixedLocator([2, 3, 4, 5]) if limits == (1.0, 5.0) else MaxNLocator(4)


def _some(values: Sequence[object] | Mapping[str, object], what: str) -> None:
    if not values:
        raise EvaluationError(f"the evaluation has no {what} to draw")
