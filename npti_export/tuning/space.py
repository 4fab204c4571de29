"""What the tuner may choose: parts of a rule and their settings, as overrides of a recipe for one pole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from npti_export.recipe import PoleSection, Recipe, load_recipe

Neurons = Literal["off", "shift", "clamp", "both"]
_NEURONS: tuple[Neurons, ...] = ("off", "shift", "clamp", "both")
_SWITCH = (False, True)
_GAMMA = (0.1, 4.0)
_THRESHOLD = (0.02, 0.4)
_CONSTANT = (0.1, 4.0)
_MATCHED = (0.25, 3.0)  # none at all is a switch of its own
_EFFECT_SIZES = (0.0, 0.2, 0.5, 0.8)  # DPN-LE's is 0.8
_MAGNITUDES = (0.0, 0.9, 0.95, 0.98, 0.99, 0.995)  # DPN-LE's is 0.995
_FEWEST, _SHARE = 32, 4  # neurons a pole: so many to a quarter of all
_SHIPPED = ("npti", "matched", "dpn-le", "mean-shift")
_MATCHED_STARTS = (1.5, 2.0, 1.0, 2.5)


class Suggests(Protocol):
    """Draws values; optuna's trials do."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of several."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number, both ends included."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number, likewise."""


@dataclass(frozen=True)
class Point:
    """One choice.

    Attributes:
        neurons: what is done to neurons.
        gamma: strength of shifts, and of nothing else here.
        count: neurons a pole; 0 takes them by ``threshold``.
        threshold: smallest ``|delta|``.
        constant: times the mean difference, all in all; 0 is off.
        effect_size: of the neurons that get it.
        magnitude: likewise.
        matched: times the matched constant, all in all; 0 is off.
        first: layers ``first`` to ``last - 1`` are steered.
        last: see there.
    """

    neurons: Neurons
    gamma: float
    count: int
    threshold: float
    constant: float
    effect_size: float
    magnitude: float
    matched: float
    first: int
    last: int


@dataclass(frozen=True)
class Space:
    """All choices for one model.

    Every range of layers that is tried holds the middle of the model: ``first`` is at most ``layers // 2``, ``last`` at
    least ``layers // 2 + 1``. Rules that end before it, or begin behind it, are not looked for.

    Attributes:
        layers: of the model.
        neurons: of all layers together.
        constants: whether the profile holds means; a mixture of experts has none.
        matched: whether it holds a matched constant.
        selects: whether neurons may be shifted or clamped.
    """

    layers: int
    neurons: int
    constants: bool = True
    matched: bool = True
    selects: bool = True

    @property
    def _counts(self) -> tuple[int, int]:
        most = max(1, self.neurons // _SHARE)
        return min(_FEWEST, most), most

    def suggest(self, trial: Suggests) -> Point:
        """Draw a point; any is a valid one, something is always on."""
        drawn: dict[str, Any] = {}
        others = self.constants or self.matched
        if self.selects:
            drawn["neurons"] = trial.suggest_categorical("neurons", _NEURONS if others else _NEURONS[1:])
        neurons = drawn.get("neurons", "off")
        if neurons in ("shift", "both"):
            drawn["gamma"] = trial.suggest_float("gamma", *_GAMMA, log=True)
        if neurons != "off":
            drawn["by"] = trial.suggest_categorical("by", ("count", "threshold"))
            if drawn["by"] == "count":
                drawn["count"] = trial.suggest_int("count", *self._counts, log=True)
            else:
                drawn["threshold"] = trial.suggest_float("threshold", *_THRESHOLD)
        if self._switch(trial, "mean", self.constants, needed=neurons == "off" and not self.matched):
            drawn["constant"] = trial.suggest_float("constant", *_CONSTANT, log=True)
            drawn["effect_size"] = trial.suggest_categorical("effect_size", _EFFECT_SIZES)
            drawn["magnitude"] = trial.suggest_categorical("magnitude", _MAGNITUDES)
        nothing = neurons == "off" and "constant" not in drawn
        if self._switch(trial, "match", self.matched, needed=nothing):
            drawn["matched"] = trial.suggest_float("matched", *_MATCHED)
        drawn["first"] = trial.suggest_int("first", 0, self.layers // 2)
        drawn["last"] = trial.suggest_int("last", self.layers // 2 + 1, self.layers) if self.layers > 1 else 1
        return self.point(drawn)

    @staticmethod
    def _switch(trial: Suggests, name: str, there: bool, *, needed: bool) -> bool:
        return there and (needed or bool(trial.suggest_categorical(name, _SWITCH)))

    def point(self, parameters: Mapping[str, Any]) -> Point:
        """The point of drawn values, rounded to what one would write into a recipe.

        Raises:
            KeyError, TypeError, ValueError: values of another space.
        """
        return Point(
            neurons=_NEURONS[_NEURONS.index(parameters["neurons"] if self.selects else "off")],
            gamma=_rounded(parameters.get("gamma", 0.0)),
            count=int(parameters.get("count", 0)),
            threshold=_rounded(parameters.get("threshold", 0.0)),
            constant=_rounded(parameters.get("constant", 0.0)),
            effect_size=float(parameters.get("effect_size", 0.0)),
            magnitude=float(parameters.get("magnitude", 0.0)),
            matched=_rounded(parameters.get("matched", 0.0)),
            first=int(parameters["first"]),
            last=int(parameters.get("last", self.layers)),
        )

    def parameters(self, point: Point) -> dict[str, Any]:
        """The values that give a point."""
        found: dict[str, Any] = {"first": point.first}
        if self.selects:
            found["neurons"] = point.neurons
        if self.layers > 1:
            found["last"] = point.last
        if point.neurons in ("shift", "both"):
            found["gamma"] = point.gamma
        if point.neurons != "off":
            by = "count" if point.count else "threshold"
            found |= {"by": by, by: getattr(point, by)}
        if self.constants:
            found["mean"] = point.constant > 0
        if point.constant:
            found |= {name: getattr(point, name) for name in ("constant", "effect_size", "magnitude")}
        if self.matched:
            found["match"] = point.matched > 0
        if point.matched:
            found["matched"] = point.matched
        return found

    def starts(self, recipe: Recipe) -> list[Point]:
        """Where the search begins: the given recipe, and the shipped methods at their own strengths.

        Args:
            recipe: for the pole.
        """
        shipped = {name: load_recipe(name) for name in _SHIPPED}
        matched = shipped.pop("matched")
        recipes = [recipe, shipped.pop("npti")]
        for strength in _MATCHED_STARTS:
            rule = matched.rule.model_copy(update={"gamma": strength})
            recipes.append(matched.model_copy(update={"rule": rule}))
        found = [self.nearest(one) for one in (*recipes, *shipped.values())]
        return list(dict.fromkeys(one for one in found if one is not None))

    def nearest(self, recipe: Recipe) -> Point | None:
        """A recipe's own rule, as near as this space has one; None where nothing of it can be had."""
        rule, select = recipe.rule, recipe.select
        constant = _within(rule.gamma * rule.constant, *_CONSTANT) if self.constants and rule.constant else 0.0
        matched = _within(rule.gamma * rule.matched, *_MATCHED) if self.matched and rule.matched else 0.0
        neurons: Neurons = "off"
        if self.selects and (rule.shift or rule.clamp):
            neurons = "both" if rule.shift and rule.clamp else "shift" if rule.shift else "clamp"
        if neurons == "off" and not (constant or matched):
            return None
        counted = neurons != "off" and select.at_least > 1
        return Point(
            neurons=neurons,
            gamma=_rounded(_within(rule.gamma, *_GAMMA)) if neurons in ("shift", "both") else 0.0,
            count=int(_within(select.at_least, *self._counts)) if counted else 0,
            threshold=_rounded(_within(select.threshold, *_THRESHOLD)) if neurons != "off" and not counted else 0.0,
            constant=_rounded(constant),
            effect_size=_closest(rule.effect_size, _EFFECT_SIZES) if constant else 0.0,
            magnitude=_closest(rule.magnitude, _MAGNITUDES) if constant else 0.0,
            matched=_rounded(matched),
            first=min(round(rule.first_layer * self.layers), self.layers // 2),
            last=max(round(rule.last_layer * self.layers), min(self.layers // 2 + 1, self.layers)),
        )

    def section(self, point: Point) -> PoleSection:
        """What a recipe says of the pole for this point: every key that is chosen, so that none is inherited."""
        gamma = point.gamma or 1.0  # which a recipe multiplies constants by, too
        rule: dict[str, Any] = {
            "gamma": gamma,
            "shift": point.neurons in ("shift", "both"),
            "clamp": point.neurons in ("clamp", "both"),
            "constant": _rounded(point.constant / gamma, 6),
            "effect_size": point.effect_size,
            "magnitude": point.magnitude,
            "matched": _rounded(point.matched / gamma, 6),
            "first_layer": round(point.first / self.layers, 5),
            "last_layer": round(point.last / self.layers, 5),
        }
        select: dict[str, Any] = {}
        if point.neurons != "off":
            select = {"at_least": 1, "at_most": self.neurons, "threshold": point.threshold}
        if point.count:
            select = {"at_least": point.count, "at_most": point.count}
        return PoleSection(select=select, rule=rule)

    def label(self, point: Point) -> str:
        """A point in a few words."""
        parts = []
        if point.matched:
            parts.append(f"matched {point.matched:g}")
        if point.neurons != "off":
            what = "shift+clamp" if point.neurons == "both" else point.neurons
            which = str(point.count) if point.count else f"|δ|≥{point.threshold:g}"
            parts.append(f"{what} {which}" + (f" γ {point.gamma:g}" if point.gamma else ""))
        if point.constant:
            limits = f" d≥{point.effect_size:g}" if point.effect_size else ""
            limits += f" top {100 * (1 - point.magnitude):.3g}%" if point.magnitude else ""
            parts.append(f"mean difference {point.constant:g}{limits}")
        whole = point.first == 0 and point.last == self.layers
        return " + ".join(parts) + ("" if whole else f", layers {point.first + 1}-{point.last}")


def with_section(recipe: Recipe, pole: str, section: PoleSection) -> Recipe:
    """A recipe that says so of one pole, over what it said of it."""
    said = recipe.poles.get(pole, PoleSection())
    merged = {"select": said.select | section.select, "rule": said.rule | section.rule}
    raw = recipe.model_dump()
    return Recipe.model_validate(raw | {"poles": raw["poles"] | {pole: merged}})


def _rounded(value: float, digits: int = 3) -> float:
    return float(f"{float(value):.{digits}g}")


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _closest(value: float, choices: Sequence[float]) -> float:
    return min(choices, key=lambda one: abs(one - value))
