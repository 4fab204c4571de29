"""The small interface behind which a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npti_export.stats import ActivationStats

Message = dict[str, str]


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer to it, in token ids. The answer's end-of-turn token, if it came, is included."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response in one sequence."""
        return self.prompt + self.response


class Runtime(Protocol):
    """A loaded model."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, repetition_penalty: float
    ) -> list[Exchange]:
        """Greedy answers to the prompts, decoded as one batch."""

    def activation_stats(self, exchanges: Sequence[Exchange]) -> ActivationStats:
        """Statistics of the gate activations ``a`` on the response tokens, by one teacher-forced pass.

        Counted are the response tokens that the model was fed while it decoded: all but the last.
        """

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """``[tokens, vocabulary]`` next-token logits at every position of one sequence."""


def chat(system: str | None, user: str) -> list[Message]:
    """A one-turn chat."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": user}]
