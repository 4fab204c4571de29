"""The search: optuna's TPE over the space, in a file that it goes on from, until the trials or the time are used up."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npti_export.errors import DiskFullError, EvaluationError, NptiError, OutputError, ProfileError
from npti_export.evaluate.document import Estimate
from npti_export.files import translate_os_errors
from npti_export.progress import Progress
from npti_export.tuning.space import Point, Space
from npti_export.tuning.trial import Figures

if TYPE_CHECKING:
    import optuna

_AT_RANDOM = 12  # trials before the sampler learns from them, the enqueued ones included
_FRUITLESS = 200  # failed trials after which there is no point in going on
_FIGURES = ("gain", "fluency", "damage")
_SAID = 200  # characters of what optuna says of a file
_CONFIRMED = "confirmed"
_DIGEST = "sha256"  # of a trial's point and figures: a file that was damaged must not choose


@dataclass(frozen=True)
class Finished:
    """A trial that has figures.

    Attributes:
        number: in its study, from 0.
        point: what was tried.
        figures: what came of it.
    """

    number: int
    point: Point
    figures: Figures


@dataclass(frozen=True)
class Limits:
    """When the search ends; it makes one trial in any case.

    Attributes:
        trials: with figures, those that were resumed included; None for as many as there is time for.
        seconds: until all is done.
        after: trials' worth of time that is left for what comes after the search.
        clock: gives seconds.
    """

    trials: int | None
    seconds: float
    after: float = 0.0
    clock: Callable[[], float] = time.monotonic


class Study:
    """A series of trials of one model, pole and set of questions.

    Args:
        study: optuna's.
        space: that its trials are of.
        excess: how far a trial exceeds each limit of the budget, told to the sampler as constraints, so that it looks
            where a pick can be made; those of earlier trials stay as they were told.
        storage: its file, for messages; optuna reads much of it only when it is asked.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        excess: Callable[[Figures], tuple[float, float]],
        storage: Path | None = None,
    ) -> None:
        self._study, self._space, self._excess, self._storage = study, space, excess, storage

    @property
    def failed(self) -> int:
        """Trials that gave no rule, or no figures."""
        return sum(trial.state.name == "FAIL" for trial in self._trials())

    @property
    def confirmed(self) -> int:
        """How often a pick of this study was measured on test questions."""
        with _believed(self._storage):
            return int(self._study.user_attrs.get(_CONFIRMED, 0))

    def confirm(self) -> None:
        """Note that it is done once more."""
        self._study.set_user_attr(_CONFIRMED, self.confirmed + 1)

    def finished(self) -> list[Finished]:
        """All trials with figures.

        Raises:
            EvaluationError: a trial in the file is damaged.
        """
        return [
            Finished(trial.number, self._point(trial), _figures(trial))
            for trial in self._trials()
            if trial.state.name == "COMPLETE"
        ]

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        with _believed(self._storage):
            return list(self._study.get_trials(deepcopy=False))

    def _point(self, trial: optuna.trial.FrozenTrial) -> Point:
        try:
            return self._space.point(trial.params or trial.system_attrs["fixed_params"])
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"trial {trial.number} of the study is damaged; name another --storage") from error

    def run(
        self,
        measure: Callable[[Point], Figures],
        starts: Sequence[Point],
        limits: Limits,
        progress: Progress,
    ) -> None:
        """Make trials.

        Args:
            measure: a trial; one that raises ProfileError or EvaluationError counts as failed.
            starts: tried first, where they have not been.
            limits: when to stop.
            progress: told of each trial.

        Raises:
            EvaluationError: nothing but failed trials.
        """
        self._prepare(starts)
        finished, failed, longest, fault = len(self.finished()), 0, 0.0, None
        began = last = limits.clock()
        progress.start("tune (seconds)", max(1, round(limits.seconds)))
        while finished == 0 or (
            (limits.trials is None or finished < limits.trials)
            and last - began + longest * (1 + limits.after) < limits.seconds
        ):
            fault = self._trial(measure, progress)
            now = limits.clock()
            progress.advance(round(now - began) - round(last - began))
            longest, last = max(longest, now - last), now
            finished, failed = finished + (fault is None), failed + (fault is not None)
            if fault is not None and failed >= _FRUITLESS:
                break
        if not finished:
            raise EvaluationError(f"no trial gave a rule that can be measured: {fault}") from fault

    def _prepare(self, starts: Sequence[Point]) -> None:
        import optuna

        there = self._trials()
        known = {self._point(trial) for trial in there if trial.state.name in ("COMPLETE", "FAIL") and trial.params}
        known |= {self._point(trial) for trial in there if trial.state.name == "WAITING"}
        with _believed(self._storage):
            for number in [
                trial.number for trial in there if trial.state.name == "RUNNING"
            ]:  # of a run that was killed
                self._study.tell(number, state=optuna.trial.TrialState.FAIL)
            for point in starts:
                if point not in known:
                    self._study.enqueue_trial(self._space.parameters(point))

    def _trial(self, measure: Callable[[Point], Figures], progress: Progress) -> Exception | None:
        import optuna

        with _believed(self._storage):
            trial = self._study.ask()
            point = self._space.suggest(trial)
        try:
            figures = measure(point)
            assert figures.damage is not None
        except (ProfileError, EvaluationError) as error:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return error
        limits = self._excess(figures)
        with _believed(self._storage):
            for name in _FIGURES:
                trial.set_user_attr(name, getattr(figures, name).model_dump())
            trial.set_user_attr(_DIGEST, _digest(trial.params, trial.user_attrs))
            for name, value in zip(("damage", "fluency"), limits, strict=True):
                trial.set_constraint(name, value)
            self._study.tell(trial, [figures.gain.mean, figures.damage.mean])
        progress.note(
            f"trial {trial.number}: gain {figures.gain.mean:+.3f}, KL {figures.damage.mean:.3f}, "
            f"fluency {figures.fluency.mean:.2f}: {self._space.label(point)}"
        )
        return None


def _figures(trial: optuna.trial.FrozenTrial) -> Figures:
    try:
        if trial.user_attrs[_DIGEST] != _digest(trial.params, trial.user_attrs):
            raise ValueError("its checksum is wrong")
        figures = Figures(**{name: Estimate.model_validate(trial.user_attrs[name]) for name in _FIGURES})
        if trial.values != [figures.gain.mean, figures.damage and figures.damage.mean]:
            raise ValueError("its values are not its figures")
        return figures
    except (KeyError, ValueError) as error:
        raise EvaluationError(f"trial {trial.number} of the study is damaged; name another --storage") from error


def _digest(parameters: Mapping[str, object], attributes: Mapping[str, object]) -> str:
    # a file gives 1.0 back where 1 was put in
    point = {name: float(value) if isinstance(value, int) else value for name, value in parameters.items()}
    told = [point, {name: attributes[name] for name in _FIGURES}]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened_study(
    storage: Path | None, name: str, space: Space, excess: Callable[[Figures], tuple[float, float]], *, seed: int
) -> Iterator[Study]:
    """A study, new or gone on with.

    Args:
        storage: SQLite file; None keeps nothing. Beside it, a file ending in ``.lock`` keeps two runs from one study.
        name: of everything that trials' figures depend on; a file may hold several.
        space: of its trials.
        excess: see :class:`Study`.
        seed: of the sampler, together with the number of trials that there are.

    Raises:
        EvaluationError: the file is no such storage, is damaged or of another version of optuna, or another run makes
            trials of the same study.
        OutputError: it cannot be written.
        DiskFullError: no room.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    before, logged = optuna.logging.get_verbosity(), optuna.logging.set_verbosity
    logged(optuna.logging.ERROR)
    try:
        if storage is not None:
            with translate_os_errors(storage), storage.open("ab"):  # whether it can be written, in our words
                pass
        with _alone(storage, name), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = _loaded(storage, name, seed)
            yield Study(study, space, excess, storage)
    except (DatabaseError, optuna.exceptions.StorageInternalError, sqlite3.Error) as error:
        raise _failed(storage, error) from error
    finally:
        logged(before)


def _loaded(storage: Path | None, name: str, seed: int) -> optuna.Study:
    import optuna

    directions = ["maximize", "minimize"]
    with _believed(storage):
        study = optuna.create_study(
            storage=None if storage is None else _file(storage),
            study_name=name,
            directions=directions,
            load_if_exists=True,
        )
        if [one.name.lower() for one in study.directions] != directions:
            raise ValueError("it has other directions")
        drawn = seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=drawn, multivariate=True, group=True, n_startup_trials=_AT_RANDOM)
    return study


@contextmanager
def _believed(storage: Path | None) -> Iterator[None]:
    """Optuna's own ways of saying that a file is of another version, or that what it holds cannot be, in our words."""
    from alembic.util.exc import CommandError

    try:
        yield
    except (
        CommandError, RuntimeError, AssertionError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError,
    ) as error:  # fmt: skip
        if storage is None:  # nothing but what this process put there
            raise
        raise _unusable(storage, str(error) or type(error).__name__) from error


def _failed(storage: Path | None, error: Exception) -> NptiError:
    """What SQLite met, which optuna may have wrapped: a disk that failed says nothing against what is there."""
    inner = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
    reason = str(inner or error)
    if "disk is full" in reason or "disk I/O" in reason:
        return DiskFullError(
            f"{storage}: the disk is full ({reason}); make room and run the command again, which goes on from the last "
            "finished trial"
        )
    if "readonly" in reason or "unable to open" in reason:
        return OutputError(f"{storage}: cannot be written ({reason})")
    return _unusable(storage, reason)


def _unusable(storage: Path | None, reason: str) -> EvaluationError:
    said = " ".join(reason.split())[:_SAID]
    return EvaluationError(
        f"{storage}: not a study of trials, damaged, or of another version of optuna ({said}); name another file"
    )


@contextmanager
def _alone(storage: Path | None, name: str) -> Iterator[None]:
    """Hold a study: a second run would take the first one's trials for those of a run that was killed."""
    from filelock import FileLock, Timeout

    if storage is None:
        yield
        return
    place = storage.with_name(f"{storage.name}.{name.replace(' ', '-')}.lock")
    lock = FileLock(place)
    with translate_os_errors(place):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:  # an OSError, too
            raise EvaluationError(
                f"{storage}: another run is making trials of this study ({name.split()[0]}, with the same settings); "
                "wait for it, or name another --storage"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _file(path: Path) -> optuna.storages.RDBStorage:
    import optuna

    def connect() -> sqlite3.Connection:  # a URL would give some characters of a path another meaning
        return sqlite3.connect(path, check_same_thread=False)

    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect})
