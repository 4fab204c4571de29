"""A PEFT adapter, run by stock PEFT and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.endings.base import SAMPLE_TOKENS, Format, Written
from npti_export.errors import AdapterError, NptiError, shortened
from npti_export.export.card import model_card
from npti_export.export.peft import write_adapter
from npti_export.files import atomic_directory, check_directory_writable, sha256_file
from npti_export.progress import Progress
from npti_export.rule_io import ADAPTER_WEIGHTS, SavedRule
from npti_export.runtimes.base import Message

if TYPE_CHECKING:
    from npti_export.models import ModelSource
    from npti_export.runtimes.transformers import TransformersRuntime
    from npti_export.verify import Logits, LogitsOf, Opener


class PeftEnding:
    """Implements :class:`npti_export.endings.base.Ending`.

    Args:
        exact: gives the model in float32.
        identity_checked: whether the adapter must be of this very model.
    """

    format: Format = "peft"
    share = 1.0

    def __init__(self, exact: Callable[[], TransformersRuntime], *, identity_checked: bool = True) -> None:
        self._exact, self._identity_checked = exact, identity_checked

    def __enter__(self) -> PeftEnding:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def check_output(self, path: Path, *, force: bool) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        check_directory_writable(path, force=force)

    def output(self, path: Path, *, force: bool) -> AbstractContextManager[Path]:
        """See :class:`npti_export.endings.base.Ending`."""
        return atomic_directory(path, force=force)

    def compile(self, saved: SavedRule, progress: Progress) -> None:
        """See :class:`npti_export.endings.base.Ending`."""

    def write(self, saved: SavedRule, path: Path) -> Written:
        """See :class:`npti_export.endings.base.Ending`."""
        write_adapter(saved, path)
        return Written((path / ADAPTER_WEIGHTS).stat().st_size)

    def artifact(self, path: Path) -> Opener:
        """Loaded by ``PeftModel.from_pretrained`` into the runtime's model, and switched on for its own logits only."""

        @contextmanager
        def opened() -> Iterator[LogitsOf]:
            runtime = self._exact()
            adapted = self._loaded(runtime, path)
            adapted.base_model.disable_adapter_layers()

            def logits(tokens: Sequence[int]) -> Logits:
                adapted.base_model.enable_adapter_layers()
                try:
                    with _everywhere(runtime, len(tokens)):
                        return runtime.logits(tokens)
                finally:
                    adapted.base_model.disable_adapter_layers()

            try:
                yield logits
            finally:
                adapted.unload()

        return opened

    def base(self) -> None:
        """Torch is the runtime."""

    def in_llamacpp(self, path: Path, source: ModelSource) -> None:
        """Torch is the runtime."""

    def exact(self, path: Path) -> bool:
        """Shifts are float32 and clamps are bits."""
        return True

    def answers(self, path: Path, messages: list[Message], repetition_penalty: float) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        runtime = self._exact()
        options: dict[str, Any] = {"max_new_tokens": SAMPLE_TOKENS, "repetition_penalty": repetition_penalty}
        base = runtime.answer(messages, **options)
        adapted = self._loaded(runtime, path)
        try:
            return {"base": base, "steered": runtime.answer(messages, **options)}
        finally:
            adapted.unload()

    def finish(self, path: Path, saved: SavedRule, report: dict[str, Any]) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        write_adapter(saved, path)
        (path / "README.md").write_text(model_card(report), encoding="utf-8")

    def digest(self, path: Path) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        return {ADAPTER_WEIGHTS: sha256_file(path / ADAPTER_WEIGHTS)}

    def _loaded(self, runtime: TransformersRuntime, path: Path) -> Any:
        import peft

        config = None
        try:
            if not self._identity_checked:
                config = peft.PeftConfig.from_pretrained(path)
                config.provenance = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks it
                return peft.PeftModel.from_pretrained(runtime.model, path, config=config)
        except NptiError:
            raise
        except Exception as error:  # PEFT raises anything on fields of its own that are damaged
            reason = shortened(str(error).strip() or type(error).__name__, 200)
            raise AdapterError(f"{path}: PEFT cannot load it: {reason}; make the adapter again") from error


@contextmanager
def _everywhere(runtime: TransformersRuntime, length: int) -> Iterator[None]:
    """All positions count as the response, if the adapter steers that only: the rule is measured everywhere."""
    import torch

    from npti_export.positions import find_positions

    positions = find_positions(runtime.model)
    if positions is None:
        yield
        return
    with positions.given(torch.ones(1, length, dtype=torch.bool)):
        yield
