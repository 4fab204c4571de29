"""What is to be done, as plain data: the shards of each trait, and what a worker needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from npti_export.identify.batches import Batches
from npti_export.identify.collect import shards_beside
from npti_export.identify.shards import Node
from npti_export.loader import RuntimeSettings
from npti_export.models import ModelSource
from npti_export.recipe import Recipe
from npti_export.stats import ContrastStats
from npti_export.traits import Sign


@dataclass(frozen=True)
class Distribution:
    """How identification is spread.

    Attributes:
        workers: None takes one a GPU where the model runs on these, else one a node and four cores.
        address: of a cluster, as Ray writes it; None takes RAY_ADDRESS, or else starts one of this machine for the job.
        gpus: of each worker where the model runs on these; over several it is spread. None takes one, or all of a node
            (all nodes must have as many) where the model is to be spread anyway.
    """

    workers: int | None = None
    address: str | None = None
    gpus: int | None = None


@dataclass(frozen=True)
class Series(Batches):
    """The batches of a trait, and where they are kept.

    Attributes:
        state: file of the merged statistics, the one that a single process goes on from.
    """

    state: Path

    @property
    def shards(self) -> Path:
        """Folder of what is not merged into ``state`` yet."""
        return shards_beside(self.state)


@dataclass(frozen=True)
class Ask:
    """Ask a batch of a trait's questions of both poles."""

    trait: str
    index: int


@dataclass(frozen=True)
class Merge:
    """Sum the children of a node, whose files are there.

    Attributes:
        names: of these files.
    """

    trait: str
    node: Node
    names: Mapping[Node, str] = field(compare=False)


@dataclass(frozen=True)
class Match:
    """Find the constant of one pole, see :mod:`npti_export.identify.matched`, by a recipe, for a file."""

    trait: str
    sign: Sign
    recipe: Recipe = field(compare=False)
    path: Path = field(compare=False)


Task = Ask | Merge | Match


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know.

    Attributes:
        source: the model.
        digest: of its files.
        model: what the user called it; where it is looked for on machines that lack the file.
        settings: of the runtime, with the threads of one worker.
        sequences: most that are decoded together.
        mark: a file in the cache folder that says, where a worker sees it, that it shares the folder.
        copies: see :class:`npti_export.loader.Models`.
        host: name of the machine that the job was started on.
        version: of this package there.
    """

    source: ModelSource
    digest: str
    model: str | None
    settings: RuntimeSettings
    sequences: int
    mark: Path
    copies: Path
    host: str
    version: str


@dataclass(frozen=True)
class Fault:
    """An error on purpose, on its way from a worker.

    Attributes:
        kind: the class's name.
        text: its sentence.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What a worker did.

    Attributes:
        process: which one it was, ``host:pid``.
        computing: seconds in which the model answered.
        seconds: of the whole task, as the worker saw it.
        stats: without histograms; None for a constant.
        name: of the file that it wrote, of a batch or a sum.
        data: the file to write, where the worker does not share the folder; empty for a sum that it cannot make.
        tokens: that were counted.
    """

    process: str
    computing: float = 0.0
    seconds: float = 0.0
    stats: ContrastStats | None = None
    name: str = ""
    data: bytes | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself.

    Attributes:
        process: ``host:pid``.
        dtype: see :meth:`npti_export.loader.Models.dtype`.
        device: likewise.
    """

    process: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Asked:
    """A batch that was answered.

    Attributes:
        trait: whose questions.
        index: of the batch.
        worker: number of the worker.
        tokens: that were counted.
        computing: seconds in which the model answered.
        arrived: when it was known here, in seconds of :func:`time.monotonic`.
    """

    trait: str
    index: int
    worker: int
    tokens: int
    computing: float
    arrived: float


@dataclass
class Log:
    """What was done, in the order in which it came back.

    Attributes:
        asked: batches.
        merged: sums of shards made.
        repeated: tasks handed out a second time because they took long.
        restarted: workers that Ray started again.
        lost: workers that stayed away.
    """

    asked: list[Asked] = field(default_factory=list)
    merged: int = 0
    repeated: int = 0
    restarted: int = 0
    lost: int = 0
