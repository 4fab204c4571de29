"""What programs would cost and lose, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from npti_export.compile_for import FileCompiler
from npti_export.compiler.kinds import parse_program
from npti_export.compiler.passes import budget_units
from npti_export.export.gguf import check_base, unit_block
from npti_export.job import Job, prepared, with_base
from npti_export.loader import Timings
from npti_export.models import gguf_source
from npti_export.pipeline import calibration_questions, obtain_rule, open_models
from npti_export.progress import Progress
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.temporaries import TemporaryFolder


def explain(job: Job, programs: Sequence[str], progress: Progress, *, measures: bool) -> dict[str, Any]:
    """Compile the rule of a job to each program.

    Args:
        job: of the format ``gguf``; its output is not written.
        programs: in the notation of :func:`npti_export.compiler.kinds.parse_program`; none takes the recipe's.
        progress: told of each stage.
        measures: whether to run each program in llama.cpp, MLPs in float32, and measure its KL to the rule.

    Returns:
        ``trait``, ``width`` of the MLPs, ``block``, and ``programs``, each with its ``steps`` and, if measured, ``kl``.

    Raises:
        NptiError: bad input, or a program that cannot be.
    """
    kinds = [parse_program(text) for text in programs]
    timings = Timings()
    with TemporaryFolder() as folder, prepared(replace(job, out=folder / "x.gguf")) as asked:
        if asked.base is not None:
            check_base(asked.base)
        with (
            with_base(asked, progress, timings) as ready,
            open_models(ready, timings, progress, verifies=False) as models,
        ):
            assert ready.base is not None
            check_base(ready.base)
            source, recipe = gguf_source(ready.base.path), ready.recipe
            kinds = kinds or [parse_program(recipe.compile.program)]
            for kind in kinds:  # refused before any work
                budget_units(kind, source.shape.width, unit_block(ready.base))
            saved, _ = obtain_rule(ready, models, timings, progress)
            with LlamaCppRuntime(
                source.path, models.settings.llama, sequences=recipe.verify.prompts, source=source
            ) as runtime:
                compiler = FileCompiler(runtime, recipe, calibration_questions(ready), progress)
                calibration = compiler.calibration(saved.rule)
                measure = compiler.measure(saved.rule) if measures else None
                found = []
                for kind in kinds:
                    compiled = compiler.compile(saved.rule, kind, calibration)
                    entry = {"program": str(kind), "steps": [asdict(step) for step in compiled.steps]}
                    found.append(entry | ({"kl": measure(compiled.program)} if measure else {}))
    return {
        "trait": saved.about.trait,
        "width": calibration.width,
        "block": calibration.block,
        "programs": found,
    }
