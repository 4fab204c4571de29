"""What is sent to a model to get a personality from it, or to see one: nothing, an adjective, a persona."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from npti_export.bench import Question, TraitBench, scoring_personas
from npti_export.identify.collect import contrast_prompts, message
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Runtime
from npti_export.traits import Sign

Prompting = Literal["plain", "adjective", "persona"]
PROMPTINGS: tuple[Prompting, ...] = ("plain", "adjective", "persona")
_ADJECTIVE = "You are a very {name} person: {description}."


def prompts(
    runtime: Runtime, bench: TraitBench, questions: Sequence[Question], sign: Sign, recipe: Recipe, how: Prompting
) -> list[tuple[int, ...]]:
    """Token ids of each question as a user sends it who prompts for a pole in one of three ways.

    ``adjective`` says the pole's name and what it means, in one sentence; ``persona`` is one of the bench's
    descriptions of somebody at that pole, as identification gives it to the same question.
    """
    if how == "persona":
        return contrast_prompts(runtime, bench, questions, sign, recipe)
    system = None
    if how == "adjective":
        pole = bench.definition.pole(sign)
        persona = _ADJECTIVE.format(name=pole.name, description=pole.description.rstrip("."))
        system = recipe.prompt.system.replace("{persona}", persona)
    return [runtime.encode(message(system, question.text, recipe)) for question in questions]


def scoring_prompts(
    runtime: Runtime, bench: TraitBench, questions: Sequence[Question], sign: Sign, recipe: Recipe, turn: int
) -> list[tuple[int, ...]]:
    """The questions under personas of a pole by which answers are scored; each turn gives a question another one."""
    personas = scoring_personas(bench, sign, recipe.identify.seed)
    found = []
    for place, question in enumerate(questions):
        system = recipe.prompt.system.replace("{persona}", personas[(place + turn) % len(personas)].text)
        found.append(runtime.encode(message(system, question.text, recipe)))
    return found
