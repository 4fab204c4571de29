"""How long-running library calls report; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress. All methods return at once."""

    def start(self, stage: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self, steps: int, tokens: int = 0) -> None:
        """``steps`` more are done, ``tokens`` more were processed."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int) -> None:
        """See :class:`Progress`."""

    def advance(self, steps: int, tokens: int = 0) -> None:
        """See :class:`Progress`."""

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
