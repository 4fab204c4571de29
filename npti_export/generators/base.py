"""The small interface behind which a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from npti_export.errors import BenchError
from npti_export.runtimes.base import Message


class UnusableAnswerError(BenchError):
    """An answer came, and there is nothing to read in it; asked again it may be better."""


class UnavailableError(BenchError):
    """No answer came for as long as the user is willing to wait."""


class RefusedError(BenchError):
    """An endpoint does not take a request, however often it is asked.

    Args:
        text: what a user is told.
        code: HTTP status.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Request:
    """One chat to be continued.

    Attributes:
        messages: the chat.
        seed: of the sampling, 31 bits.
        max_tokens: longest answer.
        temperature: of the sampling; 0 takes the likeliest token.
        schema: JSON schema that the answer must follow, or None.
    """

    messages: Sequence[Message]
    seed: int
    max_tokens: int
    temperature: float
    schema: dict[str, object] | None = None


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: at most 1 MiB.
        cut: whether it ends where the model had no more room.
        tokens_in: of the chat, 0 where an endpoint does not say.
        tokens_out: of the answer, likewise.
    """

    text: str
    cut: bool = False
    tokens_in: int = 0
    tokens_out: int = 0


class Generator(Protocol):
    """Writes answers."""

    concurrency: int
    """How many requests it takes at once."""

    async def answer(self, request: Request) -> Answer:
        """Continue a chat.

        Raises:
            UnusableAnswerError: only worthless answers came.
            UnavailableError: none came, though waited for.
            RefusedError: it will not come however often it is asked.
            BenchError: likewise, for another reason than an endpoint's.
        """

    async def close(self) -> None:
        """Free what it holds."""

    def about(self) -> dict[str, Any]:
        """What a report says of it; never a secret."""
