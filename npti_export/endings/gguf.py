"""A steered GGUF: baked into the base file, run by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.compile_for import FileCompiler
from npti_export.compiler.kinds import parse_program
from npti_export.compiler.passes import Compiled, budget_units, compile_constant
from npti_export.compiler.program import Floats, MLPProgram
from npti_export.endings.base import SAMPLE_TOKENS, Format, Written
from npti_export.export.gguf import check_base, plan_bake, rounds_nothing, unit_block, write_bake
from npti_export.export.metadata import record_fidelity, steering_metadata
from npti_export.files import atomic_files, atomic_output, check_files_writable, sha256_file
from npti_export.gguf.reader import GGUFFile
from npti_export.gguf.shards import first_in, named_shards, read_model, shard_paths
from npti_export.gguf.writer import Value
from npti_export.models import gguf_source
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule_io import SavedRule
from npti_export.runtimes.base import Message
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime, opener

if TYPE_CHECKING:
    from npti_export.models import ModelSource
    from npti_export.verify import Opener


class GGUFEnding:
    """Implements :class:`npti_export.endings.base.Ending`.

    Args:
        base: header of the unsteered file.
        recipe: its ``compile`` section.
        settings: where llama.cpp computes.
        questions: what programs are fitted on the answers to.

    Raises:
        ArchitectureError: llama.cpp loads no MLP biases for this family, or takes no width for each layer of it.
        CompileError: no block of the file's types fits into the program's budget.
        ModelError: the file cannot be widened.
    """

    format: Format = "gguf"

    def __init__(
        self, base: GGUFFile, recipe: Recipe, settings: Settings | None = None, questions: Sequence[str] = ()
    ) -> None:
        check_base(base, recipe.compile.layout)
        self._base, self._recipe, self._settings = base, recipe, settings or Settings()
        self._questions = questions
        self._compiled: Compiled | None = None
        self._kind = parse_program(recipe.compile.program)
        budget_units(self._kind, gguf_source(base.path).shape.width, unit_block(base))  # refused before any work
        self.share = recipe.verify.kl_share

    def __enter__(self) -> GGUFEnding:
        self._pool = ThreadPoolExecutor(1)
        # while neurons are identified
        self._sha256 = [self._pool.submit(sha256_file, part.path) for part in self._base.parts]
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def check_output(self, path: Path, *, force: bool) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        check_files_writable(shard_paths(path, len(self._base.parts)), force=force, need_bytes=self._base.size)

    def output(self, path: Path, *, force: bool) -> AbstractContextManager[Path]:
        """A split model's temporary place is a folder, the artifact a file in it; see also the protocol."""
        if self._base.shards:
            paths = shard_paths(path, len(self._base.shards))
            self._first = paths[0].name
            return atomic_files(paths, force=force)
        return atomic_output(path, force=force)

    def compile(self, saved: SavedRule, progress: Progress) -> Compiled:
        """See :class:`npti_export.endings.base.Ending`."""
        self._compiled = compile_constant(saved.rule)
        if self._compiled is not None:
            return self._compiled
        with self.unsteered(gguf_source(self._base.path)) as runtime:
            compiler = FileCompiler(runtime, self._recipe, self._questions, progress)
            self._compiled = compiler.compile(saved.rule, self._kind, compiler.calibration(saved.rule))
        return self._compiled

    def write(self, saved: SavedRule, path: Path) -> Written:
        """See :class:`npti_export.endings.base.Ending`."""
        assert self._compiled is not None
        return self.write_program(self._compiled.program, steering_metadata(saved, self._base.path), path)

    def write_program(self, program: MLPProgram, metadata: dict[str, Value], path: Path) -> Written:
        """Write what a program makes of the base; ``metadata`` goes under ``npti.``."""
        digests = [future.result() for future in self._sha256]
        plan = plan_bake(self._base, program, metadata, digests, self._recipe.compile.layout)
        write_bake(plan, path / self._first if self._base.shards else path)
        named = {part.path.name: digest for part, digest in zip(self._base.parts, digests, strict=True)}
        sha256 = named if self._base.shards else digests[0]
        return Written(plan.nbytes, plan.extra, plan.mean_extra, self._base.size, sha256)

    def first_file(self, path: Path) -> Path:
        """The written file that llama.cpp is given."""
        return _file(path)

    def artifact(self, path: Path) -> Opener:
        """See :class:`npti_export.endings.base.Ending`."""
        return opener(_file(path), self._settings)

    def base(self) -> Opener:
        """See :class:`npti_export.endings.base.Ending`."""
        return opener(self._base.path, self._settings)

    def in_llamacpp(self, path: Path, source: ModelSource) -> LlamaCppRuntime:
        """See :class:`npti_export.endings.base.Ending`."""
        return LlamaCppRuntime(_file(path), self._settings, sequences=self._recipe.verify.prompts, source=source)

    def unsteered(self, source: ModelSource, control_vector: Floats | None = None) -> LlamaCppRuntime:
        """The base in llama.cpp; ``control_vector`` ``[layers - 1, hidden]`` is set by llama.cpp's own call."""
        return LlamaCppRuntime(
            self._base.path,
            self._settings,
            sequences=self._recipe.verify.prompts,
            source=source,
            control_vector=control_vector,
        )

    def exact(self, path: Path) -> bool | None:
        """See :func:`rounds_nothing`; None for a program that approximates."""
        return None if self._kind.approximates else rounds_nothing(read_model(_file(path)))

    def answers(self, path: Path, messages: list[Message], repetition_penalty: float) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        found = {}
        for name, file in (("base", self._base.path), ("steered", _file(path))):
            with LlamaCppRuntime(file, self._settings) as runtime:
                found[name] = runtime.answer(
                    messages, max_new_tokens=SAMPLE_TOKENS, repetition_penalty=repetition_penalty
                )
        return found

    def finish(self, path: Path, saved: SavedRule, report: dict[str, Any]) -> None:
        """A file has no card beside it; its metadata say the same."""
        record_fidelity(_file(path), saved.about)

    def digest(self, path: Path) -> str | dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        if not path.is_dir():
            return sha256_file(path)
        return {file.name: sha256_file(file) for file in named_shards(first_in(path))}


def _file(path: Path) -> Path:
    """The file that llama.cpp is given: ``path``, or the first one of a split model in a temporary folder."""
    return first_in(path) if path.is_dir() else path
