"""The driver: hands tasks to Ray actors, takes what comes back, and does again what was lost."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from npti_export import errors
from npti_export.distribute.cluster import Pulse, Size
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Ask, Asked, Fault, Hello, Log, Match, Merge, Outcome, Series, Setup, Task
from npti_export.distribute.worker import Worker
from npti_export.errors import ClusterError, NptiError, ProfileError
from npti_export.identify.profiles import keep_constant
from npti_export.progress import Progress

_RESTARTS = 3  # of one worker, by Ray; a model that does not fit into its node kills every worker that takes it
_FAILURES = 6  # of one task, whoever did it
_MISTAKES = 2  # the same, where it was the task that raised
_POLL = 0.5  # seconds
_SILENT = 120  # times, a poll apart, that a worker which is being started again may not answer
_AGAIN = 60  # times that it looks for a shard which a shared folder shows late
_AHEAD = 4  # batches a worker that are asked behind a gap
_SLOW = 1.5  # times the median: a task that takes longer is done a second time, where a worker has nothing else to do
_PATIENT = 8  # times as long for a third copy, and so on
_UNKNOWN = 60.0  # seconds, where nothing of its kind has ended yet
_PATIENCE = 20.0  # seconds until the user is told that Ray places no worker
_CLOSING = 10.0


@dataclass
class _Running:
    task: Task
    actor: int
    started: float


class RayEngine:
    """Workers of one model, for all traits of a job.

    Args:
        ray: connected.
        setup: for the workers.
        size: of them.
        progress: told of every batch and every loss.
    """

    def __init__(self, ray: Any, setup: Setup, size: Size, progress: Progress) -> None:
        self._ray, self._progress, self.log = ray, progress, Log()
        self._pulse = Pulse(ray)
        options = {
            "num_cpus": size.threads,
            "num_gpus": size.gpus,
            "max_restarts": _RESTARTS,
            "max_task_retries": _RESTARTS,
            "scheduling_strategy": "SPREAD",
        }
        kind = ray.remote(Worker).options(**options)
        self._actors = {number: kind.remote(setup) for number in range(size.workers)}
        self._greeting: dict[Any, int] = {}
        for number in self._actors:
            self._greet(number)
        self._silent: Counter[int] = Counter()
        self._alone: float | None = None  # since when no worker has been there
        self._told = False
        self._away: dict[int, float] = {}  # workers that are being started again, and until when not to ask them
        self._hello: Hello | None = None
        self._process: dict[int, str] = {}
        self._idle: list[int] = []
        self._running: dict[Any, _Running] = {}
        self._arriving: list[_Running] = []
        self._failures: Counter[Task] = Counter()
        self._mistakes: Counter[Task] = Counter()
        self._seconds: defaultdict[type, list[float]] = defaultdict(list)
        self._series: dict[str, Any] = {}
        self._gatherings: dict[str, Gathering] = {}
        self._matches: list[Match] = []

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let idle workers clean up; with the last reference to them, Ray ends all."""
        with suppress(self._ray.exceptions.RayError):
            closing = [self._actors[number].close.remote() for number in self._idle if kind is None]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSING)
        self._running.clear()
        self._actors.clear()

    def hello(self) -> Hello:
        """What the first worker says that it computes in; those that come later must say the same.

        Raises:
            NptiError: the model is missing there, or every worker died.
        """
        while self._hello is None:
            self._wait()
        return self._hello

    def run(self, series: Sequence[Series], gatherings: Sequence[Gathering], matches: Sequence[Match]) -> None:
        """Ask until every trait has enough, and match.

        Args:
            series: of all traits.
            gatherings: of those whose neurons are identified.
            matches: constants to be found.

        Raises:
            NptiError: what a worker says; or workers died time and again.
        """
        self._gatherings = {one.series.bench.trait: one for one in gatherings}
        self._matches = list(matches)
        self._series = {one.bench.trait: self._ray.put(one) for one in series}  # once, not with every task
        for gathering in gatherings:
            if not gathering.finished:
                gathering.shards.prepare()
        again = 0
        while True:
            for gathering in gatherings:
                if gathering.complete and not gathering.finished:
                    gathering.finish()
            if not self._matches and all(one.finished for one in gatherings):
                return
            if any(one.complete and not one.finished for one in gatherings) and again < _AGAIN:
                again += 1  # a shard that was not there a moment ago is: a shared folder may be late
                time.sleep(_POLL)
                continue
            self._hand_out()
            self._wait()

    def _hand_out(self) -> None:
        for number in list(self._idle):
            task = self._next() or self._slowest()
            if task is None:
                return
            self._idle.remove(number)
            ref = self._actors[number].run.remote(task, self._series[task.trait])
            self._running[ref] = _Running(task, number, time.monotonic())

    def _next(self) -> Task | None:
        """What nobody does yet: sums first, as they free the disk, and what takes longest before what is short."""
        under_way = [one.task for one in (*self._running.values(), *self._arriving)]
        for trait, gathering in self._gatherings.items():
            merging = [one.node for one in under_way if isinstance(one, Merge) and one.trait == trait]
            for node in gathering.merges(merging):
                return Merge(trait, node, {child: gathering.held[child] for child in node.children})
        for match in self._matches:
            if match not in under_way:
                return match
        for trait, gathering in self._gatherings.items():
            asking = {one.index for one in under_way if isinstance(one, Ask) and one.trait == trait}
            index = gathering.next(asking, _AHEAD * max(len(self._actors), 1))
            if index is not None:
                return Ask(trait, index)
        return None

    def _slowest(self) -> Task | None:
        """What has been under way for longest, if that is far longer than usual: its worker may be slow, or gone."""
        now, copies = time.monotonic(), Counter(one.task for one in self._running.values())
        latest = {one.task: one.started for one in self._running.values()}  # in the order in which they were begun
        late = [
            (now - started, task)
            for task, started in latest.items()
            if self._open(task) and now - started > self._usual(task) * _PATIENT ** (copies[task] - 1)
        ]
        if not late:
            return None
        self.log.repeated += 1
        return max(late, key=lambda one: one[0])[1]

    def _usual(self, task: Task) -> float:
        seconds = self._seconds[type(task)]
        return _SLOW * median(seconds) if seconds else _UNKNOWN

    def _open(self, task: Task) -> bool:
        """Whether a task is still to be done."""
        if isinstance(task, Match):
            return task in self._matches
        gathering = self._gatherings[task.trait]
        if gathering.complete:
            return False
        return task.node not in gathering.held if isinstance(task, Merge) else not gathering.has(task.index)

    def _wait(self) -> None:
        """Take what has come back, after at most ``_POLL`` seconds."""
        self._pulse.check()
        self._tell_of_waiting()
        for number in [number for number, until in self._away.items() if time.monotonic() >= until]:
            del self._away[number]
            self._greet(number)
        refs = [*self._running, *self._greeting]
        if not refs and self._away:
            time.sleep(_POLL)
            return
        if not refs:
            raise ClusterError("every worker died and did not come back; ray's logs in /tmp/ray say why")
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=_POLL)
        for ref in ready:
            if ref in self._greeting:
                self._greeted(ref, self._greeting.pop(ref))
            else:
                self._take(ref, self._running.pop(ref))

    def _tell_of_waiting(self) -> None:
        if self._running or self._idle:
            self._alone = None
            return
        now = time.monotonic()
        self._alone = self._alone or now
        if now - self._alone > _PATIENCE and not self._told:
            self._progress.note("waiting for Ray to place a worker (ray status says what it is short of)")
            self._told = True

    def _greeted(self, ref: Any, number: int) -> None:
        exceptions = self._ray.exceptions
        try:
            said = _unless_fault(self._ray.get(ref))
        except exceptions.RayTaskError as error:
            raise ClusterError(f"a worker cannot begin ({_reason(error)})") from error
        except exceptions.RayError as error:
            self._silent[number] += 1
            if self._gone(error) or self._silent[number] >= _SILENT:
                self._lose(number, error)
            else:
                self._away[number] = time.monotonic() + _POLL
            return
        self._silent[number] = 0
        if self._hello is None:
            self._hello = said
        if (said.dtype, said.device) != (self._hello.dtype, self._hello.device):
            raise ClusterError(
                f"the worker {self._hello.process} computes in {self._hello.dtype} on {self._hello.device} and "
                f"{said.process} in {said.dtype} on {said.device}, which would not give one result; set --dtype and "
                "--device, or --weights for llama.cpp"
            )
        self._meet(number, said.process)
        self._idle.append(number)

    def _gone(self, error: Exception) -> bool:
        """Whether Ray will not start a worker again."""
        exceptions = self._ray.exceptions
        lasting = (exceptions.RayActorError, exceptions.ActorUnschedulableError)
        return isinstance(error, lasting) and not isinstance(error, exceptions.ActorUnavailableError)

    def _greet(self, number: int) -> None:
        """Ask a worker to say when it is there."""
        self._greeting[self._actors[number].hello.remote()] = number

    def _take(self, ref: Any, run: _Running) -> None:
        exceptions = self._ray.exceptions
        try:
            outcome = self._ray.get(ref)
        except exceptions.RayTaskError as error:
            self._broken(run, error)
            return
        except exceptions.RayError as error:
            self._failed(run, error)
            if self._gone(error):
                self._lose(run.actor, error)
            else:  # it is being started again, or its answer was lost on its way
                self._greet(run.actor)
            return
        self._idle.append(run.actor)
        self._arriving = [run]
        self._hand_out()  # the worker goes on while we look at what it brought
        self._arriving = []
        if not self._open(run.task):  # done by another one meanwhile, or no longer needed
            if isinstance(run.task, Ask) and isinstance(outcome, Outcome):
                self._gatherings[run.task.trait].late(run.task.index, outcome.name)
            return
        if isinstance(run.task, Merge) and isinstance(outcome, Fault) and outcome.kind == ProfileError.__name__:
            self._merge(run.task)  # it may not have seen what others wrote a moment ago
            return
        outcome = _unless_fault(outcome)
        self._meet(run.actor, outcome.process)
        self._done(run, outcome)

    def _done(self, run: _Running, outcome: Outcome) -> None:
        task, elapsed = run.task, time.monotonic() - run.started
        self._seconds[type(task)].append(elapsed)
        if isinstance(task, Match):
            if outcome.data is not None:
                keep_constant(task.path, outcome.data)
            self._matches.remove(task)
            self._progress.advance(1)
            return
        gathering = self._gatherings[task.trait]
        if isinstance(task, Merge):
            if outcome.data is not None:  # it cannot see the files
                self._merge(task)
            else:
                gathering.merged(task.node, outcome.name)
                self.log.merged += 1
            return
        self.log.asked.append(
            Asked(task.trait, task.index, run.actor, outcome.tokens, outcome.computing, run.started + elapsed)
        )
        gathering.answered(task.index, outcome)
        self._progress.advance(len(gathering.series.batch(task.index)), outcome.tokens)

    def _merge(self, task: Merge) -> None:
        """Sum shards here."""
        gathering = self._gatherings[task.trait]
        try:
            gathering.merge(task.node)
        except ProfileError:
            gathering.damaged()
            return
        self.log.merged += 1

    def _meet(self, number: int, process: str) -> None:
        if self._process.setdefault(number, process) != process:
            self._progress.note(f"the worker {self._process[number]} died; Ray started it again as {process}")
            self._process[number] = process
            self.log.restarted += 1

    def _broken(self, run: _Running, error: Exception) -> None:
        """A task raised what nobody expects. Once, that is its worker's: a GPU that fails.

        Raises:
            ClusterError: the same task did so before.
        """
        self._mistakes[run.task] += 1
        if self._mistakes[run.task] >= _MISTAKES:
            raise ClusterError(
                f"the same task fails in every worker ({_reason(error)}); ray's logs in /tmp/ray say where"
            ) from error
        self._progress.note(
            f"the worker {self._process[run.actor]} fails ({_reason(error)}); it is started again, and the task given "
            "out anew"
        )
        self._ray.kill(self._actors[run.actor], no_restart=False)
        self._greet(run.actor)

    def _failed(self, run: _Running, error: Exception) -> None:
        self._failures[run.task] += 1
        if self._failures[run.task] >= _FAILURES and self._open(run.task):
            raise ClusterError(f"workers die at the same task time and again; the last reason: {_reason(error)}")

    def _lose(self, number: int, error: Exception) -> None:
        """Go on without a worker that Ray gave up."""
        del self._actors[number]
        self.log.lost += 1
        if not self._actors:
            raise ClusterError(f"every worker died and did not come back; the last reason: {_reason(error)}")
        self._progress.note(f"going on without the worker {self._process.get(number, number)}: {_reason(error)}")


def _unless_fault(said: Any) -> Any:
    """What a worker returned, unless that is an error on purpose, which is raised.

    Raises:
        NptiError: the worker's own.
        MemoryError: it has too little.
    """
    if not isinstance(said, Fault):
        return said
    if said.kind == MemoryError.__name__:
        raise MemoryError(said.text)
    kind: type[NptiError] = getattr(errors, said.kind)
    raise kind(said.text)


def _reason(error: Exception) -> str:
    """The last line of what Ray says, which is the cause, or the first where it is a list of facts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)
