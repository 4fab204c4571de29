"""What a target is, and what several of them have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from npti_export.append_only import AppendOnly
from npti_export.errors import NptiError

LAYERS, WIDTH, HIDDEN = 2, 64, 32
Prepare = Callable[[Path], list[bytes]]


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        kind: of file, by which it is mutated: a key of ``fuzz_bytes.KINDS``.
        file: name of the file that is damaged, in a folder of its own.
        prepare: puts whatever lies beside it into that folder and returns intact contents of the file.
        read: reads the file at a path; raises nothing but ``allowed``, asserts that what it accepts is whole.
        allowed: errors that it may raise.
    """

    kind: str
    file: str
    prepare: Prepare
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...] = field(default=(NptiError,))


def plain(*contents):
    """Nothing lies beside the file."""
    return lambda folder: [one if isinstance(one, bytes) else one.encode() for one in contents]


def text(parse):
    """The file is a text that is given to ``parse``."""
    return lambda path: parse(path.read_bytes().decode("utf-8", "replace"))


def journal(value):
    """Three lines as they are kept, with their checksums."""

    def made(folder):
        kept = AppendOnly(Path(folder) / "made.jsonl")
        for _ in range(3):
            kept.append(value)
        kept.close()
        data = kept.path.read_bytes()
        kept.path.unlink()
        return [data]

    return made
