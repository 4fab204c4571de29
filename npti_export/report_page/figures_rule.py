"""Figures of what steers: neurons by layer, their activations, sweeps of the strength, what the tuner tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import Distribution, LayerShape, ParetoPoint, SweepPoint
from npti_export.report_page.canvas import FONT, drawing, few_ticks, zero_line
from npti_export.report_page.figures_effect import GAIN
from npti_export.report_page.theme import WIDE, Look
from npti_export.report_page.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layers_figure(layers: Sequence[LayerShape], look: Look | None = None) -> Figure:
    """Neurons of the wanted pole (shifted, upwards) and of the opposite one (clamped, downwards) by layer.

    Bars have the gids ``shift-N`` and ``clamp-N``. Where the rule has a constant, its norm by layer is a panel of its
    own, with the gid ``constant``.

    Raises:
        EvaluationError: no layer.
    """
    look = look or Look(width=WIDE)
    theme = look.theme
    if not layers:
        raise EvaluationError("the evaluation names no layers to draw")
    places = range(len(layers))
    neurons = any(one.shift or one.clamp for one in layers)
    constant = any(one.constant for one in layers)
    panels = [name for name, there in (("neurons", neurons or not constant), ("constant", constant)) if there]
    with drawing(look, 0.75 + 1.75 * len(panels)) as figure:
        found = dict(zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True))
        if "neurons" in found:
            _neurons(found["neurons"], layers, look)
        if "constant" in found:
            axes = found["constant"]
            (line,) = axes.plot(
                places, [one.constant for one in layers], color=theme.prompt, marker="o", markersize=3.5
            )
            line.set_gid("constant")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.set_title("Constant, norm" if look.narrow else "Constant at the down projection's input, norm")
        last = list(found.values())[-1]
        last.set_xlabel("layer")
        few_ticks(last, 9)
        last.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _neurons(axes: Axes, layers: Sequence[LayerShape], look: Look) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for name, sign, colour in (("shift", 1, look.theme.wanted), ("clamp", -1, look.theme.opposite)):
        heights = [sign * getattr(one, name) for one in layers]
        for place, bar in enumerate(axes.bar(range(len(layers)), heights, width=0.78, color=colour, linewidth=0)):
            bar.set_gid(f"{name}-{place}")
    axes.axhline(0, color=look.theme.muted, linewidth=1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    titles = ("↑ shifted   ↓ clamped", "↑ shifted: the wanted pole   ↓ clamped: the opposite pole")
    axes.set_title(titles[0 if look.narrow else 1])
    axes.set_ylabel("neurons")


def distribution_figure(distribution: Distribution, look: Look | None = None) -> Figure:
    """Activations of the pole's neurons under both poles; the outlines have the gids ``wanted`` and ``opposite``.

    Raises:
        EvaluationError: not one edge more than bins, or no bin.
    """
    look = look or Look()
    theme, bins = look.theme, len(distribution.edges) - 1
    if bins < 1 or {len(distribution.wanted), len(distribution.opposite)} != {bins}:
        raise EvaluationError("'distribution' has not one edge more than bins, so it cannot be drawn; evaluate again")
    with drawing(look, 2.7) as figure:
        axes = figure.subplots()
        for name, values, colour, style in (
            ("opposite", distribution.opposite, theme.opposite, (0, (4, 1.5))),
            ("wanted", distribution.wanted, theme.wanted, "-"),
        ):
            axes.stairs(values, distribution.edges, fill=True, color=colour, alpha=0.16, linewidth=0)
            outline = axes.stairs(values, distribution.edges, color=colour, linewidth=1.7, linestyle=style,
                                  label=f"{name} pole")  # fmt: skip
            outline.set_gid(name)
        axes.grid(axis="y")
        axes.set_xlabel("activation")
        axes.set_ylabel("share")
        axes.legend(reverse=True)
    return figure


def sweep_figure(
    points: Sequence[SweepPoint], prompt: SweepPoint | None, look: Look | None = None, *, setting: str = "γ"
) -> Figure:
    """Gain and fluency against the strength, a prompt on the same questions as a line across.

    The lines have the gids ``gain``, ``fluency``, ``prompt-gain`` and ``prompt-fluency``; points whose value is not a
    number are left out.

    Raises:
        EvaluationError: fewer than two such points.
    """
    look = look or Look()
    theme = look.theme
    numeric = sorted(
        ((float(one.value), one) for one in points if isinstance(one.value, float)), key=lambda two: two[0]
    )
    if len(numeric) < 2:
        raise EvaluationError(f"the evaluation has no sweep of {setting} over two settings or more")
    values = [value for value, _ in numeric]
    with drawing(look, 4.3) as figure:
        panels = figure.subplots(2, sharex=True)
        for axes, name, colour in zip(panels, ("gain", "fluency"), (theme.wanted, theme.baseline), strict=True):
            found = [getattr(one, name) for _, one in numeric]
            axes.fill_between(values, [one.low for one in found], [one.high for one in found], color=colour,
                              alpha=0.16, linewidth=0)  # fmt: skip
            (line,) = axes.plot(values, [one.mean for one in found], color=colour, marker="o", markersize=4.5)
            line.set_gid(name)
            axes.grid(axis="y")
            axes.set_ylabel("nats per token")
            baseline = getattr(prompt, name) if prompt else None
            if prompt is not None and baseline is not None:
                across = axes.axhline(baseline.mean, color=theme.prompt, linestyle=(0, (5, 2)), linewidth=1.5)
                across.set_gid(f"prompt-{name}")
                # At the end that the curve is far from: fluency falls.
                end, side = (1, "right") if name == "gain" else (0, "left")
                label = short(f"{prompt.value} prompt")
                axes.annotate(label, (end, baseline.mean), xycoords=("axes fraction", "data"), va="bottom",
                              ha=side, xytext=(0, 2), textcoords="offset points", color=theme.prompt,
                              fontsize=FONT - 1)  # fmt: skip
        panels[0].set_title("Gain")
        panels[1].set_title("Fluency")
        zero_line(panels[0], look, upright=False)
        panels[1].set_xlabel(setting)
    return figure


def pareto_figure(points: Sequence[ParetoPoint], look: Look | None = None) -> Figure:
    """What the tuner tried: gain against damage on search questions, the front as a line, the choice as a star.

    The artists have the gids ``tried``, ``front`` (by damage) and ``chosen``.

    Raises:
        EvaluationError: no trial.
    """
    look = look or Look()
    theme = look.theme
    if not points:
        raise EvaluationError("the evaluation names no trials of a tuner")
    front = sorted((one for one in points if one.on_front), key=lambda one: (one.damage, one.gain))
    rest = [one for one in points if not one.on_front]
    chosen = [one for one in points if one.chosen]
    named = f"chosen: {short(chosen[0].label, 30)}" if len(chosen) == 1 else "chosen"
    with drawing(look, 3.3) as figure:
        axes = figure.subplots()
        drawn: tuple[tuple[str, list[ParetoPoint], dict[str, Any]], ...] = (
            ("tried", rest, {"color": theme.base, "marker": "o", "linestyle": "none", "markerfacecolor": "none",
                             "markersize": 4.5, "label": "tried"}),
            ("front", front, {"color": theme.wanted, "marker": "o", "markersize": 5, "label": "best at its damage"}),
            ("chosen", chosen, {"color": theme.opposite, "marker": "*", "linestyle": "none", "markersize": 13,
                                "label": named}),
        )  # fmt: skip
        for name, shown, style in drawn:
            if shown:
                (line,) = axes.plot([one.damage for one in shown], [one.gain for one in shown], **style)
                line.set_gid(name)
        zero_line(axes, look, upright=False)
        axes.grid()
        few_ticks(axes, 5)
        axes.set_xlabel("KL on neutral text" if look.narrow else "damage: KL on neutral text, nats per token")
        axes.set_ylabel(GAIN)
        columns = 1 if look.narrow else 2
        figure.legend(loc="outside lower left", ncols=columns, columnspacing=1.2, handletextpad=0.4)
    return figure
