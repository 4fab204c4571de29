"""A control vector with the constant part of the rule, for models whose MLPs take no extra neurons in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.constant import as_directions, mean_effect
from npti_export.endings.base import SAMPLE_TOKENS, Format, Written
from npti_export.errors import ModelError
from npti_export.export.control_vector import read_directions, write_control_vector
from npti_export.export.metadata import record_fidelity, steering_metadata
from npti_export.files import atomic_output, check_writable, sha256_file
from npti_export.gguf.shards import read_model
from npti_export.models import ModelSource
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule_io import SavedRule
from npti_export.runtimes.base import Message, chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

if TYPE_CHECKING:
    from npti_export.verify import LogitsOf, Opener


class ControlVectorEnding:
    """Implements :class:`npti_export.endings.base.Ending`.

    Args:
        source: the unsteered GGUF.
        recipe: its ``verify`` section says how many answers are averaged over.
        settings: where llama.cpp computes.
        questions: what these answer: search questions, so that verification's are new.

    Raises:
        ModelError: the model is not a GGUF.
    """

    format: Format = "control-vector"
    share = 1.0

    def __init__(self, source: ModelSource, recipe: Recipe, settings: Settings, questions: Sequence[str]) -> None:
        if source.kind != "gguf":
            raise ModelError(
                f"{source.name}: is a transformers model, and a control vector is measured on the GGUF that it is for; "
                "give that file as --model"
            )
        self._source, self._recipe, self._settings, self._questions = source, recipe, settings, questions

    def __enter__(self) -> ControlVectorEnding:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def check_output(self, path: Path, *, force: bool) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        check_writable(path, force=force)

    def output(self, path: Path, *, force: bool) -> AbstractContextManager[Path]:
        """See :class:`npti_export.endings.base.Ending`."""
        return atomic_output(path, force=force)

    def compile(self, saved: SavedRule, progress: Progress) -> None:
        """See :class:`npti_export.endings.base.Ending`."""

    def write(self, saved: SavedRule, path: Path) -> Written:
        """See :class:`npti_export.endings.base.Ending`."""
        with self._open(None) as runtime:
            exchanges = runtime.generate(
                [runtime.encode(chat(None, question)) for question in self._questions],
                max_new_tokens=self._recipe.verify.answer_tokens,
                repetition_penalty=self._recipe.identify.repetition_penalty,
            )
            directions = as_directions(mean_effect(runtime, saved.rule, exchanges))
        base = read_model(self._source.path)
        metadata = steering_metadata(saved, self._source.path)
        return Written(write_control_vector(path, directions, base.architecture, metadata))

    def artifact(self, path: Path) -> Opener:
        """See :class:`npti_export.endings.base.Ending`."""
        return self._opener(path)

    def base(self) -> Opener:
        """See :class:`npti_export.endings.base.Ending`."""
        return self._opener(None)

    def in_llamacpp(self, path: Path, source: ModelSource) -> LlamaCppRuntime:
        """See :class:`npti_export.endings.base.Ending`."""
        return self._open(path)

    def exact(self, path: Path) -> None:
        """It only approximates the rule."""

    def answers(self, path: Path, messages: list[Message], repetition_penalty: float) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        found = {}
        for name, vector in (("base", None), ("steered", path)):
            with self._open(vector) as runtime:
                found[name] = runtime.answer(
                    messages, max_new_tokens=SAMPLE_TOKENS, repetition_penalty=repetition_penalty
                )
        return found

    def finish(self, path: Path, saved: SavedRule, report: dict[str, Any]) -> None:
        """See :class:`npti_export.endings.gguf.GGUFEnding`."""
        record_fidelity(path, saved.about)

    def digest(self, path: Path) -> str:
        """See :class:`npti_export.endings.base.Ending`."""
        return sha256_file(path)

    def _open(self, vector: Path | None) -> LlamaCppRuntime:
        shape = self._source.shape
        return LlamaCppRuntime(
            self._source.path,
            self._settings,
            sequences=self._recipe.verify.prompts,
            source=self._source,
            control_vector=None if vector is None else read_directions(vector, shape.layers, shape.hidden),
        )

    def _opener(self, vector: Path | None) -> Opener:
        @contextmanager
        def opened() -> Iterator[LogitsOf]:
            with self._open(vector) as runtime:
                yield runtime.logits

        return opened
