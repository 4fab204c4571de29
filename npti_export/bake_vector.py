"""Bake a plain vector into biases of a GGUF: exactly, and at no cost per token.

llama.cpp adds direction N of a control vector to the residual stream behind layer N (``build_cvec``), right after the
output of that layer's MLP has joined it. As a bias of the layer's down projection it is added before the family scales
that output, so it is divided by the scale; nothing else lies between, as no family that bakes has a norm there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from npti_export.architectures import GGUF_FAMILIES
from npti_export.bench import load_bench
from npti_export.benches import held_out
from npti_export.compiler.exact import compile_exact
from npti_export.compiler.program import MLPProgram
from npti_export.endings.gguf import GGUFEnding
from npti_export.errors import ArchitectureError, FidelityError, ModelError, VectorError
from npti_export.export.gguf import record, rounds_nothing
from npti_export.export.metadata import ascii_name
from npti_export.files import set_aside, sha256_file
from npti_export.gguf.reader import GGUFFile, mlp_widths
from npti_export.gguf.residual import residual_scale
from npti_export.gguf.shards import read_model
from npti_export.gguf.writer import Value
from npti_export.models import ModelSource, resolve_model
from npti_export.progress import Progress
from npti_export.recipe import Recipe, select_recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Message, chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.vectors import Floats, SteeringVector, read_vector
from npti_export.verify import kl_divergence
from npti_export.verify_llamacpp import measure_file
from npti_export.version import __version__

_QUESTIONS = "extraversion"  # whose held-out questions are asked; any everyday ones do
_FIDELITY = ("kl_vector_artifact", "kl_vector_base", "kl_runtime_floor", "top1", "max_logit_diff", "positions")
# Two orders of the same float32 sums: measured 3e-12 for F32, 2e-11 for a qwen2 written as llama (layers of width 96).
_KL_SAME = 1e-6
# Where weights are quantised, so are activations: a last bit tips a rounding, and what follows is noise of a size that
# does not depend on what tipped it. That noise is measured on the control vector itself, this much larger: float32
# rounds a residual stream to 2^-24 of its size, and the stream is some hundred times larger than a direction. On the
# default model (Q4_1, vectors of three sizes) it is 0.005, 0.007 and 0.013, token by token against all tokens together
# 0.007, 0.007 and 0.013, and the baked file is 0.004, 0.004 and 0.011 away.
_NUDGE = 1 + 2.0**-16


@dataclass(frozen=True)
class VectorJob:
    """What a user asked for.

    Attributes:
        vector: a control vector (GGUF), or a constant, see :func:`npti_export.vectors.read_vector`.
        out: the steered GGUF.
        model: a GGUF, see :func:`npti_export.models.resolve_model`.
        scale: multiplies the vector; may be negative.
        any_model: accept what says that it is for another model of the same shape.
        overrides: ``verify.key=value`` strings.
        settings: where llama.cpp computes.
        force: replace an existing output.
    """

    vector: Path
    out: Path
    model: str | None = None
    scale: float = 1.0
    any_model: bool = False
    overrides: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    force: bool = False


def bake_vector(job: VectorJob, progress: Progress) -> dict[str, Any]:
    """Write the steered file and measure it against the vector.

    Returns:
        ``artifact`` (path, bytes, sha256), ``vector`` (path, kind, scale, layers changed), ``model``, ``fidelity``, its
        ``limit``.

    Raises:
        FidelityError: the file was written but does not do what the vector does; it is kept as ``OUT.rejected``.
        NptiError: bad input, or an output that cannot be written; nothing is left behind.
    """
    source = resolve_model(job.model)
    if source.kind != "gguf":
        raise ModelError(f"{source.name}: is a transformers model, and vectors are baked into a GGUF; give that file")
    _check_family(source)
    base = read_model(source.path)
    recipe = select_recipe(None, source.fingerprint, job.overrides)
    vector = _scaled(job, read_vector(job.vector, source, any_model=job.any_model))
    program = _program(base, vector)
    if not any(layer.changes_output for layer in program.layers):
        raise VectorError(
            f"{job.vector}: none of its directions is for a layer that has an MLP, it would change nothing"
        )
    with GGUFEnding(base, recipe, job.settings) as ending:
        ending.check_output(job.out, force=job.force)
        with ending.output(job.out, force=job.force) as temporary:
            progress.start("write", 1)
            written = ending.write_program(program, _metadata(job, vector, source), temporary)
            progress.advance(1)
            first = ending.first_file(temporary)
            fidelity, limit, fault = _measured(vector, source, first, ending, recipe, progress)
            record(first, {f"fidelity.{name}": value for name, value in fidelity.items()})
            if fault is not None:
                aside = set_aside(temporary, job.out)
                raise FidelityError(f"{job.out}: not delivered: {fault}; it is kept as {aside}")
            digest = ending.digest(temporary)
    layers = sum(layer.changes_output for layer in program.layers)
    return {
        "artifact": {"path": str(job.out), "bytes": written.nbytes, "sha256": digest},
        "vector": {"path": str(job.vector), "kind": vector.kind, "scale": job.scale, "layers": layers},
        "model": source.name,
        "fidelity": fidelity,
        "limit": limit,
    }


def _check_family(source: ModelSource) -> None:
    family = source.family
    assert family is not None
    if family.bake is None:
        able = ", ".join(row.name for row in GGUF_FAMILIES if row.bake)
        raise ArchitectureError(
            f"{source.path}: llama.cpp loads no MLP biases for {family.name}, so a vector cannot be baked into it; it "
            f"works for {able}; a control vector can be given to llama.cpp itself (--control-vector)"
        )


def _scaled(job: VectorJob, vector: SteeringVector) -> SteeringVector:
    """The vector times the scale.

    Raises:
        VectorError: it changes nothing, or is too large.
    """
    with np.errstate(over="ignore"):
        directions, constant = (
            None if one is None else (one.astype(np.float64) * job.scale).astype(np.float32)
            for one in (vector.directions, vector.constant)
        )
    values = directions if constant is None else constant
    if values is None or not np.isfinite(values).all():
        raise VectorError(f"{job.vector}: is not finite at --scale {job.scale:g}; give a smaller one")
    if not values.any():
        raise VectorError(f"{job.vector}: all its values are zero at --scale {job.scale:g}, it would change nothing")
    return SteeringVector(directions, constant, vector.fingerprint, vector.family)


def _program(base: GGUFFile, vector: SteeringVector) -> MLPProgram:
    """Down biases of the layers that the vector changes, and nothing else."""
    widths = mlp_widths(base)
    nothing = np.zeros((len(widths), max(widths)), np.float32)
    if vector.directions is None:
        return compile_exact(SteeringRule(nothing, nothing != 0, vector.constant), 4)
    factor = residual_scale(base)
    layers = list(compile_exact(SteeringRule(nothing, nothing != 0), 4).layers)
    for number, direction in enumerate(vector.directions, 1):
        # A layer without an MLP ends before llama.cpp would add its direction (src/models/deci.cpp).
        if direction.any() and widths[number]:
            bias = (direction.astype(np.float64) / factor).astype(np.float32)
            layers[number] = replace(layers[number], down_bias=bias)
    return MLPProgram(max(widths), tuple(layers))


def _metadata(job: VectorJob, vector: SteeringVector, source: ModelSource) -> dict[str, Value]:
    """What the file says about itself; what verification measures is NaN until it is recorded."""
    return {
        "version": __version__,
        "vector.kind": vector.kind,
        "vector.name": ascii_name(job.vector),
        "vector.sha256": sha256_file(job.vector),
        "vector.scale": float(job.scale),
        "model.fingerprint": source.fingerprint,
        "base.name": ascii_name(source.path),
        **{f"fidelity.{name}": float("nan") for name in _FIDELITY},
    }


def _measured(
    vector: SteeringVector,
    source: ModelSource,
    file: Path,
    ending: GGUFEnding,
    recipe: Recipe,
    progress: Progress,
) -> tuple[dict[str, float], float, str | None]:
    """Distances, the limit that they are held to, and why the file must not be delivered, or None."""
    benches = {_QUESTIONS: load_bench(_QUESTIONS)}
    questions = [chat(None, text) for text in held_out(benches, recipe, recipe.verify.prompts)]
    if vector.constant is None:
        assert vector.directions is not None
        found = _against_llamacpp(ending, source, file, vector.directions, questions, recipe, progress)
        limit = max(_KL_SAME, recipe.verify.kl_limit_floor_ratio * found["kl_runtime_floor"])
        return found, limit, _fault(found, limit)
    rule = SteeringRule(np.zeros_like(vector.constant), vector.constant > np.inf, vector.constant)
    with ending.unsteered(source) as base, ending.in_llamacpp(file, source) as artifact:
        prompts = [base.encode(question) for question in questions]
        fidelity, layers = measure_file(base, artifact, rule, prompts, recipe, progress)
    exact = rounds_nothing(read_model(file))
    kls = (fidelity.kl_rule_artifact, fidelity.kl_rule_base, fidelity.kl_runtime_floor)
    found = dict(zip(_FIDELITY, (*kls, fidelity.top1, fidelity.max_logit_diff, float(fidelity.positions)), strict=True))
    fault = fidelity.fault(recipe, exact=exact, base=source.path.name) or (layers.fault() if layers else None)
    return found, fidelity.limit(recipe, exact=exact), fault


def _against_llamacpp(
    ending: GGUFEnding,
    source: ModelSource,
    file: Path,
    directions: Floats,
    questions: Sequence[list[Message]],
    recipe: Recipe,
    progress: Progress,
) -> dict[str, float]:
    """The file against its base under llama.cpp's own control vector, on held-out questions and the file's answers."""
    progress.start("verify", 4 * len(questions))
    sums, worst, positions = np.zeros(4), 0.0, 0
    with ending.unsteered(source, directions) as base, ending.in_llamacpp(file, source) as baked:

        def under(vector: Floats, tokens: Sequence[int]) -> Floats:
            base.set_control_vector(vector)
            return base.logits(tokens)

        nudged = (directions * np.float64(_NUDGE)).astype(np.float32)
        exchanges = baked.generate(
            [baked.encode(question) for question in questions],
            max_new_tokens=recipe.verify.answer_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
        for exchange in exchanges:
            got, want = baked.logits(exchange.tokens), under(directions, exchange.tokens)
            others = (got, under(np.zeros_like(directions), exchange.tokens), under(nudged, exchange.tokens))
            same = want.argmax(-1) == got.argmax(-1)
            sums += (*(kl_divergence(want, other).sum() for other in others), same.sum())
            worst, positions = max(worst, float(np.abs(want - got).max())), positions + len(want)
            progress.advance(4, 4 * len(want))
    values = (*(sums / positions).tolist(), worst, float(positions))
    return dict(zip(_FIDELITY, values, strict=True))


def _fault(found: dict[str, float], limit: float) -> str | None:
    """A measure that is not a number is a fault, too."""
    artifact, moved = found["kl_vector_artifact"], found["kl_vector_base"]
    if not artifact <= limit:
        return (
            f"it is KL {artifact:.2g} away from its base with llama.cpp's own control vector, over the limit "
            f"{limit:.2g} (runtime noise {found['kl_runtime_floor']:.2g})"
        )
    if not artifact <= 0.5 * moved:
        return (
            f"nothing proves that it does anything: it is KL {artifact:.2g} away from the control vector, the "
            f"unsteered file {moved:.2g}; raise --scale"
        )
    return None
