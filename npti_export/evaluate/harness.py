"""Published test sets through lm-evaluation-harness (the optional extra ``harness``), in our own runtimes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from npti_export.errors import EvaluationError, NptiError
from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.document import Change, Task
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.task_files import check_task_file
from npti_export.runtimes.base import Exchange

_NEW_TOKENS = 256  # of an answer where a task says nothing, as in lm-evaluation-harness
_METRICS = ("acc_norm", "acc", "exact_match", "f1")  # from 0 to 1; the first that a task has is reported
HARNESS_LIMIT = 100  # documents of a task, unless another number is asked for
Samples = dict[str, dict[int, dict[str, Any]]]


def check_harness(names: Sequence[str], *, skipped: bool = False, trusted: bool = False) -> None:
    """Whether tasks can be run, as far as that can be said without a model.

    Args:
        names: of tasks, groups or YAML files, as a user gave them.
        skipped: whether tests of skill are left out.
        trusted: whether files of tasks may run Python code that comes with them.

    Raises:
        EvaluationError: they are, a file would run code, lm-evaluation-harness is not installed, or it does not know a
            task.
    """
    if not names:
        return
    if skipped:
        raise EvaluationError(f"--harness {names[0]}: is left out by --skip capability; give one of the two")
    for name in names:
        if _is_file(name) and Path(name).is_file() and not trusted:
            with _installed():  # YAML comes with it
                check_task_file(Path(name))
    manager = _manager(names)
    for name in names:
        if _is_file(name):
            if not Path(name).is_file():
                raise EvaluationError(f"--harness {name}: there is no such file")
        elif name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; lm_eval ls tasks lists them"
            raise EvaluationError(f"--harness {name}: lm-evaluation-harness has no such task{hint}")


@dataclass(frozen=True)
class Harness:
    """What the unsteered model made of some tasks.

    Attributes:
        names: of the tasks, or their configurations as a YAML file would hold them.
        limit: most documents a task.
        base: what was logged, by task and document.
    """

    names: tuple[str | dict[str, Any], ...]
    limit: int | None
    base: Samples

    @classmethod
    def of(cls, base: Model, names: Sequence[str | dict[str, Any]], limit: int | None = None) -> Harness:
        """Run tasks on the unsteered model.

        Raises:
            EvaluationError: lm-evaluation-harness is not installed, does not know a task, or cannot run it.
        """
        return cls(tuple(names), limit, _samples(base, names, limit))

    def compared(self, steered: Model, *, seed: int = 0) -> list[Task]:
        """The same tasks of the steered model, document by document.

        Args:
            steered: the artifact.
            seed: of the intervals.

        Raises:
            EvaluationError: a task cannot be run, or reports no figure that we know.
        """
        after = _samples(steered, self.names, self.limit)
        return [_compared(name, documents, after[name], seed) for name, documents in self.base.items()]


def _compared(name: str, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], seed: int) -> Task:
    metric = next((one for one in _METRICS if before and one in next(iter(before.values()))), None)
    if metric is None:
        raise EvaluationError(f"task {name}: reports none of {', '.join(_METRICS)}; leave it out")
    ours, others = ([float(one[number][metric]) for number in before] for one in (before, after))
    changes = [other - one for one, other in zip(ours, others, strict=True)]
    first, second, change = (estimate(values, seed=seed) for values in (ours, others, changes))
    score = Change(base=first, steered=second, change=change)
    return Task(name=name, source="lm-evaluation-harness", metric=metric, score=score)


def _is_file(name: Any) -> bool:
    return isinstance(name, str) and name.endswith((".yaml", ".yml"))


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EvaluationError(
            f"lm-evaluation-harness cannot be imported ({error}); pip install 'npti-export[harness]'"
        ) from error


def _manager(names: Sequence[Any]) -> Any:
    """Of tasks. Reading the index of the harness's own takes long: it is left out where none of them is named."""
    with _installed():
        from lm_eval.tasks import TaskManager
    return TaskManager(include_defaults=any(isinstance(name, str) and not _is_file(name) for name in names))


def _samples(model: Model, names: Sequence[Any], limit: int | None) -> Samples:
    """Per task and document number, what was logged, its metrics among it."""
    manager = _manager(names)
    with _installed():
        from lm_eval.evaluator import simple_evaluate
    try:
        result = simple_evaluate(
            as_lm(model), tasks=list(names), limit=limit, bootstrap_iters=0, log_samples=True, task_manager=manager
        )
    except NptiError:
        raise
    except Exception as error:  # a task is anybody's code, and its data anybody's files
        words = " ".join(str(error).split())[:300]
        raise EvaluationError(f"lm-evaluation-harness: {type(error).__name__}: {words}") from error
    return {name: {one["doc_id"]: one for one in samples} for name, samples in (result or {})["samples"].items()}


def as_lm(model: Model) -> Any:
    """One of our models as an ``lm_eval.api.model.LM``."""
    from lm_eval.api.model import LM

    class Ours(LM):  # type: ignore[misc]
        """Likelihoods are summed over tokens and in nats, as the harness has them."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """See ``LM``. Of several continuations of a document none is called greedy, which costs another pass."""
            exchanges = [_exchange(model, *request.args) for request in requests]
            means = model.log_likelihoods(exchanges)
            asked = Counter((request.task_name, request.doc_id) for request in requests)
            alone = [asked[request.task_name, request.doc_id] == 1 for request in requests]
            return [
                (mean * len(one.response), single and _is_greedy(model, one))
                for mean, one, single in zip(means, exchanges, alone, strict=True)
            ]

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


def _is_greedy(model: Model, exchange: Exchange) -> bool:
    """Whether each token of the response is the likeliest one."""
    likeliest = model.logits(exchange.tokens)[len(exchange.prompt) - 1 : -1].argmax(1)
    return tuple(likeliest.tolist()) == exchange.response


def _until(model: Model, context: str, options: dict[str, Any]) -> str:
    limit = int(options.get("max_gen_toks", _NEW_TOKENS))
    stops = options.get("until") or []
    prompt = model.encode_text(context)
    (exchange,) = model.generate([prompt], max_new_tokens=limit, repetition_penalty=1.0)
    text = model.decode(exchange.response)
    places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
