"""What every figure is drawn on, and with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from npti_export.evaluate.document import Estimate
from npti_export.report_page.theme import Look
from npti_export.report_page.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.29  # inches of height that a row with a label takes
FONT = 9.0  # points


def settings(look: Look) -> dict[str, Any]:
    """Matplotlib's settings for a figure; none is left behind."""
    theme = look.theme
    return {
        "font.size": FONT,
        "font.family": ["sans-serif"],
        "text.parse_math": False,  # labels come from files: a dollar sign is a dollar sign
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": FONT,
        "axes.titlesize": FONT,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "axes.facecolor": "none",
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": FONT - 0.5,
        "lines.linewidth": 1.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": FONT - 0.5,
        "ytick.labelsize": FONT - 0.5,
        "svg.fonttype": "none",
    }


@contextmanager
def drawing(look: Look, height: float, margin: float = 0.04) -> Iterator[Figure]:
    """A figure of a look's width, a height and a margin at its sides in inches, and matplotlib set up to draw on it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(settings(look)):
        engine = ConstrainedLayoutEngine(w_pad=margin, h_pad=0.05)
        figure = Figure(figsize=(look.width, height), layout=engine)
        yield figure
        with quiet():
            engine.execute(figure)  # here and once: saving would do it again for every file, and draw twice for it
        figure.set_layout_engine("none")


@contextmanager
def quiet() -> Iterator[None]:
    """A label may hold what the measuring font lacks; the reader's browser will have it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*[Gg]lyph")
        yield


def dots(
    axes: Axes,
    values: Sequence[Estimate | None],
    colours: Sequence[str],
    markers: Sequence[str] | None = None,
    *,
    name: str,
    hollow: Sequence[bool] | None = None,
) -> None:
    """One row a value, the first on top: a mark at the mean, a line over the interval; None leaves its row empty.

    The marks are lines whose gid is ``name-row``.
    """
    for row, value in enumerate(values):
        if value is None:
            continue
        colour, marker = colours[row], (markers or ["o"] * len(values))[row]
        axes.plot([value.low, value.high], [row, row], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
        face = "none" if hollow and hollow[row] else colour
        (mark,) = axes.plot([value.mean], [row], marker=marker, color=colour, markersize=6.5, markerfacecolor=face)
        mark.set_gid(f"{name}-{row}")


def rows(axes: Axes, labels: Sequence[str], look: Look) -> None:
    """Label the rows of :func:`dots`, the first on top."""
    limit = 20 if look.narrow else 30
    axes.set_yticks(range(len(labels)), [short(label, limit) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    few_ticks(axes, 4 if look.narrow else 5)


def few_ticks(axes: Axes, count: int) -> None:
    """At most so many ticks along x."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(count))


def zero_line(axes: Axes, look: Look, at: float = 0.0, *, upright: bool = True) -> None:
    """A line through what nothing changes."""
    line = axes.axvline if upright else axes.axhline
    line(at, color=look.theme.muted, linewidth=1.0, zorder=0.5)
