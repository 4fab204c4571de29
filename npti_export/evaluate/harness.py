"""Published test sets through lm-evaluation-harness (the optional extra ``harness``), in our own runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npti_export.errors import EvaluationError
from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.document import Change, Task
from npti_export.evaluate.estimate import estimate
from npti_export.runtimes.base import Exchange

_NEW_TOKENS = 256  # of an answer where a task says nothing, as in lm-evaluation-harness
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")  # the first that a task has is reported


def harness_tasks(
    base: Model, steered: Model, names: Sequence[str | dict[str, Any]], *, limit: int | None = None, seed: int = 0
) -> list[Task]:
    """Run tasks of lm-evaluation-harness on both models.

    Args:
        base: the unsteered model.
        steered: the artifact.
        names: of tasks, or their configurations as a YAML file would hold them.
        limit: most documents a task.
        seed: of the intervals.

    Raises:
        EvaluationError: lm-evaluation-harness is not installed, does not know a task, or cannot run it.
    """
    before, after = (_samples(model, names, limit) for model in (base, steered))
    found = []
    for name, documents in before.items():
        metric = next((one for one in _METRICS if one in next(iter(documents.values()))), None)
        if metric is None:
            raise EvaluationError(f"task {name}: reports none of {', '.join(_METRICS)}; leave it out")
        ours = [float(values[metric]) for values in documents.values()]
        others = [float(after[name][number][metric]) for number in documents]
        changes = [other - one for one, other in zip(ours, others, strict=True)]
        first, second, change = (estimate(values, seed=seed) for values in (ours, others, changes))
        score = Change(base=first, steered=second, change=change)
        found.append(Task(name=name, source="lm-evaluation-harness", metric=metric, score=score))
    return found


def _samples(model: Model, names: Sequence[Any], limit: int | None) -> dict[str, dict[int, dict[str, Any]]]:
    """Per task and document number, what was logged, its metrics among it."""
    try:
        from lm_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise EvaluationError(
            f"lm-evaluation-harness cannot be imported ({error}); pip install 'npti-export[harness]'"
        ) from error
    try:
        result = simple_evaluate(as_lm(model), tasks=list(names), limit=limit, bootstrap_iters=0, log_samples=True)
    except (ValueError, KeyError, OSError, FileNotFoundError) as error:
        raise EvaluationError(f"lm-evaluation-harness: {' '.join(str(error).split())[:300]}") from error
    return {name: {one["doc_id"]: one for one in samples} for name, samples in (result or {})["samples"].items()}


def as_lm(model: Model) -> Any:
    """One of our models as an ``lm_eval.api.model.LM``."""
    from lm_eval.api.model import LM

    class Ours(LM):  # type: ignore[misc]
        """Likelihoods are summed over tokens and in nats, as the harness has them."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """See ``LM``; whether an answer is the greedy one costs another pass and is not asked of us: False."""
            exchanges = [_exchange(model, *request.args) for request in requests]
            means = model.log_likelihoods(exchanges)
            return [(mean * len(one.response), False) for mean, one in zip(means, exchanges, strict=True)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """See ``LM``; a text is read in one piece."""
            exchanges = [_exchange(model, "", request.args[0]) for request in requests]
            means = model.log_likelihoods(exchanges)
            return [mean * len(one.response) for mean, one in zip(means, exchanges, strict=True)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """See ``LM``; greedy."""
            return [_until(model, *request.args) for request in requests]

    return Ours()


def _exchange(model: Model, context: str, continuation: str) -> Exchange:
    """Tokens are those of the whole text, cut where the context's end; without one, behind its first token."""
    whole, head = model.encode_text(context + continuation), model.encode_text(context) if context else ()
    cut = min(max(1, len(head)), len(whole) - 1)
    if cut < 1:
        raise EvaluationError(f"a task asks for the likelihood of {continuation[:40]!r}, which is a single token")
    return Exchange(whole[:cut], whole[cut:])


def _until(model: Model, context: str, options: dict[str, Any]) -> str:
    limit = int(options.get("max_gen_toks", _NEW_TOKENS))
    stops = options.get("until") or []
    prompt = model.encode_text(context)
    (exchange,) = model.generate([prompt], max_new_tokens=limit, repetition_penalty=1.0)
    text = model.decode(exchange.response)
    places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
