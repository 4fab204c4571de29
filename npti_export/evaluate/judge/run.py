"""Judging: every answer of every condition, in one blind and shuffled pile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.bench import shipped_folder
from npti_export.bench.definition import TraitDefinition, read_definition
from npti_export.errors import EvaluationError, NptiError, OutputError
from npti_export.evaluate.document import Agreement, Estimate, JudgePart, JudgeScores
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.judge.agreement import agreement
from npti_export.evaluate.judge.prompts import WHAT, What, judge_messages
from npti_export.evaluate.judge.raters import Rater, open_judges
from npti_export.evaluate.judge.spec import JudgeSpec
from npti_export.evaluate.judge.verdicts import Asked, Verdict, VerdictJournal

Progress = Callable[[int, int], None]
"""Told how many verdicts of how many there are, over all judges."""
_Pairs = dict[tuple[str, str], None]
_Ratings = dict[What, dict[tuple[str, str], float | None]]


@contextmanager
def opened_journal(journal: Path | VerdictJournal | None) -> Iterator[VerdictJournal]:
    """A journal, read and held until the block ends; one that is open already stays open.

    Raises:
        EvaluationError: it is damaged.
        OutputError: it cannot be written, is no journal, or another run has it open.
    """
    if isinstance(journal, VerdictJournal):
        yield journal
        return
    kept = VerdictJournal(journal)
    try:
        yield kept
    finally:
        kept.close()


def check_judges(
    judges: Sequence[JudgeSpec], journal: Path | VerdictJournal | None, note: Callable[[str], None]
) -> None:
    """Ask each judge one short thing, and read the journal: what is wrong with them is known before any work.

    Raises:
        EvaluationError: a judge is unusable, refuses or does not answer, or the journal is damaged.
        BenchError: the packages of the extra ``bench`` are missing.
        ModelError: a local judge cannot be run.
        OutputError: the journal cannot be written, is none, or another run has it open.
    """
    with opened_journal(journal):
        pass
    definition = read_definition(shipped_folder("extraversion"))  # any: fluency is rated without it
    asked = Asked("fluency", judge_messages("fluency", definition, "+", "How are you?", "Well, thank you."))
    for rater in open_judges(judges, note):
        rater.check(asked)


def judge_answers(
    judges: Sequence[JudgeSpec],
    definition: TraitDefinition,
    sign: str,
    questions: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    journal: Path | VerdictJournal | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _text: None,
) -> JudgePart:
    """Let judges rate answers: how strongly they show the wanted pole, and how fluent they are, 1 to 5.

    A judge that fails is left out with a note, or, where verdicts of it came before, scores by these: the pile is
    shuffled. A condition for which a judge gave no verdict that can be used is not among its scores.

    A judge sees question and answer only, never which condition made it, and the answers of all conditions in one
    seeded random order. The same answer to the same question is judged once, whoever gave it.

    Args:
        judges: one or more.
        definition: of the trait.
        sign: ``+`` or ``-``, the wanted pole.
        questions: what was asked.
        answers: by condition, one a question.
        seed: of the order and of the intervals.
        journal: file that keeps verdicts, or one that is open; a run that was killed asks only for what is missing.
        progress: told how far it is.
        note: told, in a sentence, what the user should know.

    Raises:
        EvaluationError: nothing to judge, a judge is given twice, the journal is damaged; or no judge gave a verdict,
            likewise the next two.
        BenchError: an endpoint refuses or does not answer.
        ModelError: a local judge cannot be run.
        OutputError: the journal cannot be written.
    """
    if sign not in ("+", "-"):
        raise EvaluationError(f"a judge rates towards + or -, not {sign!r}")
    wrong = [name for name, texts in answers.items() if len(texts) != len(questions)]
    if wrong or not answers or not questions:
        of = f"; {wrong[0]} has {len(answers[wrong[0]])} answers to {len(questions)} questions" if wrong else ""
        raise EvaluationError(f"nothing that a judge could compare{of}")
    raters = open_judges(judges, note)
    pairs: _Pairs = dict.fromkeys(
        (question, text) for texts in answers.values() for question, text in zip(questions, texts, strict=True)
    )
    found = _of_all(raters, definition, sign, list(pairs), seed, journal, progress, note)
    return JudgePart(
        judges=[_scores(name, ratings, questions, answers, seed) for name, ratings in found.items()],
        agreement=_agreements(list(found), list(found.values()), seed),
    )


def _of_all(
    raters: Sequence[Rater],
    definition: TraitDefinition,
    sign: str,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    journal: Path | VerdictJournal | None,
    progress: Progress | None,
    note: Callable[[str], None],
) -> dict[str, _Ratings]:
    """Ratings by the names of the judges that gave any."""
    with opened_journal(journal) as kept:
        meter = _Meter(len(raters) * len(WHAT) * len(pairs), progress)
        made = {
            rater.name: _ratings_or_fault(rater, definition, sign, pairs, seed, kept, meter, note) for rater in raters
        }
    faults = [one for one in made.values() if isinstance(one, NptiError)]
    found = {name: one for name, one in made.items() if not isinstance(one, NptiError)}
    if not found:
        raise faults[0]
    for fault in faults:
        note(f"a judge is left out: {fault}")
    return found


def _agreements(names: Sequence[str], found: Sequence[_Ratings], seed: int) -> list[Agreement]:
    """Of every two judges, over different answers."""
    made = [
        agreement(
            (names[one], names[other]),
            what,
            _array(found[one][what]),
            _array(found[other][what]),
            [question for question, _ in found[one][what]],
            seed=seed,
        )
        for one, other in combinations(range(len(names)), 2)
        for what in WHAT
    ]
    return [one for one in made if one is not None]


def _array(ratings: Mapping[tuple[str, str], float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if rating is None else rating for rating in ratings.values()], np.float64)


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _ratings_or_fault(rater: Rater, *more: Any) -> _Ratings | NptiError:
    """Those of :func:`_ratings`, or why there are none; a disk that is full is everybody's fault."""
    try:
        return _ratings(rater, *more)
    except OutputError:
        raise
    except NptiError as error:
        return error


def _ratings(
    rater: Rater,
    definition: TraitDefinition,
    sign: str,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    kept: VerdictJournal,
    meter: _Meter,
    note: Callable[[str], None],
) -> _Ratings:
    """All ratings of one judge, in the order of the pairs; where it fails in between, those that came."""
    asked = {
        (what, pair): Asked(what, judge_messages(what, definition, sign, *pair)) for what in WHAT for pair in pairs
    }
    verdicts = {place: kept.get(request.key(rater.identity)) for place, request in asked.items()}
    missing = [place for place, verdict in verdicts.items() if verdict is None]
    for _ in range(len(asked) - len(missing)):
        meter.step()
    random.Random(f"{seed}/judge").shuffle(missing)

    def done(number: int, verdict: Verdict | None) -> None:
        place = missing[number]
        if verdict is not None:
            request = asked[place]
            kept.add(request.key(rater.identity), rater.name, request.what, verdict)
            verdicts[place] = verdict
        meter.step()

    try:
        if missing:
            rater.rate([asked[place] for place in missing], done)
    except OutputError:
        raise
    except NptiError as error:
        came = sum(verdict is not None and verdict.rating is not None for verdict in verdicts.values())
        if not came:
            raise
        note(f"--judge {rater.name}: failed, and scores by the {came} of {len(asked)} verdicts that came: {error}")
    ratings = {place: verdict.rating if verdict is not None else None for place, verdict in verdicts.items()}
    if all(rating is None for rating in ratings.values()):
        faults = [verdict.fault for verdict in verdicts.values() if verdict is not None]
        why = f"; of the last one: {faults[-1]}" if faults else ""
        raise EvaluationError(f"--judge {rater.name}: gave no verdict that could be read{why}; take another judge")
    return {what: {pair: ratings[what, pair] for pair in pairs} for what in WHAT}


def _scores(
    judge: str, ratings: _Ratings, questions: Sequence[str], answers: Mapping[str, Sequence[str]], seed: int
) -> JudgeScores:
    unusable = 0

    def of(what: What) -> dict[str, Estimate]:
        nonlocal unusable
        by_condition = {}
        for name, texts in answers.items():
            values = [ratings[what][pair] for pair in zip(questions, texts, strict=True)]
            usable = [value for value in values if value is not None]
            unusable += len(values) - len(usable)
            if usable:
                by_condition[name] = estimate(usable, seed=seed)
        return by_condition

    trait, fluency = of("trait"), of("fluency")
    return JudgeScores(judge=judge, trait=trait, fluency=fluency, unusable=unusable)
