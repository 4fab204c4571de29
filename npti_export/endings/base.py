"""What the main job asks of a format."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from npti_export.progress import Progress
from npti_export.rule_io import SavedRule
from npti_export.runtimes.base import Message

if TYPE_CHECKING:
    from npti_export.compiler.passes import Compiled
    from npti_export.models import ModelSource
    from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
    from npti_export.verify import Opener

Format = Literal["gguf", "peft", "checkpoint", "control-vector", "dial"]
SINGLE_FILES = ("gguf", "control-vector")  # the others are directories
BAKED = ("gguf", "dial")  # into a GGUF
IN_LLAMACPP = (*SINGLE_FILES, "dial")  # where a GGUF of them is measured
SAMPLE_TOKENS = 96


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        nbytes: its size.
        extra_width: neurons appended to the layer that gets most.
        extra_width_mean: neurons appended to a layer on average.
        base_bytes: size of the unsteered file; None where there is no such file.
        base_sha256: of that file, or of each of the files that it is split into.
    """

    nbytes: int
    extra_width: int = 0
    extra_width_mean: float = 0.0
    base_bytes: int | None = None
    base_sha256: str | dict[str, str] | None = None


class Ending(Protocol):
    """One format, for one model; opened before the work, closed after it."""

    format: Format
    share: float
    """Of an artifact that only approximates the rule: the part of the unsteered file's distance that may be left."""

    def __enter__(self) -> Ending: ...

    def __exit__(self, *error: object) -> None: ...

    def check_output(self, path: Path, *, force: bool) -> None:
        """Raise before any work if the output cannot be written."""

    def output(self, path: Path, *, force: bool) -> AbstractContextManager[Path]:
        """A temporary place that is published whole, or not at all."""

    def compile(self, saved: SavedRule, progress: Progress) -> Compiled | None:
        """Compile the rule for :meth:`write`; None for a format that has no neurons to compile to."""

    def write(self, saved: SavedRule, path: Path) -> Written:
        """Write the artifact to its temporary place."""

    def artifact(self, path: Path) -> Opener:
        """Opens the artifact in the runtime that will run it."""

    def base(self) -> Opener | None:
        """Opens the unsteered model in that runtime; None where it is torch."""

    def in_llamacpp(self, path: Path, source: ModelSource) -> LlamaCppRuntime | None:
        """The artifact opened by llama.cpp, if that is where it runs; ``source`` is the model that it was made of."""

    def exact(self, path: Path) -> bool | None:
        """Whether the artifact's format rounds nothing that we add; None where it only approximates the rule."""

    def answers(self, path: Path, messages: list[Message], repetition_penalty: float) -> dict[str, str]:
        """``base`` and ``steered``: greedy answers of the unsteered model and of the artifact."""

    def finish(self, path: Path, saved: SavedRule, report: dict[str, Any]) -> None:
        """Put what was measured (the provenance's fidelity) into the artifact, and a model card beside it."""

    def digest(self, path: Path) -> str | dict[str, str]:
        """SHA-256 of the artifact, or of each of its files with weights."""
