"""The constant that makes an unprompted model's residual stream, on average, what a persona makes of it.

The answers of personas of the wanted pole are read by the model three times: under their own prompts, under personas of
the opposite pole, and under the plain questions. How the first two differ, on the same words, is what the personality
does to the stream, and nothing that the answers say; layer by layer the third is moved by so much. Each layer's share
is found with those before it in place, so that what they cause farther on is not added a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.bench import TraitBench
from npti_export.errors import ProfileError
from npti_export.identify.collect import answer, contrast_prompts, plain_prompts
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange, Runtime
from npti_export.traits import Sign

Doubles = npt.NDArray[np.float64]
_LEFT = 0.15  # most that may be left of the wanted change, root mean square over the stream and the layers


@dataclass(frozen=True)
class MatchedShift:
    """What was found.

    Attributes:
        constant: ``[layers, width]`` float32, for the inputs of the down projections: the smallest that gives
            ``output``.
        output: ``[layers, hidden]``, what it adds to the outputs of the MLPs.
        wanted: ``[layers, hidden]``, mean change of the residual stream behind each layer.
        left: of the root mean square of ``wanted``, the share that was not reached.
        answers: that the means are of.
    """

    constant: npt.NDArray[np.float32]
    output: Doubles
    wanted: Doubles
    left: float
    answers: int


def match(runtime: Runtime, bench: TraitBench, sign: Sign, recipe: Recipe, progress: Progress) -> MatchedShift:
    """Find the constant for one pole.

    Args:
        runtime: the unsteered model.
        bench: personas and search questions.
        sign: the wanted pole.
        recipe: its ``prompt`` and ``identify`` sections.
        progress: told of each pass.

    Raises:
        BenchError: fewer questions than ``identify.matched_questions``.
        ProfileError: the model answers nothing, or its stream does not follow.
    """
    settings = recipe.identify
    questions = bench.search(settings.matched_questions, settings.seed)
    progress.start(f"match {bench.trait}{sign}", 7)
    own = contrast_prompts(runtime, bench, questions, sign, recipe)
    other = contrast_prompts(runtime, bench, questions, "-" if sign == "+" else "+", recipe)
    plain = plain_prompts(runtime, questions, recipe)
    answers = answer(runtime, own, recipe, settings.max_new_tokens)
    if not any(answers):
        raise ProfileError(f"{bench.trait}{sign}: the model answered every question with nothing")
    progress.advance(1)

    def read(prompts: Sequence[tuple[int, ...]], added: Doubles | None = None) -> Doubles:
        means = runtime.stream_means([Exchange(*pair) for pair in zip(prompts, answers, strict=True) if pair[1]], added)
        progress.advance(1)
        return means

    wanted = read(own) - read(other)
    base = read(plain)
    exchanges = [Exchange(*pair) for pair in zip(plain, answers, strict=True) if pair[1]]
    output = runtime.stream_follows(exchanges, wanted)
    progress.advance(2)
    missing = wanted - (read(plain, output) - base)
    if not np.isfinite([wanted, base, output, missing]).all():
        raise ProfileError(
            f"{bench.trait}{sign}: the model's residual stream holds what is not a number; give --dtype bfloat16 or "
            "float32, or set rule.matched = 0"
        )
    left = float(np.linalg.norm(missing) / max(float(np.linalg.norm(wanted)), 1e-12))
    if left > _LEFT:
        raise ProfileError(
            f"{bench.trait}{sign}: the residual stream does not follow what is added to it ({left:.0%} of the change "
            "is left); set rule.matched = 0 for this model"
        )
    constant = np.stack([through(runtime.down_weight(at), row) for at, row in enumerate(output)])
    return MatchedShift(constant.astype(np.float32), output, wanted, left, len(answers))


def through(weight: npt.NDArray[np.float32], output: Doubles) -> Doubles:
    """The smallest input ``[width]`` of a down projection ``[hidden, width]`` whose output is ``[hidden]``."""
    return np.linalg.lstsq(weight.astype(np.float64), output, rcond=None)[0].astype(np.float64)
