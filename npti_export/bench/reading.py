"""Text files of unknown origin, read a line at a time: encodings, line ends and lengths, and what is wrong."""

from __future__ import annotations

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from pathlib import Path

from npti_export.bench.lines import LONGEST_TEXT, Fault, encodable
from npti_export.errors import BenchError

LONGEST_LINE = 1 << 20  # characters; a line of the published layout holds a persona for every trait and pole
_KEPT = 20  # faults that are remembered; the others are only counted
_SAMPLE = 4096  # bytes


class Faults:
    """Malformed lines: counted, and the first of them kept.

    Args:
        skip: leave them out of the import instead of giving up.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.first: list[Fault] = []
        self.count = 0

    def add(self, path: Path, line: int, text: str) -> None:
        """Note one."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(Fault(path, line, text))

    def check(self) -> None:
        """Raise if there are any and they are not to be skipped.

        Raises:
            BenchError: names the first.
        """
        if self.count and not self.skip:
            more = f" (and {self.count - 1} more)" if self.count > 1 else ""
            raise BenchError(f"{self.first[0]}{more}; mend it, or pass --skip-bad to leave such lines out")


def text_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1, without their ends; too long or undecodable ones go to ``faults``.

    UTF-8, with a byte order mark or without, and UTF-16 with one; lines end in LF, CRLF or CR.

    Raises:
        BenchError: it cannot be read, or is in another encoding.
    """
    try:
        encoding = _encoding(path)
        # A byte that is not UTF-8 becomes half a surrogate pair, so that the line can be named and the next one read.
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        with path.open(encoding=encoding, errors=errors) as stream:
            number, line = 1, stream.readline(LONGEST_LINE)
            while line:
                if len(line) == LONGEST_LINE and not line.endswith("\n"):
                    faults.add(path, number, f"is longer than {LONGEST_LINE} characters")
                    while line and not line.endswith("\n"):
                        line = stream.readline(LONGEST_LINE)
                elif not encodable(line):
                    faults.add(path, number, "is not UTF-8; save the file as UTF-8")
                else:
                    yield number, line.removesuffix("\n")
                number, line = number + 1, stream.readline(LONGEST_LINE)
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: begins like UTF-16 and is not; save it as UTF-8") from error
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from error


def _encoding(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(_SAMPLE)
    if start.startswith((BOM_UTF32_LE, BOM_UTF32_BE)):
        raise BenchError(f"{path}: is UTF-32; save it as UTF-8")
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in start.removeprefix(BOM_UTF8):
        raise BenchError(f"{path}: holds zero bytes, so it is no UTF-8 text; save it as UTF-8")
    return "utf-8-sig"


def text_fault(value: object) -> str | None:
    """What keeps a value from being a text of the bench; None if nothing does."""
    if not isinstance(value, str) or not value.strip():
        return "must be a non-empty text"
    if len(value) > LONGEST_TEXT:
        return f"has {len(value)} characters; at most {LONGEST_TEXT} make sense"
    return None if encodable(value) else "holds half a surrogate pair, which no text can hold"
