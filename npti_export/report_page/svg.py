"""Figures as text and files: SVG that follows the page's colours, the same bytes every time, and PNG.

Ids are prefixed by the figure's name, as one page holds many; colours are CSS variables there, with the light theme's
colour as what they are without. A file of its own carries a style sheet for the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from npti_export.report_page.canvas import quiet
from npti_export.report_page.theme import DARK, LIGHT, Look
from npti_export.report_page.wording import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"\bfont: (?P<about>[a-z0-9 ]*?)(?P<size>[\d.]+px) [^;]+")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FAMILY = re.compile(r"font-family: [^;]+(; |$)")
_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
DPI = 200  # of a PNG: sharp on a dense screen


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure for a page: no size of its own, no id twice, colours from the page's ``--fig-…`` variables.

    Args:
        figure: drawn in the light theme.
        name: of letters, digits and hyphens; other figures of the page have other ones.
        label: what a screen reader says instead.
    """
    root = _tree(figure, name)
    for element in root.iter():
        style = element.get("style")
        if style:
            element.set("style", _COLOUR.sub(_variable, style))
    root.set("role", "img")
    root.set("aria-label", clean(label))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode")


def standalone_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as a file of its own; drawn in the light theme, it turns dark where the reader's screen is."""
    root = _tree(figure, name)
    root.set("font-family", _STACK)
    title = ElementTree.Element(f"{{{_SVG}}}title")
    title.text = clean(label)
    style = ElementTree.Element(f"{{{_SVG}}}style")
    rules = [
        f'[style*="{key}: {light}"]{{{key}:{dark} !important}}'
        for (_, light), (_, dark) in zip(LIGHT.roles(), DARK.roles(), strict=True)
        for key in ("fill", "stroke")
    ]
    style.text = "@media (prefers-color-scheme: dark){" + "".join(rules) + "}"
    root[:0] = [title, style]
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def png_bytes(figure: Figure, look: Look) -> bytes:
    """The figure as PNG on its theme's ground, the same bytes every time."""
    buffer = io.BytesIO()
    with quiet():
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=look.theme.surface, metadata={"Software": None})
    return buffer.getvalue()


def write_figure(draw: Callable[[Look], Figure], folder: Path, name: str, label: str, width: float) -> list[Path]:
    """Write ``name.svg``, ``name.png`` and ``name-dark.png`` into a folder that is there.

    Args:
        draw: draws the figure in a given look.
        folder: to write to.
        name: of the files, without what comes after the dot.
        label: the SVG's title.
        width: in inches.
    """
    light, dark = Look(LIGHT, width), Look(DARK, width)
    paths = [folder / f"{name}.svg", folder / f"{name}.png", folder / f"{name}-dark.png"]
    figure = draw(light)
    paths[0].write_text(standalone_svg(figure, name, label), encoding="utf-8")
    paths[1].write_bytes(png_bytes(figure, light))
    paths[2].write_bytes(png_bytes(draw(dark), dark))
    return paths


def _tree(figure: Figure, name: str) -> ElementTree.Element:
    """The figure's elements without prolog, date, global styles; ids prefixed, fonts left to the page."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with quiet(), matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    for element in root.iter():
        _rename(element, name)
        if style := element.get("style"):
            element.set("style", _FAMILY.sub("", _FONT.sub(_only_size, style)))
    return root


def _rename(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key in ("href", f"{{{_LINK}}}href") and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _only_size(found: re.Match[str]) -> str:
    return f"font-size: {found['size']}"


def _variable(found: re.Match[str]) -> str:
    colour = found[0]
    role = next((name for name, light in LIGHT.roles() if light == colour), None)
    return colour if role is None else f"var(--fig-{role}, {colour})"
