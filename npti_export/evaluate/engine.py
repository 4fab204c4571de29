"""Where an evaluation runs: one place for the unsteered model, and for it under any rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from npti_export.files import translate_os_errors
from npti_export.loader import Models
from npti_export.models import ModelSource
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Runtime
from npti_export.temporaries import TemporaryFolder

if TYPE_CHECKING:
    from npti_export.runtimes.llamacpp.context import Settings
    from npti_export.runtimes.transformers import TransformersRuntime


class Engine(Protocol):
    """A model that can be run with a rule and without.

    Attributes:
        source: the model.
        base: it, unsteered.
    """

    source: ModelSource
    base: Runtime

    def steered(self, rule: SteeringRule) -> AbstractContextManager[Runtime]:
        """The model under a rule, for as long as the block lasts; :attr:`base` is not to be used meanwhile."""


class LlamaEngine:
    """A GGUF in llama.cpp: a rule is compiled exactly, baked into a temporary file, and that is run.

    Args:
        source: the model.
        base: it, opened.
        path: the file that it was opened from, of any float or quantised type.
        settings: of llama.cpp.
        recipe: its ``compile.clamp_units`` and ``identify.batch_size``.
    """

    def __init__(self, source: ModelSource, base: Runtime, path: Path, settings: Settings, recipe: Recipe) -> None:
        from npti_export.export.gguf import check_base
        from npti_export.gguf.shards import read_model

        self.source, self.base = source, base
        self._settings, self._recipe, self._header = settings, recipe, read_model(path)
        check_base(self._header)

    @contextmanager
    def steered(self, rule: SteeringRule) -> Iterator[Runtime]:
        """See :class:`Engine`."""
        from npti_export.compiler.exact import compile_exact
        from npti_export.export.gguf import plan_bake, write_bake
        from npti_export.gguf.shards import shard_paths
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        program = compile_exact(rule, self._recipe.compile.basis_units)
        unknown = ["0" * 64] * len(self._header.parts)  # of the base, which this file is never stripped to
        with TemporaryFolder() as folder:
            with translate_os_errors(folder / "steered.gguf"):
                write_bake(plan_bake(self._header, program, {}, unknown), folder / "steered.gguf")
            first = shard_paths(folder / "steered.gguf", len(self._header.parts))[0]
            sequences = self._recipe.identify.batch_size
            with LlamaCppRuntime(first, self._settings, sequences=sequences, source=self.source) as runtime:
                yield runtime


class TorchEngine:
    """A model in transformers, under a rule as it is written down.

    Args:
        base: the model, unsteered.
    """

    def __init__(self, base: TransformersRuntime) -> None:
        self.source: ModelSource = base.source
        self.base: Runtime = base
        self._runtime = base

    @contextmanager
    def steered(self, rule: SteeringRule) -> Iterator[Runtime]:
        """See :class:`Engine`."""
        from npti_export.steer import steered

        with steered(self._runtime.activations, rule, self._runtime.down_projections):
            yield self._runtime


def engine_for(source: ModelSource, models: Models, recipe: Recipe) -> Engine:
    """Where rules for a model run: the runtime that its neurons are identified in.

    Raises:
        ArchitectureError: a GGUF of a family that no rule can be baked into.
    """
    from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

    runtime = models.fast()
    if isinstance(runtime, LlamaCppRuntime):
        return LlamaEngine(source, runtime, runtime.model.path, models.settings.llama, recipe)
    return TorchEngine(cast("TransformersRuntime", runtime))
