"""The shards of one trait as they come in: what is asked next, when enough is asked, and the sum of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from npti_export.distribute.plan import Outcome, Series
from npti_export.errors import ClusterError, ProfileError
from npti_export.identify.collect import overlap_so_far, resume, save_state, stopped
from npti_export.identify.shards import Node, Shards, covering
from npti_export.models import ModelSource
from npti_export.progress import Progress, Silent
from npti_export.stats import ContrastStats

_DAMAGES = 20  # times that a trait's shards may turn out to be damaged or missing


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
        self.series, self.shards = series, Shards(series.shards, source.shape)
        self._source, self._progress = source, progress
        self.finished = False
        self.found = 0
        self._damages = 0
        self._read()

    def _read(self, *, again: bool = False) -> None:
        """Take stock of what is on disk; a damaged shard is removed, and so will be asked again."""
        series = self.series
        stats, self._base = resume(series.state, self._source, Silent() if again else self._progress)
        self.counts, self.prefix = stats.counts(), self._base
        self._waiting: dict[int, tuple[int, ContrastStats]] = {}  # by first batch: the end, and what was counted
        self.held: dict[Node, str] = {}  # what is on disk, and in which file
        end = self._base
        for node in sorted(self.shards.found(), key=lambda one: (one.first, -one.level)):
            if node.first < end or node.end > series.batches:  # it is in something else already
                self.shards.discard(node)
                continue
            found = self.shards.sound(node, self._progress.note)
            if found is not None:
                name, stats = found
                self._waiting[node.first] = node.end, stats.counts()
                self.held[node] = name
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
        self.held[node] = outcome.name if outcome.data is None else self.shards.write(node, outcome.data)
        self._waiting[index] = index + 1, outcome.stats
        self._advance()

    def merges(self, merging: Collection[Node]) -> Iterator[Node]:
        """Nodes whose children can be summed now, of those that nobody is ``merging``."""
        if self.complete:
            return
        for parent in {node.parent for node in self.held}:
            inside = self._base <= parent.first and parent.end <= self.prefix
            if inside and parent not in merging and self.held.keys() >= set(parent.children):
                yield parent

    def merge(self, node: Node) -> None:
        """Sum a node's children here.

        Raises:
            ProfileError: one of them is missing or damaged.
        """
        self.merged(node, self.shards.merge(node, self.held))

    def merged(self, node: Node, name: str) -> None:
        """Take note of a sum that is on disk."""
        for child in node.children:
            self.held.pop(child, None)
        self.held[node] = name

    def late(self, index: int, name: str) -> None:
        """Remove the file of a batch that another worker had answered before; the two may differ in the last digits."""
        if name and name != self.held.get(Node(0, index)):
            (self.shards.folder / name).unlink(missing_ok=True)

    def damaged(self) -> None:
        """Take stock again, after something on disk turned out to be damaged, missing or another one.

        Raises:
            ClusterError: that happens time and again.
        """
        self._damages += 1
        if self._damages > _DAMAGES:
            raise ClusterError(
                f"{self.shards.folder}: what was written there is damaged or missing time and again; look after the "
                "disk, or set NPTI_CACHE to a folder on another one"
            )
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
                    stats = stats.absorb(self.shards.total(node, self.held))
            except ProfileError:
                self.damaged()
                return
            if not save_state(self.series.state, stats, self.prefix):
                self.damaged()
                return
            for node in [node for node in self.held if node.end <= self.prefix]:
                self.shards.discard(node)
                del self.held[node]
        self.shards.close()
        self.finished = True
        asked, total = self.series.asked(self.prefix), len(self.series.questions)
        if asked < total:
            self._progress.note(stopped(asked, total, self.overlap))
