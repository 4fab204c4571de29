"""The small interface behind which a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npti_export.stats import ActivationStats, AnswerCounts

Message = dict[str, str]
# Used where a model brings no chat template, with a note to the user: plain labelled turns, which any model can follow.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


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

    def encode_text(self, text: str, *, begin: bool = True) -> tuple[int, ...]:
        """Token ids of text as it is, without a chat template; ``begin``: with the token that begins a sequence."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, repetition_penalty: float
    ) -> list[Exchange]:
        """Greedy answers to the prompts, decoded as one batch."""

    def observe(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[int],
        *,
        max_new_tokens: int,
        repetition_penalty: float,
        shared: Sequence[int] | None = None,
    ) -> tuple[list[ActivationStats], AnswerCounts]:
        """Answer prompts; give the statistics of the gate activations ``a`` of each group, and each answer's counts.

        Counted are the response tokens that the model is fed while it decodes: all but the last.

        Args:
            prompts: token ids.
            groups: for each prompt the index of its statistics, from 0 on.
            max_new_tokens: longest answer.
            repetition_penalty: divides the logits of tokens seen before.
            shared: how many first tokens of each prompt other prompts begin with, too, now or in later calls; a hint.
        """

    def activation_stats(self, exchanges: Sequence[Exchange]) -> ActivationStats:
        """The same statistics of given answers, by one teacher-forced pass."""

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """``[tokens, vocabulary]`` next-token logits at every position of one sequence."""

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """``[prompts, vocabulary]`` next-token logits after the last token of each prompt."""

    def log_likelihoods(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Mean log-likelihood per token (nats) of each response after its prompt."""

    def stream_means(
        self, exchanges: Sequence[Exchange], added: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """Mean residual stream behind each layer where a response token is predicted, ``[layers, hidden]``.

        Args:
            exchanges: prompts and responses.
            added: ``[layers, hidden]``, added to the output of each MLP meanwhile.
        """

    def stream_follows(self, exchanges: Sequence[Exchange], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What to add behind each layer so that the mean stream of :meth:`stream_means` moves by ``wanted``.

        Found on the way through the layers, each with those before it in place: some exchanges at a time, of which each
        such group is compared with itself, and the mean over the groups is taken.

        Args:
            exchanges: prompts and responses.
            wanted: ``[layers, hidden]``.

        Returns:
            ``[layers, hidden]``.

        Raises:
            ModelError: an exchange is longer than what is computed at once.
        """

    def down_weight(self, layer: int) -> npt.NDArray[np.float32]:
        """Weight of a layer's down projection, ``[hidden, width]``."""


def shared_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all of one or more sequences have in common."""
    ordered = sorted(map(tuple, sequences))
    first, last = ordered[0], ordered[-1]  # whatever these two share, those between them do, too
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def chat(system: str | None, user: str) -> list[Message]:
    """A one-turn chat."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": user}]
