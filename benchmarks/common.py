"""What the benchmark scripts share: the default model, profiles, and small statistics."""

import json
from pathlib import Path

import numpy as np

from npti_export.bench import load_bench
from npti_export.identify.collect import answer, cache_folder, contrast_prompts, plain_prompts
from npti_export.identify.profiles import Place, profile_for
from npti_export.models import resolve_model
from npti_export.progress import Silent
from npti_export.rule import build_rule
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered
from npti_export.traits import FACETS, SIGNS, TraitSpec

OUT = Path(__file__).parent / "out"


def load_model(dtype="auto"):
    source = resolve_model(None)
    return source, TransformersRuntime(source, dtype=dtype)


def profile_of(trait, source, runtime, recipe):
    """The trait's profile, from the same cache as the command line's."""
    dtype = str(runtime.dtype).removeprefix("torch.")
    place = Place(lambda: runtime, source, dtype, runtime.device.type, cache_folder())
    return profile_for(place, load_bench(trait), SIGNS, recipe, Silent())


def answer_as(condition, runtime, source, pole, questions, recipe, tokens):
    """Answers of the unsteered model (``base``), of it as a ``persona`` of the pole, or of the ``steered`` one."""
    trait, sign = pole[:-1], pole[-1]
    if condition == "persona":
        return answer(runtime, contrast_prompts(runtime, load_bench(trait), questions, sign, recipe), recipe, tokens)
    plain = plain_prompts(runtime, questions, recipe)
    if condition == "base":
        return answer(runtime, plain, recipe, tokens)
    rule = build_rule(profile_of(trait, source, runtime, recipe), TraitSpec(trait, sign), recipe)
    with steered(runtime.activations, rule, runtime.down_projections):
        return answer(runtime, plain, recipe, tokens)


def poles(traits=None):
    return [(trait, sign) for trait in (traits or FACETS) for sign in ("+", "-")]


def interval(values, seed=0):
    """Mean and 95% bootstrap interval (BCa) over questions."""
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    found = bootstrap((values,), np.mean, n_resamples=4000, random_state=np.random.default_rng(seed))
    return float(values.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high)


def append_line(path, record):
    """Add one JSON line; a stopped benchmark goes on from what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def say(*parts, **options):
    print(*parts, flush=True, **options)
