"""The little that a model must be able to do to be tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npti_export.runtimes.base import Exchange, Message


class Model(Protocol):
    """A loaded model; both runtimes are."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins."""

    def encode_text(self, text: str, *, begin: bool = True) -> tuple[int, ...]:
        """Token ids of plain text; ``begin`` puts what the model wants at the beginning of a text in front."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """``[tokens, vocabulary]`` next-token logits at every position of one sequence."""

    def log_likelihoods(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Mean log-likelihood per token (nats) of each response after its prompt."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, repetition_penalty: float
    ) -> list[Exchange]:
        """Greedy answers to the prompts, decoded as one batch."""
