"""Rows of XLSX sheets, of files that may be damaged or made to harm."""

from __future__ import annotations

import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from npti_export.errors import BenchError, shortened

# Ours: the largest inventory in use has some thousands of items, a file of 64 MiB a million.
_LARGEST = 64 << 20  # bytes of all parts, unpacked
_MOST_PARTS, _MOST_ROWS, _MOST_COLUMNS = 1000, 200_000, 256
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,  # of the XML
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def sheet_rows(path: Path, sheet: str | None) -> tuple[str, Iterator[list[object]]]:
    """The name of a sheet and its rows, read as they are asked for; formulas as their last values.

    Args:
        path: of an XLSX file.
        sheet: name; None takes the first.

    Raises:
        BenchError: damaged, too large, no such sheet, or openpyxl is missing; also while rows are read.
    """
    _check_parts(path)
    try:
        import openpyxl
    except ImportError as error:
        raise BenchError(
            f"{path}: reading XLSX needs openpyxl: pip install 'npti-export[bench]', or save it as CSV"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles, which nobody asked for
            book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    names = [one.title for one in book.worksheets]
    if not names or (sheet is not None and sheet not in names):
        book.close()
        wanted = f"no sheet {shortened(sheet)}; it has {shortened(', '.join(names), 200)}" if names else "no sheet"
        raise BenchError(f"{path}: has {wanted}")
    name = sheet or names[0]
    return name, _rows(path, book, name)


def _rows(path: Path, book: object, name: str) -> Iterator[list[object]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What the sheet says of its size may be false, so it is read until it ends.
            for number, row in enumerate(book[name].iter_rows(max_col=_MOST_COLUMNS, values_only=True), 1):  # type: ignore[index]
                if number > _MOST_ROWS:
                    raise BenchError(f"{path}: sheet {shortened(name)} has more than {_MOST_ROWS} rows; split it")
                yield list(row)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    finally:
        book.close()  # type: ignore[attr-defined]


def _check_parts(path: Path) -> None:
    """A small file may unpack to a huge one, by compression or by XML entities, which XLSX does not use."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len(parts) > _MOST_PARTS or sum(part.file_size for part in parts) > _LARGEST:
                raise BenchError(
                    f"{path}: unpacks to more than {_LARGEST >> 20} MiB or {_MOST_PARTS} parts; save the sheet as CSV"
                )
            for part in parts:
                if part.filename.lower().endswith((".xml", ".rels")):
                    _check_no_entities(path, archive, part)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _check_no_entities(path: Path, archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> None:
    marks = ["<!DOCTYPE".encode(encoding) for encoding in ("ascii", "utf-16-le", "utf-16-be")]
    longest = max(map(len, marks))
    before = b""
    with archive.open(part) as stream:
        while chunk := stream.read(1 << 20):
            if any(mark in before + chunk for mark in marks):
                raise BenchError(f"{path}: {part.filename} defines XML entities, as no XLSX does; save it as CSV")
            before = chunk[-longest:]


def _damaged(path: Path, error: Exception) -> BenchError:
    if isinstance(error, OSError) and error.strerror:
        return BenchError(f"{path}: cannot be read ({error.strerror})")
    return BenchError(f"{path}: is no XLSX file, or a damaged one ({shortened(str(error), 100)}); save it as CSV")
