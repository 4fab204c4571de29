"""A steered checkpoint, run by transformers without us."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npti_export.compiler.exact import compile_exact
from npti_export.compiler.kinds import parse_program
from npti_export.compiler.passes import budget_units, compile_constant
from npti_export.compiler.program import MLPProgram
from npti_export.endings.base import SAMPLE_TOKENS, Format, Written
from npti_export.errors import ModelError
from npti_export.export.as_llama import LEAST_MULTIPLE, MULTIPLE, check_expressible
from npti_export.export.card import model_card
from npti_export.export.checkpoint import (
    MLP_WEIGHTS,
    copy_beside,
    directory_weights,
    model_weights,
    plan_checkpoint,
    write_checkpoint,
)
from npti_export.export.gguf import check_base
from npti_export.files import atomic_directory, check_directory_writable, sha256_file
from npti_export.gguf.shards import read_model
from npti_export.models import ModelSource, resolve_model, weight_files
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.rule_io import SavedRule, save_checkpoint_rule
from npti_export.runtimes.base import Message

if TYPE_CHECKING:
    from npti_export.compiler.passes import Compiled
    from npti_export.runtimes.transformers import TransformersRuntime
    from npti_export.verify import LogitsOf, Opener


class CheckpointEnding:
    """Implements :class:`npti_export.endings.base.Ending`.

    Args:
        source: the unsteered model; a directory is streamed, a GGUF is written as transformers dequantises it.
        exact: gives the model in float32.
        recipe: its ``compile`` section.
        dtype: of the weights of a GGUF's checkpoint; None for float32. A directory keeps its own.
        questions: what programs are fitted on the answers to.

    Raises:
        ArchitectureError: no stock class holds a steered checkpoint of this model.
        CompileError: no block of neurons fits into the program's budget.
        ModelError: a GGUF that has MLP biases of its own or is steered already.
    """

    format: Format = "checkpoint"

    def __init__(
        self,
        source: ModelSource,
        exact: Callable[[], TransformersRuntime],
        recipe: Recipe,
        dtype: str | None,
        questions: Sequence[str] = (),
    ) -> None:
        self._source, self._exact, self._recipe, self._dtype = source, exact, recipe, dtype
        self._questions = questions
        self._compiled: Compiled | None = None
        self._kind = parse_program(recipe.compile.program)
        budget_units(self._kind, source.shape.width, LEAST_MULTIPLE)  # refused before any work
        self.share = recipe.verify.kl_share
        self._steered: TransformersRuntime | None = None
        if source.kind == "gguf":
            check_base(read_model(source.path))
            return
        self._config = _config(source.path)
        check_expressible(self._config, source.name)
        plan_checkpoint(self._config, directory_weights(source.path), _nothing(source))  # its faults are known at once

    def __enter__(self) -> CheckpointEnding:
        return self

    def __exit__(self, *error: object) -> None:
        self._steered = None

    def check_output(self, path: Path, *, force: bool) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        source = self._source
        files = weight_files(source.path) if source.kind == "directory" else [source.path]
        check_directory_writable(path, force=force, need_bytes=sum(file.stat().st_size for file in files))

    def output(self, path: Path, *, force: bool) -> AbstractContextManager[Path]:
        """See :class:`npti_export.endings.base.Ending`."""
        return atomic_directory(path, force=force)

    def compile(self, saved: SavedRule, progress: Progress) -> Compiled:
        """See :class:`npti_export.endings.base.Ending`."""
        from npti_export.compile_in_torch import TorchCompiler

        self._compiled = compile_constant(saved.rule)
        if self._compiled is not None:
            return self._compiled
        compiler = TorchCompiler(self._exact(), self._recipe, self._questions, progress)
        self._compiled = compiler.compile(saved.rule, self._kind, compiler.calibration(saved.rule))
        return self._compiled

    def write(self, saved: SavedRule, path: Path) -> Written:
        """See :class:`npti_export.endings.base.Ending`."""
        assert self._compiled is not None
        program, multiple = self._compiled.program, LEAST_MULTIPLE if self._kind.approximates else MULTIPLE
        if self._source.kind == "directory":
            plan = plan_checkpoint(self._config, directory_weights(self._source.path), program, multiple)
            copy_beside(self._source.path, path)
        else:
            runtime = self._exact()
            plan = plan_checkpoint(runtime.model.config, model_weights(runtime.model, self._dtype), program, multiple)
            runtime.tokenizer.save_pretrained(path)
            runtime.model.generation_config.save_pretrained(path)
        write_checkpoint(plan, path)
        save_checkpoint_rule(saved, path)
        added = plan.program.layers[0].units
        return Written(plan.nbytes, added, added)

    def artifact(self, path: Path) -> Opener:
        """Loaded by ``AutoModelForCausalLM``, as anyone would."""

        @contextmanager
        def opened() -> Iterator[LogitsOf]:
            yield self._loaded(path).logits

        return opened

    def base(self) -> None:
        """Torch is the runtime."""

    def in_llamacpp(self, path: Path, source: ModelSource) -> None:
        """Torch is the runtime."""

    def exact(self, path: Path) -> bool | None:
        """Whether the MLPs are float32: 16 bits round biases and scaled rows. None for a program that approximates."""
        if self._kind.approximates:
            return None
        weights = [weight for shard in directory_weights(path) for weight in shard]
        return all(weight.dtype == "F32" for weight in weights if weight.name.endswith(MLP_WEIGHTS))

    def answers(self, path: Path, messages: list[Message], repetition_penalty: float) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        options: dict[str, Any] = {"max_new_tokens": SAMPLE_TOKENS, "repetition_penalty": repetition_penalty}
        return {
            "base": self._exact().answer(messages, **options),
            "steered": self._loaded(path).answer(messages, **options),
        }

    def finish(self, path: Path, saved: SavedRule, report: dict[str, Any]) -> None:
        """See :class:`npti_export.endings.base.Ending`."""
        save_checkpoint_rule(saved, path)
        (path / "README.md").write_text(model_card(report), encoding="utf-8")

    def digest(self, path: Path) -> dict[str, str]:
        """See :class:`npti_export.endings.base.Ending`."""
        return {file.name: sha256_file(file) for file in weight_files(path)}

    def _loaded(self, path: Path) -> TransformersRuntime:
        from npti_export.runtimes.transformers import TransformersRuntime

        if self._steered is None:
            device = str(self._exact().device)
            self._steered = TransformersRuntime(resolve_model(str(path)), device=device, dtype="float32")
        return self._steered


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # its validators raise anything
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{directory / 'config.json'}: transformers does not accept it: {reason}") from error


def _nothing(source: ModelSource) -> MLPProgram:
    """A program without units, to lay a checkpoint out before there is a rule."""
    shape = (source.shape.layers, source.shape.width)
    return compile_exact(SteeringRule(np.zeros(shape, np.float32), np.zeros(shape, np.bool_)), 4)
