"""Compile a rule for one GGUF: calibrated on the file itself, run by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from npti_export.calibrate import calibrate
from npti_export.compiler.canonical import canonical
from npti_export.compiler.kinds import ProgramKind
from npti_export.compiler.passes import Calibration, Compiled, compile_rule
from npti_export.compiler.program import MLPProgram
from npti_export.export.gguf import unit_block
from npti_export.gguf.columns import rounding
from npti_export.gguf.mlp import FileMLP, ProgramMLP
from npti_export.gguf.shards import read_model
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.verify_llamacpp import in_chunks, replaced_by

if TYPE_CHECKING:
    from npti_export.verify import Logits

_JUDGES = 6  # of the questions, the last ones measure a program's KL instead of fitting it


class FileCompiler:
    """Compiles rules for a file; what one rule needs of the model is gathered once.

    Args:
        runtime: the unsteered file, opened with its source.
        recipe: its ``compile`` section, and how answers are made.
        questions: search questions, so that what verification asks is new.
        progress: told of each pass.
    """

    def __init__(self, runtime: LlamaCppRuntime, recipe: Recipe, questions: Sequence[str], progress: Progress) -> None:
        source = runtime.source
        assert source is not None
        assert source.family is not None
        self._runtime, self._recipe, self._progress = runtime, recipe, progress
        self._header, self._width = read_model(source.path), source.shape.width
        self._mlp = FileMLP(self._header, source.family)
        answers = runtime.generate(
            [runtime.encode(chat(None, question)) for question in questions],
            max_new_tokens=recipe.verify.answer_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
        self._sequences = [one.tokens for one in answers]

    def calibration(self, rule: SteeringRule) -> Calibration:
        """What the model's MLPs read under a rule."""
        tokens = self._recipe.compile.calibration_tokens
        samples = calibrate(self._runtime, self._mlp, canonical(rule), self._sequences, tokens, self._progress)
        return Calibration(samples, self._width, unit_block(self._header), rounding(self._header))

    def compile(self, rule: SteeringRule, kind: ProgramKind, calibration: Calibration) -> Compiled:
        """See :func:`npti_export.compiler.passes.compile_rule`."""
        self._progress.start(f"compile to {kind}", 1)
        measure = self.measure(rule) if kind.name == "kl" else None
        compiled = compile_rule(rule, kind, calibration, self._recipe.compile.clamp_units, measure)
        self._progress.advance(1)
        return compiled

    def measure(self, rule: SteeringRule) -> Callable[[MLPProgram], float]:
        """Mean KL(rule ‖ program) in nats over answers, MLPs in float32, so before anything is rounded to a file."""
        from npti_export.verify import kl_divergence

        judged = list(in_chunks(self._sequences[-_JUDGES:], self._runtime.model.vocabulary_size, 0))
        steered = replaced_by(partial(self._mlp, rule=rule))
        wanted: list[Logits] = [self._runtime.run(some, steered) for some in judged]

        def of(program: MLPProgram) -> float:
            found = [self._runtime.run(some, replaced_by(ProgramMLP(self._mlp, program))) for some in judged]
            rows = [kl_divergence(*pair) for pair in zip(wanted, found, strict=True)]
            return float(sum(row.sum() for row in rows) / sum(map(len, rows)))

        return of
