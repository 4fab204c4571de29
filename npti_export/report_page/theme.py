"""Colours and sizes of the figures and of the page.

Blue against orange tells the two poles apart, which every common kind of colour blindness leaves apart; where more than
two things meet, the shape of the marker tells them apart too. Texts reach a contrast of 4.5 on their background and
marks 3, by the formula of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Theme:
    """One colour a role, ``#rrggbb``; all different, as the roles are found again by them in the SVG."""

    surface: str
    ink: str
    muted: str
    grid: str
    wanted: str
    opposite: str
    prompt: str
    baseline: str
    base: str

    def roles(self) -> Iterator[tuple[str, str]]:
        """Name and colour of every role."""
        yield from asdict(self).items()


LIGHT = Theme(
    surface="#fffefb",
    ink="#1c2330",
    muted="#566072",
    grid="#dcdcd6",
    wanted="#0a68b4",
    opposite="#bf4f06",
    prompt="#84479a",
    baseline="#00796a",
    base="#6a7383",
)
DARK = Theme(
    surface="#1b1f27",
    ink="#e8eaef",
    muted="#a8b0be",
    grid="#39404c",
    wanted="#62b6f2",
    opposite="#f3a45a",
    prompt="#d2a0e3",
    baseline="#4fcbb1",
    base="#9aa3b2",
)

# Colour and marker of a condition's kind.
KINDS = {
    "base": ("base", "o"),
    "steered": ("wanted", "o"),
    "prompt": ("prompt", "s"),
    "baseline": ("baseline", "^"),
    "null": ("base", "X"),
}


# Inches: the whole column of the page, half of it, and what a phone 360 pixels wide has room for.
WIDE, HALF, PHONE = 9.6, 4.6, 3.0


@dataclass(frozen=True)
class Look:
    """How a figure is drawn.

    Attributes:
        theme: its colours.
        width: in inches of 96 CSS pixels.
    """

    theme: Theme = LIGHT
    width: float = HALF

    @property
    def narrow(self) -> bool:
        """Whether it is for a phone."""
        return self.width < 4


def contrast_ratio(one: str, other: str) -> float:
    """Contrast of two colours ``#rrggbb``, 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
