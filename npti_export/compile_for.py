"""Compile a rule for one model: calibrated on its own answers, measured in its own runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from npti_export.calibrate import TokenSamples
from npti_export.compiler.canonical import canonical
from npti_export.compiler.kinds import ProgramKind
from npti_export.compiler.neurons import LayerSample
from npti_export.compiler.passes import Calibration, Compiled, compile_rule
from npti_export.compiler.program import MLPProgram
from npti_export.errors import ModelError
from npti_export.export.gguf import unit_block
from npti_export.gguf.columns import rounding
from npti_export.gguf.mlp import FileMLP, Floats, LayerMLP, ProgramMLP
from npti_export.gguf.shards import read_model
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Runtime, chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.verify_llamacpp import in_chunks, replaced_by

if TYPE_CHECKING:
    from npti_export.verify import Logits

_JUDGES = 6  # of the answers: as many keep the search for a width short


class RuleCompiler(ABC):
    """Compiles rules for a model; what one rule needs of the model is gathered once.

    Args:
        runtime: the unsteered model.
        recipe: its ``compile`` section, and how answers are made.
        questions: search questions, so that what verification asks is new.
        progress: told of each pass.

    Attributes:
        sequences: token ids of the questions with the model's answers.

    Raises:
        ModelError: there is no question.
    """

    def __init__(self, runtime: Runtime, recipe: Recipe, questions: Sequence[str], progress: Progress) -> None:
        if not questions:
            raise ModelError("calibration: there is no question to ask; give --bench a folder with search questions")
        self._recipe, self._progress = recipe, progress
        answers = runtime.generate(
            [runtime.encode(chat(None, question)) for question in questions],
            max_new_tokens=recipe.verify.answer_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
        self.sequences = [one.tokens for one in answers]

    def calibration(self, rule: SteeringRule) -> Calibration:
        """What the model's MLPs read under a rule."""
        rule = canonical(rule)
        some = TokenSamples(list(map(len, self.sequences)), self._recipe.compile.calibration_tokens, len(rule.shift))
        self._progress.start("calibrate", len(self.sequences))
        return self._calibrated(self._watched(rule, some))

    def compile(self, rule: SteeringRule, kind: ProgramKind, calibration: Calibration) -> Compiled:
        """See :func:`npti_export.compiler.passes.compile_rule`."""
        self._progress.start(f"compile to {kind}", 1)
        measure = self.measure(rule) if kind.name == "kl" else None
        compiled = compile_rule(rule, kind, calibration, self._recipe.compile.clamp_units, measure)
        self._progress.advance(1)
        return compiled

    def measure(self, rule: SteeringRule) -> Callable[[MLPProgram], float]:
        """Mean KL(rule ‖ program) in nats over the last answers, MLPs in float32, so before any rounding to a file.

        These answers are among those that programs are fitted on: what is delivered is verified on others.
        """
        from npti_export.verify import kl_divergence

        judged = self.sequences[-_JUDGES:]
        wanted = list(self._steered(judged, rule))

        def of(program: MLPProgram) -> float:
            found = self._changed(judged, program, rule)
            rows = [kl_divergence(*pair) for pair in zip(wanted, found, strict=True)]
            return float(sum(row.sum() for row in rows) / sum(map(len, rows)))

        return of

    @abstractmethod
    def _watched(self, rule: SteeringRule, some: TokenSamples) -> list[LayerSample]:
        """Run the steered model over the answers; ``some`` sees its MLPs' inputs and the streams they add to."""

    @abstractmethod
    def _calibrated(self, samples: list[LayerSample]) -> Calibration:
        """The samples, and what else there is to know of the model."""

    @abstractmethod
    def _steered(self, sequences: Sequence[tuple[int, ...]], rule: SteeringRule) -> Iterator[Logits]:
        """Logits of the model under a rule, ``[tokens, vocabulary]`` at a time."""

    @abstractmethod
    def _changed(
        self, sequences: Sequence[tuple[int, ...]], program: MLPProgram, rule: SteeringRule
    ) -> Iterator[Logits]:
        """Likewise of the model with a program of that rule."""


class FileCompiler(RuleCompiler):
    """For a GGUF, run by llama.cpp; ``runtime`` was opened with its source."""

    def __init__(self, runtime: LlamaCppRuntime, recipe: Recipe, questions: Sequence[str], progress: Progress) -> None:
        super().__init__(runtime, recipe, questions, progress)
        source = runtime.source
        assert source is not None
        assert source.family is not None
        self._runtime = runtime
        self._header, self._width = read_model(source.path), source.shape.width
        self._mlp = FileMLP(self._header, source.family)

    def _watched(self, rule: SteeringRule, some: TokenSamples) -> list[LayerSample]:
        def see(layer: int, x: Floats, y: Floats) -> bool:
            some.see_input(layer, x)
            y[:] = self._mlp(layer, x, rule)
            return True

        for chunk in in_chunks(self.sequences, self._runtime.model.vocabulary_size, self._runtime.settings.context):
            self._runtime.run(chunk, see, some.see_stream)
            self._progress.advance(len(chunk), sum(map(len, chunk)))
        return some.samples(rule, self._mlp.neurons)

    def _calibrated(self, samples: list[LayerSample]) -> Calibration:
        return Calibration(samples, self._width, unit_block(self._header), rounding(self._header))

    def _steered(self, sequences: Sequence[tuple[int, ...]], rule: SteeringRule) -> Iterator[Logits]:
        return self._run(sequences, partial(self._mlp, rule=rule))

    def _changed(
        self, sequences: Sequence[tuple[int, ...]], program: MLPProgram, rule: SteeringRule
    ) -> Iterator[Logits]:
        del rule  # the file has all neurons
        return self._run(sequences, ProgramMLP(self._mlp, program))

    def _run(self, sequences: Sequence[tuple[int, ...]], mlp: LayerMLP) -> Iterator[Logits]:
        for chunk in in_chunks(sequences, self._runtime.model.vocabulary_size, 0):
            yield self._runtime.run(chunk, replaced_by(mlp))
