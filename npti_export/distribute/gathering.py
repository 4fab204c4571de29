"""The shards of one trait as they come in: what is asked next, when enough is asked, and the sum of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from npti_export.distribute.plan import Node, Outcome, Series, covering
from npti_export.distribute.store import Shards
from npti_export.errors import ProfileError
from npti_export.files import translate_os_errors
from npti_export.identify.collect import overlap_so_far, resume, save_state, stopped
from npti_export.models import ModelSource
from npti_export.progress import Progress, Silent
from npti_export.stats import ContrastStats


class Gathering:
    """Whether the neurons have settled is asked of the first batches without a gap, one after the other as they would
    be asked by one process, so that it ends with the same ones. Only these are merged; finished shards behind a gap,
    or behind the end, stay for a run that asks more questions.

    Args:
        series: the trait.
        source: the model.
        progress: told of damage.
    """

    def __init__(self, series: Series, source: ModelSource, progress: Progress) -> None:
        self.series, self.shards = series, Shards(series.shards)
        self._source, self._progress = source, progress
        self.finished = False
        self.found = 0
        self._read()

    def _read(self, *, again: bool = False) -> None:
        """Take stock of what is on disk; a damaged shard is removed, and so will be asked again."""
        series = self.series
        stats, self._base = resume(series.state, self._source, Silent() if again else self._progress)
        self.counts, self.prefix = stats.counts(), self._base
        self._waiting: dict[int, tuple[int, ContrastStats]] = {}  # by first batch: the end, and what was counted
        self.held: set[Node] = set()
        end = self._base
        for node in sorted(self.shards.found(), key=lambda one: (one.first, -one.level)):
            if node.first < end or node.end > series.batches:  # it is in something else already
                self.shards.discard(node)
                continue
            try:
                more = self.shards.read(node).counts()
                if more.plus.active.shape != stats.plus.active.shape:
                    raise ProfileError("of another model")
                self._waiting[node.first] = node.end, more
            except ProfileError:
                self._progress.note(f"{self.shards.folder}: shard {node.first} is damaged, asking its questions again")
                self.shards.discard(node)
                continue
            self.held.add(node)
            end = node.end
        self.found = sum(node.end - node.first for node in self.held)
        self._advance(first=True)

    def _advance(self, *, first: bool = False) -> None:
        series, goal = self.series, self.series.recipe.identify.overlap
        total = len(series.questions)
        if first:
            self.overlap = overlap_so_far(self.counts, series.recipe, series.asked(self.prefix), total)
        while self.overlap < goal and self.prefix in self._waiting:
            self.prefix, more = self._waiting.pop(self.prefix)
            self.counts += more
            self.overlap = overlap_so_far(self.counts, series.recipe, series.asked(self.prefix), total)

    @property
    def complete(self) -> bool:
        """Whether enough is asked."""
        return self.overlap >= self.series.recipe.identify.overlap

    @property
    def asked(self) -> int:
        """Questions that are answered."""
        series = self.series
        behind = (series.asked(end) - series.asked(first) for first, (end, _) in self._waiting.items())
        return series.asked(self.prefix) + sum(behind)

    def prepare(self) -> None:
        """Make the folder that shards go to."""
        with translate_os_errors(self.shards.folder):
            self.shards.folder.mkdir(parents=True, exist_ok=True)

    def has(self, index: int) -> bool:
        """Whether a batch is answered."""
        return index < self.prefix or any(index in range(at, end) for at, (end, _) in self._waiting.items())

    def next(self, asking: Collection[int], ahead: int) -> int | None:
        """The next batch to ask, of those that nobody is ``asking``; None if there is none.

        At most ``ahead`` batches behind the first gap: one that hangs must not have all others asked, nor their counts
        held here, before it is asked again.
        """
        if self.complete:
            return None
        end = min(self.series.batches, self.prefix + ahead)
        left = (at for at in range(self.prefix, end) if at not in asking and not self.has(at))
        return next(left, None)

    def answered(self, index: int, outcome: Outcome) -> None:
        """Take a batch's answers, which the worker has written where it sends no ``data``."""
        assert outcome.stats is not None
        node = Node(0, index)
        if outcome.data is not None:
            self.shards.write(node, outcome.data)
        self.held.add(node)
        self._waiting[index] = index + 1, outcome.stats
        self._advance()

    def merges(self, merging: Collection[Node]) -> Iterator[Node]:
        """Nodes whose children can be summed now, of those that nobody is ``merging``."""
        if self.complete:
            return
        for parent in {node.parent for node in self.held}:
            inside = self._base <= parent.first and parent.end <= self.prefix
            if inside and parent not in merging and self.held.issuperset(parent.children):
                yield parent

    def merged(self, node: Node) -> None:
        """Take note of a sum that is on disk."""
        self.held.difference_update(node.children)
        self.held.add(node)

    def damaged(self) -> None:
        """Take stock again, after something on disk turned out to be damaged, missing or another one."""
        self._read(again=True)

    def finish(self) -> None:
        """Merge what was asked into the state that a single process goes on from.

        Sums are taken along one fixed tree, whatever was summed by workers on the way: the same answers give the same
        bytes.
        """
        assert self.complete
        if self.prefix > self._base:
            stats, done = resume(self.series.state, self._source, Silent())
            if done != self._base:  # another job went on with it meanwhile, or it was damaged
                self.damaged()
                return
            try:
                for node in covering(self._base, self.prefix):
                    stats = stats.absorb(self.shards.total(node))
            except ProfileError:
                self.damaged()
                return
            save_state(self.series.state, stats, self.prefix)
            for node in [node for node in self.held if node.end <= self.prefix]:
                self.shards.discard(node)
                self.held.discard(node)
        self.shards.close()
        self.finished = True
        asked, total = self.series.asked(self.prefix), len(self.series.questions)
        if asked < total:
            self._progress.note(stopped(asked, total, self.overlap))
