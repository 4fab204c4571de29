"""Items of personality inventories: statements with the trait that they are about and how they are keyed.

Read from JSON Lines, CSV (of any usual delimiter) and XLSX, with columns found by their headers.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npti_export.bench.reading import Faults, text_fault, text_lines
from npti_export.bench.scaffold import check_own_name
from npti_export.bench.sheets import sheet_rows
from npti_export.errors import BenchError, shortened
from npti_export.traits import FACETS

JSON_LINES, TABLES, SHEETS = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".xlsx", ".xlsm")
SUFFIXES = (*JSON_LINES, *TABLES, *SHEETS)
# Headers by what they mean, likeliest first; compared without case, spaces and punctuation.
HEADERS: dict[str, tuple[str, ...]] = {
    "text": ("text", "item", "statement", "itemtext", "question"),
    "trait": ("trait", "labelocean", "domain", "factor", "dimension", "scale", "construct"),
    "keyed": ("keyed", "key", "keying", "sign", "direction", "pole", "scoring"),
    "reversed": ("reversed", "reverse", "reversescored", "reversekeyed"),
    "facet": ("facet", "subscale", "subdomain", "labelraw"),
}
_LETTERS = {name[0]: name for name in FACETS}
_BY_NAME = {"openness to experience": "openness", "extroversion": "extraversion", **{name: name for name in FACETS}}
_POSITIVE, _NEGATIVE = {"+", "plus", "positive", "high"}, {"-", "minus", "negative", "low"}
_YES, _NO = {"1", "true", "yes", "y", "r", "x", "reverse", "reversed"}, {"", "0", "false", "no", "n"}
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Row:
    """A row of a table: its line, how it is called in messages, and its values by header."""

    line: int
    values: Mapping[str, object]
    sheet: str | None = None

    def place(self, header: str) -> str:
        """How the value under a header is called in messages."""
        if self.sheet is None:
            return shortened(header)
        column, letters = list(self.values).index(header) + 1, ""
        while column:
            column, rest = divmod(column - 1, 26)
            letters = chr(ord("A") + rest) + letters
        return f"sheet {shortened(self.sheet)}, cell {letters}{self.line} ({shortened(header)})"


def inventory_items(
    path: Path, given: Mapping[str, str], sheet: str | None, faults: Faults, columns: dict[str, str]
) -> Iterator[dict[str, str]]:
    """Items of an inventory: ``{"trait", "keyed", "text"}``, and ``"facet"`` where the file says it.

    Args:
        path: of the file.
        given: headers of columns by what they mean, see :data:`HEADERS`; others are found by name.
        sheet: of an XLSX; None takes the first.
        faults: gets malformed rows.
        columns: gets the headers that are read.

    Raises:
        BenchError: not readable, or a column that is needed is not there.
    """
    if sheet is not None and path.suffix.lower() not in SHEETS:
        raise BenchError(f"{path}: has no sheets; leave --sheet out")
    for row in _rows(path, sheet, faults):
        if not columns:
            columns |= _columns(path, list(row.values), given)
        item = _item(path, row, columns, faults)
        if item is not None:
            yield item


def _rows(path: Path, sheet: str | None, faults: Faults) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_rows(path, faults)
    return _sheet_rows(path, sheet) if suffix in SHEETS else _table_rows(path, faults)


def _json_rows(path: Path, faults: Faults) -> Iterator[Row]:
    for number, line in text_lines(path, faults):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(path, number, f"not a JSON object ({error})")
            continue
        if isinstance(item, dict):
            yield Row(number, item)
        else:
            faults.add(path, number, "not a JSON object")


class _Lines:
    """Lines for the CSV reader, which remembers where the present row began."""

    def __init__(self, path: Path, faults: Faults) -> None:
        self._lines = text_lines(path, faults)
        self.first = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.first = self.first or number
            yield line + "\n"


def _table_rows(path: Path, faults: Faults) -> Iterator[Row]:
    start = next((line for _, line in text_lines(path, Faults(skip=True)) if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=start.count)
    lines = _Lines(path, faults)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    headers: list[str] = []
    while True:
        lines.first = 0
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(path, lines.first, f"the row that begins here is not well-formed CSV ({error})")
            continue
        if not any(cell.strip() for cell in row):
            continue
        if not headers:
            headers = _headers(path, row)
        elif len(row) > len(headers):
            faults.add(path, lines.first, f"has {len(row)} values, where the header has {len(headers)} columns")
        else:
            yield Row(lines.first, dict(zip(headers, [*row, *[""] * (len(headers) - len(row))], strict=True)))


def _sheet_rows(path: Path, sheet: str | None) -> Iterator[Row]:
    name, rows = sheet_rows(path, sheet)
    headers: list[str] = []
    for number, row in enumerate(rows, 1):
        cells = ["" if cell is None else cell for cell in row]
        if not any(str(cell).strip() for cell in cells):
            continue
        if headers:
            yield Row(number, dict(zip(headers, cells, strict=False)), name)
        else:
            headers = _headers(path, [str(cell) for cell in cells])


def _headers(path: Path, row: Sequence[str]) -> list[str]:
    last = max(place for place, cell in enumerate(row) if cell.strip())
    names = [cell.strip() or f"column {place}" for place, cell in enumerate(row[: last + 1], 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BenchError(f"{path}: two columns are called {shortened(twice[0])}; give each its own header")
    return names


def _columns(path: Path, headers: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Headers by what they mean."""
    plain = {re.sub(r"[\W_]+", "", header.lower()): header for header in reversed(headers)}
    found = {}
    for meaning, header in given.items():
        if header not in headers:
            there = shortened(", ".join(headers), 200)
            raise BenchError(f"{path}: --column {meaning}={header}: has no such column; it has {there}")
        found[meaning] = header
    for meaning, names in HEADERS.items():
        match = next((plain[name] for name in names if name in plain and plain[name] not in found.values()), None)
        if meaning not in found and match is not None:
            found[meaning] = match
    if "keyed" in given or ("keyed" in found and "reversed" not in given):
        found.pop("reversed", None)
    elif "reversed" in found:
        found.pop("keyed", None)
    for needed in ("text", "trait"):
        if needed not in found:
            raise BenchError(
                f"{path}: no column for {needed!r} among {shortened(', '.join(headers), 200)}; name it by --column "
                f"{needed}=HEADER"
            )
    return found


def _item(path: Path, row: Row, columns: Mapping[str, str], faults: Faults) -> dict[str, str] | None:
    def fault(meaning: str, text: str) -> None:
        faults.add(path, row.line, f"{row.place(columns[meaning])} {text}")

    values: dict[str, Any] = {meaning: row.values.get(header, "") for meaning, header in columns.items()}
    missing = next((meaning for meaning in columns if columns[meaning] not in row.values), None)
    if missing is not None and missing != "facet":
        faults.add(path, row.line, f"has no {columns[missing]!r}")
        return None
    wrong = text_fault(values["text"])
    if wrong is not None:
        fault("text", wrong)
        return None
    trait, sign = str(values["trait"]).strip(), ""
    if "keyed" not in columns and "reversed" not in columns:
        trait, sign = _signed(trait)
        if not sign:
            fault("trait", f"is {shortened(trait)}: there is no column for 'keyed', so a sign is needed, such as E+")
            return None
    else:
        meaning = "keyed" if "keyed" in columns else "reversed"
        sign = _keyed(values["keyed"]) if meaning == "keyed" else _unless_reversed(values["reversed"])
        if not sign:
            means = "+ or -, 1 or -1" if meaning == "keyed" else "true or false, 1 or 0"
            fault(meaning, f"is {shortened(values[meaning])}, must be {means}")
            return None
    try:
        name = _trait(trait)
    except BenchError as error:
        fault("trait", f"is no trait: {error}")
        return None
    item = {"trait": name, "keyed": sign, "text": " ".join(values["text"].split())}
    facet = values.get("facet", "")
    if isinstance(facet, str) and facet.strip() and text_fault(facet) is None:
        item["facet"] = " ".join(facet.split())
    return item


def _signed(trait: str) -> tuple[str, str]:
    """``E+``, ``+E`` or ``openness-`` as name and sign."""
    match = re.fullmatch(r"(?P<before>[+\-−]?)\s*(?P<name>.*?)\s*(?P<after>[+\-−]?)", trait, re.DOTALL)
    assert match is not None, "every part may be empty"
    return match["name"], (match["after"] or match["before"]).replace("−", "-")


def _keyed(value: object) -> str:
    text = re.sub(r"\s*[- ]?keyed$", "", str(value).strip().lower().replace("−", "-"))
    if text in _POSITIVE or text in _NEGATIVE:
        return "+" if text in _POSITIVE else "-"
    try:
        number = float(text)
    except ValueError:
        return ""
    return {1.0: "+", -1.0: "-"}.get(number, "")


def _unless_reversed(value: object) -> str:
    text = str(value).strip().lower().removesuffix(".0")
    return "-" if text in _YES else "+" if text in _NO else ""


def _trait(named: str) -> str:
    """The trait's name: one of the Big Five by name or first letter, or a name of its own.

    Raises:
        BenchError: it cannot be a name.
    """
    plain = " ".join(re.split(r"[\s_]+", named.strip().lower()))
    name = _LETTERS.get(plain) or _BY_NAME.get(plain)
    if name is None:
        name = plain.replace(" ", "-")
        check_own_name(name)
    return name
