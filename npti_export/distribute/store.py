"""Finished shards on disk, with checksums, see :mod:`npti_export.checked`; what does not fit is not believed."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from npti_export.distribute.plan import Node
from npti_export.errors import ProfileError
from npti_export.files import atomic_output
from npti_export.stats import ContrastStats, encode_stats, load_stats

# Of a level with more digits, the number of batches alone would fill the memory.
_NAME = re.compile(r"([0-9]{1,2})-([0-9]{1,9})\.([0-9a-f]{64})\.safetensors")


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
