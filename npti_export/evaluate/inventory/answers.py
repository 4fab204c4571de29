"""How a model rates itself: no words, only how likely each option is.

Each item is asked with the options in both orders. A model that likes a label or a place, whatever stands there, gives
the mirrored distribution the second time, so the mean of the two is the middle of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import Change, InventoryPart
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.inventory.items import Item
from npti_export.evaluate.options import LogitRuntime, Options, choose, find_options
from npti_export.runtimes.base import chat

SCALE = (
    "very inaccurate",
    "moderately inaccurate",
    "neither accurate nor inaccurate",
    "moderately accurate",
    "very accurate",
)
# The first that the vocabulary has. A 135M model puts 0.45 on the first number and 0.71 on the first letter, so there
# numbers leave more room for what the statement says.
LABELLINGS = (("1", "2", "3", "4", "5"), ("A", "B", "C", "D", "E"))
_BATCH = 32  # prompts a call: a row of logits has the size of the vocabulary
_PROMPT = (
    "How well does a statement describe you as you are? Choose one answer:\n{options}\n\n"
    'The statement: "{text}"\n\nReply with {labels} only.'
)


@dataclass(frozen=True)
class InventoryAnswers:
    """What a model says of itself.

    Attributes:
        scores: ``[items]`` float64, expected ratings 1 to 5 towards the ``+`` pole, reverse-keyed items turned round.
        mass: ``[items]`` float64, probability that the model begins its answer with a label at all.
    """

    scores: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]


def answer_inventory(
    runtime: LogitRuntime,
    items: Sequence[Item],
    *,
    system: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InventoryAnswers:
    """Let a model rate how accurate each item is, with the options in both orders.

    Args:
        runtime: the model.
        items: one or more.
        system: a system prompt, such as a persona.
        progress: told how many prompts of how many are done.

    Raises:
        EvaluationError: no labels are single tokens in the model's vocabulary, or its logits are not numbers.
    """
    labels, options = labelling(runtime)
    ratings, masses = [], []
    for order in (1, -1):
        values = np.arange(1.0, 6.0)[::order]
        chats = [chat(system, inventory_prompt(item.text, labels, SCALE[::order])) for item in items]
        for start in range(0, len(chats), _BATCH):
            choice = choose(runtime, chats[start : start + _BATCH], options)
            ratings.append(choice.shares @ values)
            masses.append(choice.mass)
            if progress is not None:
                progress(sum(map(len, ratings)), 2 * len(items))
    mean, mass = (np.concatenate(values).reshape(2, len(items)).mean(0) for values in (ratings, masses))
    turned = np.array([item.keyed == "-" for item in items])
    return InventoryAnswers(np.where(turned, 6 - mean, mean), mass)


def inventory_part(
    base: InventoryAnswers, steered: InventoryAnswers, items: Sequence[Item], source: str, *, seed: int = 0
) -> InventoryPart:
    """The traits' means over items before and after, and the change, item by item.

    Args:
        base: the unsteered model's answers.
        steered: the steered one's, to the same items.
        items: what was answered.
        source: what the inventory is called.
        seed: of the intervals.
    """
    traits = {}
    for trait in dict.fromkeys(item.trait for item in items):
        own = np.array([item.trait == trait for item in items])
        before, after = base.scores[own], steered.scores[own]
        traits[trait] = Change(
            base=estimate(before, seed=seed),
            steered=estimate(after, seed=seed),
            change=estimate(after - before, seed=seed),
        )
    return InventoryPart(source=source, traits=traits)


def inventory_prompt(text: str, labels: Sequence[str], scale: Sequence[str]) -> str:
    """What the user says; all that comes before the statement is the same for every item."""
    options = "\n".join(f"{label}. {words}" for label, words in zip(labels, scale, strict=True))
    kind = "its letter" if labels[0].isalpha() else "its number"
    return _PROMPT.format(options=options, text=text, labels=kind)


def labelling(runtime: LogitRuntime) -> tuple[tuple[str, ...], Options]:
    """The first labelling of which each label is one token, and these tokens.

    Raises:
        EvaluationError: there is none.
    """
    for labels in LABELLINGS:
        options = find_options(runtime, labels)
        if options is not None:
            return labels, options
    raise EvaluationError(
        "the inventory cannot be asked: neither 1 to 5 nor A to E are single tokens at the head of this model's "
        "answers; leave the inventory out"
    )
