"""Loading a model in the runtime and at the precision that each stage needs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from npti_export.errors import ModelError
from npti_export.models import ModelSource
from npti_export.progress import Progress
from npti_export.runtimes.devices import MAP
from npti_export.temporaries import TemporaryFolder

if TYPE_CHECKING:
    from npti_export.gguf.reader import GGUFFile
    from npti_export.runtimes.base import Runtime
    from npti_export.runtimes.llamacpp.context import Settings
    from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
    from npti_export.runtimes.transformers import TransformersRuntime

Engine = Literal["llama.cpp", "transformers"]
Loaded = TypeVar("Loaded", "LlamaCppRuntime", "TransformersRuntime")

_KEEP_BOTH_BYTES = 2 << 30  # below this float32 size, one load serves identification and verification


@dataclass(frozen=True)
class RuntimeSettings:
    """Where and how a model runs.

    Attributes:
        engine: ``auto`` takes llama.cpp for a GGUF, else transformers.
        device: of transformers, see :class:`npti_export.runtimes.transformers.TransformersRuntime`, as the next two.
        dtype: of identification.
        trust_remote_code: whether to run code that comes with the model.
        threads: of llama.cpp, see :class:`npti_export.runtimes.llamacpp.context.Settings`, as the next three.
        gpu_layers: layers on the GPU.
        prompt_batch: tokens processed at once.
        context: cells of the KV cache.
        weights: what llama.cpp identifies on: the ``file`` as it is, a ``bfloat16`` copy, or the copy where it pays.
    """

    engine: Engine | Literal["auto"] = "auto"
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    threads: int = 0
    gpu_layers: int = -1
    prompt_batch: int = 512
    context: int = 0
    weights: Literal["auto", "file", "bfloat16"] = "auto"

    @property
    def llama(self) -> Settings:
        """Those of llama.cpp."""
        from npti_export.runtimes.llamacpp.context import Settings

        return Settings(self.threads, self.gpu_layers, self.prompt_batch, self.context)

    def engine_for(self, source: ModelSource) -> Engine:
        """What runs a model.

        Raises:
            ModelError: the requested one cannot.
        """
        if self.engine == "llama.cpp" and source.kind != "gguf":
            raise ModelError(
                f"{source.name}: is a transformers model, and llama.cpp runs GGUF files; leave --runtime out, or give "
                "a .gguf file as --model"
            )
        if self.engine != "auto":
            return self.engine
        return "llama.cpp" if source.kind == "gguf" else "transformers"


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
    """Loads a model once or twice: fast for identification, in float32 torch for what is measured there.

    Args:
        source: the model.
        settings: where and how it runs.
        timings: told how long loading took, as ``load``.
        progress: told of each load.
        verifies: whether float32 torch will be needed, too.
        sequences: most that llama.cpp decodes together.
        copies: a folder that processes share, so that they make a bfloat16 copy once; emptied by the caller.

    Raises:
        ModelError: the requested runtime does not run this model.
    """

    def __init__(
        self,
        source: ModelSource,
        settings: RuntimeSettings,
        timings: Timings,
        progress: Progress,
        *,
        verifies: bool,
        sequences: int = 1,
        copies: Path | None = None,
    ) -> None:
        self._shared = copies
        self.engine = settings.engine_for(source)
        self._source, self.settings, self._timings, self._progress = source, settings, timings, progress
        self._verifies, self._sequences = verifies, sequences
        self._exact: TransformersRuntime | None = None
        self._fast: TransformersRuntime | None = None
        self._llama: LlamaCppRuntime | None = None
        self._copy: LlamaCppRuntime | None = None
        self._folder: TemporaryFolder | None = None

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *error: object) -> None:
        self.release_fast()
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def dtype(self) -> str:
        """What identification computes in: a torch dtype, or ``ggml`` with or without a bfloat16 copy."""
        if self.engine == "llama.cpp":
            return "ggml bfloat16" if self._copies else "ggml"
        from npti_export.runtimes.devices import pick_dtype, usable_device

        if self.settings.dtype != "auto":
            return self.settings.dtype
        return str(pick_dtype(usable_device(self.settings.device))).removeprefix("torch.")

    def device(self) -> str:
        """What it computes on: cpu, mps, or cuda with the names of the GPUs; for llama.cpp cpu, or gpu with the number
        of layers there where these are not all. Where the model brings code of its own, that.

        Raises:
            ModelError: the requested one cannot be used here.
        """
        if self.engine == "llama.cpp":
            from npti_export.runtimes.llamacpp.library import llama

            layers = self.settings.gpu_layers
            if not (layers and llama().llama_supports_gpu_offload()):
                return "cpu"
            return f"gpu {layers}" if layers > 0 else "gpu"
        from npti_export.runtimes.devices import described

        return described(self.settings.device) + " remote code" * self.settings.trust_remote_code

    def fast(self) -> Runtime:
        """The model as identification runs it."""
        if self.engine != "llama.cpp":
            return self._fast_torch()
        return self._bfloat16() if self._copies else self.llama()

    @cached_property
    def _header(self) -> GGUFFile:
        from npti_export.gguf.shards import read_model

        return read_model(self._source.path)

    @cached_property
    def _copies(self) -> bool:
        from npti_export.gguf.bfloat16 import copy_pays

        if self.settings.weights == "auto":
            return self.device() == "cpu" and copy_pays(self._header)
        return self.settings.weights == "bfloat16"

    def _bfloat16(self) -> LlamaCppRuntime:
        from npti_export.gguf.bfloat16 import shared_copy, write_copy

        if self._copy is None:
            threads = self.settings.threads
            with self._timings.measure("load"):
                if self._shared is not None:
                    path = shared_copy(self._header, self._shared, self._progress, threads=threads)
                else:
                    self._folder = TemporaryFolder()
                    path = write_copy(self._header, self._folder.path, self._progress, threads=threads)
            self._copy = self._loaded(lambda: self._open_llama(path))
        return self._copy

    def llama(self) -> LlamaCppRuntime:
        """A GGUF in llama.cpp."""
        if self._llama is None:
            self._llama = self._loaded(lambda: self._open_llama(self._source.path))
        return self._llama

    def _open_llama(self, path: Path) -> LlamaCppRuntime:
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        return LlamaCppRuntime(path, self.settings.llama, sequences=self._sequences, source=self._source)

    def _fast_torch(self) -> TransformersRuntime:
        if self._fast is None:
            dtype = self.dtype()
            shape = self._source.shape
            float32_bytes = 4 * 5 * shape.layers * shape.width * shape.hidden  # MLPs are three fifths or more
            if dtype == "float32":
                self._fast = self.exact()
            elif self.settings.device != MAP and float32_bytes < _KEEP_BOTH_BYTES and self._verifies:
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
        spread = self._fast is not None and self.settings.device == MAP
        self._fast = None
        if spread:
            gc.collect()  # what spreads a model refers to itself in circles
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _load(self, dtype: str) -> TransformersRuntime:
        from npti_export.runtimes.transformers import TransformersRuntime

        settings = self.settings
        return self._loaded(
            lambda: TransformersRuntime(
                self._source, device=settings.device, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        )

    def _loaded(self, load: Callable[[], Loaded]) -> Loaded:
        self._progress.start(f"load {self._source.name}", 1)
        with self._timings.measure("load"):
            runtime = load()
        self._progress.advance(1)
        if runtime.uses_fallback_template:
            self._progress.note(f"{self._source.name} brings no chat template; using plain 'User: … Assistant:' turns")
        return runtime
