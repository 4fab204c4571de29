"""Questions with a right answer, and neutral texts: the shipped sets, and files of the same make.

The schema is described in ``data/README.md``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from npti_export.bench.lines import LONGEST_TEXT, encodable
from npti_export.errors import EvaluationError, shortened

SHIPPED = ("choice", "arithmetic", "recall")
_NEUTRAL = "neutral"
_OPTION = "option"  # how the CSV columns of options begin


class Question(BaseModel):
    """A question with options, of which one is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1, max_length=LONGEST_TEXT)
    options: tuple[str, ...] = Field(min_length=2, max_length=26)
    answer: str
    passage: str | None = Field(default=None, min_length=1, max_length=LONGEST_TEXT)
    example: bool = False
    topic: str | None = None
    source: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Question:
        texts = (self.question, self.passage or "-", *self.options)
        if not all(text.strip() and len(text) <= LONGEST_TEXT and encodable(text) for text in texts):
            raise ValueError("a text is empty, too long, or holds half a surrogate pair")
        if len(set(self.options)) < len(self.options):
            raise ValueError("two of its 'options' are the same")
        if self.answer not in self.options:
            raise ValueError(f"'answer' {shortened(self.answer)} is none of its 'options'")
        return self

    @property
    def text(self) -> str:
        """What the user says: the question, behind its passage if it has one."""
        return f"{self.passage}\n\n{self.question}" if self.passage else self.question

    @property
    def right(self) -> int:
        """Index of the right option."""
        return self.options.index(self.answer)


class Passage(BaseModel):
    """A text that has nothing to do with any trait."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, max_length=LONGEST_TEXT)
    topic: str | None = None
    source: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Passage:
        if not self.text.strip() or not encodable(self.text):
            raise ValueError("'text' is empty, or holds half a surrogate pair")
        return self


@dataclass(frozen=True)
class TaskSet:
    """Questions of one kind.

    Attributes:
        name: of the set.
        source: ``npti-export`` for the shipped ones, else the file's name.
        questions: in the order of the file.
        examples: shown with their answers in front of every question, never asked.
    """

    name: str
    source: str
    questions: tuple[Question, ...] = field(repr=False)
    examples: tuple[Question, ...] = field(default=(), repr=False)


def shipped_tasks() -> list[TaskSet]:
    """The sets that come with the package: multiple choice, arithmetic, recall."""
    return [_task_set(_shipped(name), "npti-export") for name in SHIPPED]


def neutral_passages() -> tuple[Passage, ...]:
    """The neutral texts that come with the package."""
    return _read(_shipped(_NEUTRAL), Passage)


def read_tasks(path: Path) -> TaskSet:
    """Questions of a JSON Lines or CSV file (by its ending), named after it.

    Raises:
        EvaluationError: unreadable, empty or malformed; file and line are named.
    """
    return _task_set(path, path.name)


def read_passages(path: Path) -> tuple[Passage, ...]:
    """Neutral texts of a JSON Lines or CSV file.

    Raises:
        EvaluationError: unreadable, empty or malformed; file and line are named.
    """
    return _read(path, Passage)


def _task_set(path: Path, source: str) -> TaskSet:
    items = _read(path, Question)
    asked, shown = (tuple(one for one in items if one.example == flag) for flag in (False, True))
    if not asked:
        raise EvaluationError(f"{path}: holds examples only; it needs a question to ask")
    return TaskSet(path.stem, source, asked, shown)


def _shipped(name: str) -> Path:
    return Path(__file__).parent / "data" / f"{name}.jsonl"


_Item = TypeVar("_Item", Question, Passage)


def _read(path: Path, kind: type[_Item]) -> tuple[_Item, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise EvaluationError(f"{path}: cannot be read ({reason})") from error
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    items = tuple(_item(kind, path, line, row) for line, row in rows)
    if not items:
        raise EvaluationError(f"{path}: is empty; it needs one item a line")
    return items


def _item(kind: type[_Item], path: Path, line: int, row: Any) -> _Item:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{place!r} " for place in fault["loc"][:1])
        raise EvaluationError(f"{path}:{line}: {where}{fault['msg'].removeprefix('Value error, ')}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: not a JSON object ({error})") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their columns ``option1``, ``option2``, … gathered; empty cells count as absent."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            cells = {key: value for key, value in row.items() if value}
            if None in row:
                raise EvaluationError(f"{path}:{rows.line_num}: has more cells than the first line has columns")
            names = sorted(key for key in cells if re.fullmatch(rf"{_OPTION}[0-9]{{1,9}}", key))
            options = [cells.pop(name) for name in sorted(names, key=lambda name: int(name[len(_OPTION) :]))]
            yield rows.line_num, cells | ({"options": options} if options else {})
    except csv.Error as error:
        raise EvaluationError(f"{path}:{rows.line_num}: not CSV ({error})") from error
