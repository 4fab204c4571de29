"""Finished shards on disk: how they are merged, and with checksums, see :mod:`npti_export.checked`; what does not fit,
or is of other questions, is not believed."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from npti_export.errors import ProfileError
from npti_export.files import atomic_output, translate_os_errors
from npti_export.models import ModelShape
from npti_export.stats import ContrastStats, encode_stats, load_stats
from npti_export.temporaries import sweep_folder

FAN = 8  # so many shards, or sums of shards, are merged into one
_LATE, _POLL = 6, 0.5  # times, and seconds apart, that a file is looked for which a shared folder may show late
# Of a level with more digits, the number of batches alone would fill the memory.
_NAME = re.compile(r"([0-9]{1,2})-([0-9]{1,9})\.([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Node:
    """A place in the tree by which shards are merged: a batch (``level`` 0), or the sum of ``FAN`` nodes below it.

    The tree is fixed by the order of the questions, so what is summed with what never depends on who was first.
    """

    level: int
    index: int

    @property
    def batches(self) -> int:
        """How many it is the sum of."""
        return int(FAN**self.level)

    @property
    def first(self) -> int:
        """The first batch."""
        return self.index * self.batches

    @property
    def end(self) -> int:
        """The batch behind the last one."""
        return self.first + self.batches

    @property
    def children(self) -> tuple[Node, ...]:
        """What it is the sum of."""
        return tuple(Node(self.level - 1, self.index * FAN + at) for at in range(FAN))

    @property
    def parent(self) -> Node:
        """What it is part of."""
        return Node(self.level + 1, self.index // FAN)


def covering(first: int, end: int) -> Iterator[Node]:
    """The largest nodes that together are the batches from ``first`` to before ``end``, in order."""
    while first < end:
        level = 0
        while first % FAN ** (level + 1) == 0 and first + FAN ** (level + 1) <= end:
            level += 1
        yield Node(level, first // FAN**level)
        first += FAN**level


class Shards:
    """A folder of shards. Names hold a SHA-256, so two files of one shard, which two workers may have written, differ
    in their names where they differ. One of them is as good as the other, but who has counted one goes on with that.

    Args:
        folder: need not exist.
        shape: of the model, where it is known; what is of another is not believed.
    """

    def __init__(self, folder: Path, shape: ModelShape | None = None) -> None:
        self.folder, self._shape = folder, shape

    def found(self) -> set[Node]:
        """What is there, damaged or not."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("*.safetensors")]
        return {Node(int(name[1]), int(name[2])) for name in names if name}

    def starting(self, first: int, end: int, note: Callable[[str], None]) -> tuple[Node, ContrastStats] | None:
        """The largest sound shard that begins with batch ``first`` and ends before ``end``; damaged ones are removed.

        Args:
            first: number of a batch.
            end: number of the one behind the last that may be in it.
            note: told of damage.
        """
        nodes = [node for node in self.found() if node.first == first and node.end <= end]
        for node in sorted(nodes, key=lambda one: -one.level):
            found = self.sound(node, note)
            if found is not None:
                return node, found[1]
        return None

    def sound(self, node: Node, note: Callable[[str], None]) -> tuple[str, ContrastStats] | None:
        """A shard and its file's name; where all there is of it is damaged that is removed, with a note."""
        for path in self._paths(node):
            with suppress(ProfileError):
                return path.name, self._load(path, node)
        note(f"{self.folder}: shard {node.first} is damaged, asking its questions again")
        self.discard(node)
        return None

    def forget(self, before: int) -> None:
        """Remove what begins before a batch: it is in other statistics already."""
        for node in self.found():
            if node.first < before:
                self.discard(node)
        self.close()

    def encode(self, node: Node, stats: ContrastStats) -> bytes:
        """The file of a shard, which says of which questions it is."""
        return encode_stats(stats, self._says(node))

    def write(self, node: Node, data: bytes) -> str:
        """Keep what :meth:`encode` gave, atomically.

        Returns:
            The file's name.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        name = f"{node.level}-{node.index}.{hashlib.sha256(data).hexdigest()}.safetensors"
        self.prepare()  # another job with these questions removes it when it has them all
        with atomic_output(self.folder / name, force=True) as temporary:
            temporary.write_bytes(data)
        return name

    def prepare(self) -> None:
        """Make the folder."""
        with translate_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, node: Node, name: str) -> ContrastStats:
        """A shard by the name of its file, which a folder that several machines share shows before it lists it.

        Raises:
            ProfileError: it is missing, or not what was written.
        """
        path = self.folder / name
        for _ in range(_LATE):
            if path.is_file() or not self.folder.is_dir():
                break
            time.sleep(_POLL)
        return self._load(path, node)

    def discard(self, node: Node) -> None:
        """Remove a shard."""
        for path in self._paths(node):
            path.unlink(missing_ok=True)

    def merge(self, node: Node, names: Mapping[Node, str]) -> str:
        """Put the sum of a node's children into their place.

        Args:
            node: of which.
            names: of the children's files.

        Returns:
            The name of the sum's file.

        Raises:
            ProfileError: one of them is missing or damaged.
            OutputError: see :meth:`write`.
        """
        written = self.write(node, self.encode(node, self.total(node, names)))
        for child in node.children:
            self.discard(child)
        return written

    def total(self, node: Node, names: Mapping[Node, str]) -> ContrastStats:
        """A node's statistics: its file, or the sum of what it is made of, in order.

        Args:
            node: of which.
            names: of the files of this node, or of all that are below it.

        Raises:
            ProfileError: a file is missing or damaged.
        """
        if node in names:
            return self.read(node, names[node])
        if node.level == 0:
            raise ProfileError(f"{self.folder}: shard {node.first} is missing; run the command again")
        first, *others = node.children
        stats = self.total(first, names)
        for child in others:
            stats = stats.absorb(self.total(child, names))
        return stats

    def close(self) -> None:
        """Remove what killed workers left half-written, and the folder if nothing else is in it."""
        sweep_folder(self.folder)
        with suppress(OSError):
            self.folder.rmdir()

    def _load(self, path: Path, node: Node) -> ContrastStats:
        stats, record = load_stats(path)
        wanted, found = self._shape, stats.plus.active.shape
        if record != self._says(node) or (wanted is not None and found != (wanted.layers, wanted.width)):
            raise ProfileError(f"{path}: is not what its name says; delete the file and run the command again")
        return stats

    def _says(self, node: Node) -> dict[str, object]:
        return {"of": self.folder.stem, "level": node.level, "index": node.index}

    def _paths(self, node: Node) -> list[Path]:
        return sorted(self.folder.glob(f"{node.level}-{node.index}.*.safetensors"))
