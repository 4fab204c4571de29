"""Loading a model at the precision that each stage needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from npti_export.models import ModelSource
from npti_export.progress import Progress

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime

_KEEP_BOTH_BYTES = 2 << 30  # below this float32 size, one load serves identification and verification


@dataclass(frozen=True)
class RuntimeSettings:
    """Where and how a model runs; see :class:`npti_export.runtimes.transformers.TransformersRuntime`."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass
class Timings:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to ``stage``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Models:
    """Loads a model once or twice: fast for identification, float32 for verification.

    Args:
        source: the model.
        settings: where and how it runs.
        timings: told how long loading took, as ``load``.
        progress: told of each load.
        verifies: whether float32 will be needed too.
    """

    def __init__(
        self,
        source: ModelSource,
        settings: RuntimeSettings,
        timings: Timings,
        progress: Progress,
        *,
        verifies: bool,
    ) -> None:
        self._source, self._settings, self._timings, self._progress = source, settings, timings, progress
        self._verifies = verifies
        self._exact: TransformersRuntime | None = None
        self._fast: TransformersRuntime | None = None

    def dtype(self) -> str:
        """The dtype identification computes in."""
        from npti_export.runtimes.transformers import pick_dtype, usable_device

        if self._settings.dtype != "auto":
            return self._settings.dtype
        return str(pick_dtype(usable_device(self._settings.device))).removeprefix("torch.")

    def device(self) -> str:
        """The kind of device: cpu, cuda or mps.

        Raises:
            ModelError: the requested one cannot be used here.
        """
        from npti_export.runtimes.transformers import usable_device

        return usable_device(self._settings.device).type

    def fast(self) -> TransformersRuntime:
        """The model in the identification dtype."""
        if self._fast is None:
            dtype = self.dtype()
            shape = self._source.shape
            float32_bytes = 4 * 5 * shape.layers * shape.width * shape.hidden  # MLPs are three fifths or more
            if dtype == "float32":
                self._fast = self.exact()
            elif float32_bytes < _KEEP_BOTH_BYTES and self._verifies:
                self._fast = self.exact().converted(dtype)
            else:
                self._fast = self._load(dtype)
        return self._fast

    def exact(self) -> TransformersRuntime:
        """The model in float32."""
        if self._exact is None:
            self._exact = self._load("float32")
        return self._exact

    def release_fast(self) -> None:
        """Free the identification copy."""
        self._fast = None

    def _load(self, dtype: str) -> TransformersRuntime:
        from npti_export.runtimes.transformers import TransformersRuntime

        settings = self._settings
        self._progress.start(f"load {self._source.name}", 1)
        with self._timings.measure("load"):
            runtime = TransformersRuntime(
                self._source, device=settings.device, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        self._progress.advance(1)
        if runtime.uses_fallback_template:
            self._progress.note(f"{self._source.name} brings no chat template; using plain 'User: … Assistant:' turns")
        return runtime
