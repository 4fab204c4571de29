"""A choice between a few answers of one token each, read from the model's probabilities instead of its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npti_export.errors import EvaluationError
from npti_export.runtimes.base import Message, chat, shared_length

_PROBE = "Which one?"


class LogitRuntime(Protocol):
    """A model whose next-token logits can be seen; both runtimes are one."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins."""

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """``[prompts, vocabulary]`` float32 next-token logits after the last token of each prompt."""


@dataclass(frozen=True)
class Options:
    """How a model's answers begin with one of several labels.

    Attributes:
        lead: tokens between the prompt and the label: what the template puts there, and the answer's beginning.
        tokens: of each label.
    """

    lead: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What a model would answer.

    Attributes:
        shares: ``[prompts, labels]`` float64, probabilities of the labels, which add up to 1.
        mass: ``[prompts]`` float64, what the labels have of the probability of all tokens.
    """

    shares: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]


def find_options(runtime: LogitRuntime, labels: Sequence[str], beginning: str = "") -> Options | None:
    """Tokens of labels at the head of the assistant's answer; None where a label is not one token there.

    The model's own template shows them: finished answers that differ in the label alone are encoded, so whatever
    stands between prompt and answer (spaces, an empty train of thought) is found as well.

    Args:
        runtime: the model.
        labels: two or more different ones.
        beginning: of the answer, before the label.
    """
    question = chat(None, _PROBE)
    asked = runtime.encode(question)
    answered = [
        runtime.encode([*question, {"role": "assistant", "content": f"{beginning}{label}"}]) for label in labels
    ]
    before = shared_length(answered)
    after = {one[before + 1 :] for one in answered}
    tokens = tuple(one[before] for one in answered if len(one) > before)
    whole = len(after) == 1 and len(set(tokens)) == len(labels)
    if not whole or answered[0][: len(asked)] != asked or before < len(asked):
        return None
    return Options(answered[0][len(asked) : before], tokens)


def choose(runtime: LogitRuntime, chats: Sequence[Sequence[Message]], options: Options) -> Choice:
    """The probabilities of the options after each chat.

    Raises:
        EvaluationError: the model computes logits that are not numbers.
    """
    logits = runtime.last_logits([(*runtime.encode(one), *options.lead) for one in chats]).astype(np.float64)
    logs = logits[:, options.tokens]
    with np.errstate(invalid="ignore"):  # what is not a number is found below
        total, labels = np.logaddexp.reduce(logits, -1), np.logaddexp.reduce(logs, -1)
    if not (np.isfinite(total).all() and np.isfinite(labels).all()):
        raise EvaluationError("the model computes logits that are not numbers; get the file again")
    return Choice(np.exp(logs - labels[:, None]), np.exp(labels - total))
