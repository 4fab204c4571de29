"""Make a dial: poles in, a directory of verified files out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npti_export.benches import held_out
from npti_export.compiler.dial import DialProgram, compile_dial
from npti_export.dial.index import Adapter, Dial, index_of, server_command
from npti_export.dial.page import dial_page
from npti_export.errors import FidelityError, OutputError
from npti_export.export.dial import DialPlan, plan_dial, write_dial
from npti_export.export.gguf import check_base, rounds_nothing
from npti_export.export.metadata import ascii_name
from npti_export.files import (
    DIAL_INDEX,
    atomic_directory,
    check_directory_writable,
    set_aside,
    sha256_file,
    translate_os_errors,
)
from npti_export.gguf.shards import shard_paths
from npti_export.job import Job, Prepared, prepared, with_base
from npti_export.loader import Models, Timings
from npti_export.pipeline import baked_into, obtain_profiles, open_models
from npti_export.progress import Progress
from npti_export.rule import SteeringRule, build_rule, compose
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec
from npti_export.verify import Fidelity, LayerErrors, kl_divergence
from npti_export.verify_llamacpp import measure_file
from npti_export.version import __version__

BASE = "base.gguf"
# One set of units serves every pole, so clamps are not fitted to gates; in floats five hold two poles mixed to 1e-5.
_FLOAT_CLAMP_UNITS = 5


def make_dial(job: Job, mixed: int, progress: Progress) -> dict[str, Any]:
    """The ``dial`` command.

    Args:
        job: of the format ``dial``; its traits are the poles, its output the directory.
        mixed: see :func:`npti_export.compiler.dial.compile_dial`.
        progress: told of each stage.

    Returns:
        The index, as it was written.

    Raises:
        FidelityError: the dial was written but does not do what its rules say; it is kept as ``OUT.rejected``.
        NptiError: bad input, or an output that cannot be written; nothing is left behind.
    """
    out, timings = job.out, Timings()
    if out is None:
        raise OutputError("a dial needs an output")
    with prepared(job) as asked:
        check_directory_writable(out, force=job.force)
        if asked.base is not None:
            check_base(asked.base, asked.recipe.compile.layout)
        with (
            with_base(asked, progress, timings) as ready,
            open_models(ready, timings, progress, verifies=False) as models,
        ):
            assert ready.base is not None
            check_base(ready.base, ready.recipe.compile.layout)
            check_directory_writable(out, force=job.force, need_bytes=ready.base.size)
            rules = _rules(ready, models, timings, progress)
            units = _FLOAT_CLAMP_UNITS if rounds_nothing(ready.base) else ready.recipe.compile.basis_units
            program = compile_dial(rules, units, mixed)
            with atomic_directory(out, force=job.force) as folder:
                progress.start("write", 1)
                made = _write(ready, program, mixed, folder)
                progress.advance(1)
                with open_dial(ready, models, made.dial, folder) as opened:
                    index, fault = _measured(ready, opened, rules, made, progress)
                _finish(folder, index)
                if fault is not None:
                    raise FidelityError(f"{out}: not delivered: {fault}; it is kept as {set_aside(folder, out)}")
    return index


def _rules(ready: Prepared, models: Models, timings: Timings, progress: Progress) -> dict[str, SteeringRule]:
    profiles = obtain_profiles(ready, models, timings, progress)
    models.release_fast()
    return {spec.pole: build_rule(profiles[spec.trait], spec, ready.recipe) for spec in ready.traits}


@dataclass(frozen=True)
class _Made:
    """What was written, and how the unsteered file is called."""

    dial: Dial
    plan: DialPlan
    source: str


def _write(ready: Prepared, program: DialProgram, mixed: int, folder: Path) -> _Made:
    base = ready.base
    assert base is not None
    adapters = tuple(map(Adapter.of, program.adapters))
    paths = shard_paths(folder / BASE, len(base.parts))
    metadata = {
        "version": __version__,
        "trait": " ".join(spec.pole for spec in ready.traits),
        "recipe": ready.recipe.to_json(),
        "model.fingerprint": ready.source.fingerprint,
        "base.name": ascii_name(base.path),
    }
    digests = [sha256_file(part.path) for part in base.parts]
    files = [folder / one.file for one in adapters]
    plan = plan_dial(base, program, files, metadata, digests, ready.recipe.compile.layout)
    write_dial(plan, paths[0])
    return _Made(Dial(paths[0].name, adapters, mixed), plan, base.path.name)


@dataclass(frozen=True)
class OpenDial:
    """A dial in llama.cpp, and the file that its base was widened from.

    Attributes:
        base: the unsteered file.
        steered: the dial's base.
        dial: its index.
        folder: where its files are.
    """

    base: LlamaCppRuntime
    steered: LlamaCppRuntime
    dial: Dial
    folder: Path

    def turn(self, mix: Sequence[TraitSpec]) -> None:
        """Steer by a mix from now on, with the scales that a request would carry; an empty one switches all off."""
        scales = self.dial.scales(mix)
        self.steered.apply(
            {self.folder / one.file: scale for one, scale in zip(self.dial.adapters, scales, strict=True)}
        )


@contextmanager
def open_dial(ready: Prepared, models: Models, dial: Dial, folder: Path) -> Iterator[OpenDial]:
    """Open a dial and its unsteered file in llama.cpp for as long as the block lasts."""
    source, settings = baked_into(ready), models.settings.llama
    sequences = ready.recipe.verify.prompts
    with ExitStack() as stack:
        if source.path == ready.source.path and models.engine == "llama.cpp":
            base = models.llama()
        else:
            base = stack.enter_context(LlamaCppRuntime(source.path, settings, source=source))
        steered = LlamaCppRuntime(folder / dial.base, settings, sequences=sequences, source=source)
        yield OpenDial(base, stack.enter_context(steered), dial, folder)


def _measured(
    ready: Prepared, opened: OpenDial, rules: dict[str, SteeringRule], made: _Made, progress: Progress
) -> tuple[dict[str, Any], str | None]:
    """The index with what was measured, and the first fault, None if there is none.

    Measured are the dial with every slider at zero, each pole by itself, and the two poles that clamp most neurons in
    common. Mixes are the same adapters again, added up by llama.cpp.
    """
    base = ready.base
    assert base is not None
    recipe = ready.recipe
    prompts = [opened.base.encode(chat(None, text)) for text in held_out(ready.benches, recipe, recipe.verify.prompts)]
    exact = rounds_nothing(base)
    poles = {spec.pole: spec for spec in ready.traits}
    mixes: list[tuple[TraitSpec, ...]] = [(spec,) for spec in ready.traits]
    pair = _most_in_common(made.plan.program)
    if pair is not None:
        mixes.append(tuple(poles[pole] for pole in pair))
    unsteered, fault = _unsteered(
        opened, prompts, recipe.verify.kl_limit_float if exact else recipe.verify.kl_limit_quantised
    )
    measured: list[dict[str, Any]] = []
    for mix in mixes:
        rule = compose([rules[spec.pole] for spec in mix])
        opened.turn(mix)
        fidelity, layers = measure_file(opened.base, opened.steered, rule, prompts, recipe, progress)
        found = fidelity.fault(recipe, exact=exact, base=base.path.name) or (layers.fault() if layers else None)
        name = " ".join(map(str, mix))
        fault = fault or (found and f"{name}: {found}")
        measured.append(_entry(name, rule, fidelity, layers, fidelity.limit(recipe, exact=exact)))
    return _index(ready, made, unsteered, measured), fault


def _unsteered(opened: OpenDial, prompts: Sequence[Sequence[int]], limit: float) -> tuple[dict[str, Any], str | None]:
    """The dial with every slider at zero against the unsteered file, and what is wrong with it."""
    opened.turn(())
    same, worst, distances = True, 0.0, []
    for prompt in prompts:
        want, got = opened.base.logits(prompt), opened.steered.logits(prompt)
        same &= np.array_equal(want, got)
        worst = max(worst, float(np.abs(want - got).max()))
        distances.append(kl_divergence(want, got))
    distance = float(np.concatenate(distances).mean())
    fault = None
    if not distance <= limit:
        fault = f"with every slider at zero it is KL {distance:.2g} away from the unsteered file (limit {limit:.2g})"
    return {"bitwise": bool(same), "kl": distance, "max_logit_diff": worst}, fault


def _most_in_common(program: DialProgram) -> tuple[str, ...] | None:
    pairs = [one for one in program.adapters if one.kind == "overlap" and len(one.traits) == 2]
    return max(pairs, key=lambda one: one.rule.clamped).traits if pairs else None


def _entry(
    name: str, rule: SteeringRule, fidelity: Fidelity, layers: LayerErrors | None, limit: float
) -> dict[str, Any]:
    return {
        "traits": name,
        "neurons": {"shift": rule.shifted, "clamp": rule.clamped},
        "fidelity": asdict(fidelity) | {"limit": limit},
        "layers": layers and asdict(layers),
    }


def _index(ready: Prepared, made: _Made, unsteered: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    dial, plan = made.dial, made.plan
    index = index_of(dial)
    for entry, adapter, file in zip(index["adapters"], plan.program.adapters, plan.files, strict=True):
        neurons = adapter.rule.shifted or adapter.rule.clamped
        entry |= {"neurons": neurons, "bytes": file.nbytes, "sha256": sha256_file(file.path)}
    poles, mixes = measured[: len(dial.poles)], measured[len(dial.poles) :]
    return index | {
        "version": __version__,
        "model": {
            "name": made.source,
            "id": ready.source.hub_id,
            "license": ready.source.license,
            "fingerprint": ready.source.fingerprint,
        },
        "bytes": {"unsteered": plan.bake.base.size, "base": plan.bake.nbytes, "all": plan.nbytes},
        "extra_width": plan.bake.extra,
        "extra_width_mean": round(plan.bake.mean_extra, 1),
        "unsteered": unsteered,
        "poles": {entry.pop("traits"): entry for entry in poles},
        "mixes": mixes,
        "server": server_command(dial),
        "request": dial.request([replace(ready.traits[0], strength=0.7)]),
        "recipe": json.loads(ready.recipe.to_json()),
    }


def _finish(folder: Path, index: dict[str, Any]) -> None:
    with translate_os_errors(folder):
        text = json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / DIAL_INDEX).write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(dial_page(index), encoding="utf-8")


__all__ = ("OpenDial", "make_dial", "open_dial")
