"""Finished shards on disk: how they are merged, and with checksums, see :mod:`npti_export.checked`; what does not fit
is not believed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from npti_export.errors import ProfileError
from npti_export.files import atomic_output
from npti_export.stats import ContrastStats, encode_stats, load_stats

FAN = 8  # so many shards, or sums of shards, are merged into one
_NAME = re.compile(r"(\d+)-(\d+)\.([0-9a-f]{64})\.safetensors")


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
    """A folder of shards. Two files of one shard, which two workers may have written, are as good as one; where they
    differ, so do their names, which hold a SHA-256.

    Args:
        folder: need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
            stats = self.sound(node, note)
            if stats is not None:
                return node, stats
        return None

    def sound(self, node: Node, note: Callable[[str], None]) -> ContrastStats | None:
        """A shard; where it is damaged it is removed, with a note, and nothing is there any more."""
        try:
            return self.read(node)
        except ProfileError:
            note(f"{self.folder}: shard {node.first} is damaged, asking its questions again")
            self.discard(node)
            return None

    def forget(self, before: int) -> None:
        """Remove what begins before a batch: it is in other statistics already."""
        for node in self.found():
            if node.first < before:
                self.discard(node)
        self.close()

    def write(self, node: Node, data: bytes) -> None:
        """Keep a shard, atomically.

        Raises:
            OutputError: the folder is missing or cannot be written, or the disk is full.
        """
        name = f"{node.level}-{node.index}.{hashlib.sha256(data).hexdigest()}.safetensors"
        with atomic_output(self.folder / name, force=True) as temporary:
            temporary.write_bytes(data)

    def read(self, node: Node) -> ContrastStats:
        """A shard.

        Raises:
            ProfileError: it is missing, or not what was written.
        """
        paths = self._paths(node)
        if not paths:
            raise ProfileError(f"{self.folder}: shard {node.level}-{node.index} is missing; run the command again")
        for path in paths:
            with suppress(ProfileError):
                return load_stats(path)[0]
        raise ProfileError(f"{paths[0]}: damaged, its checksum is another; delete the file and run the command again")

    def discard(self, node: Node) -> None:
        """Remove a shard."""
        for path in self._paths(node):
            path.unlink(missing_ok=True)

    def merge(self, node: Node) -> None:
        """Put the sum of a node's children into their place.

        Raises:
            ProfileError: one of them is missing or damaged.
            OutputError: see :meth:`write`.
        """
        self.write(node, encode_stats(self.total(node), {}))
        for child in node.children:
            self.discard(child)

    def total(self, node: Node) -> ContrastStats:
        """A node's statistics: its file, or the sum of what it is made of, in order.

        Raises:
            ProfileError: a file is missing or damaged.
        """
        if node.level == 0 or self._paths(node):
            return self.read(node)
        first, *others = node.children
        stats = self.total(first)
        for child in others:
            stats = stats.absorb(self.total(child))
        return stats

    def close(self) -> None:
        """Remove the folder if nothing is left in it."""
        with suppress(OSError):
            self.folder.rmdir()

    def _paths(self, node: Node) -> list[Path]:
        return sorted(self.folder.glob(f"{node.level}-{node.index}.*.safetensors"))
