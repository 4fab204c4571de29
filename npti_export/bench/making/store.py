"""What has been kept so far, in SQLite: made from the journal alone, in bounded memory, whole after any crash."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npti_export.bench.making.ngrams import Grams, grams, overlap
from npti_export.bench.overlap import LIMIT
from npti_export.errors import DiskFullError, OutputError, shortened

_SLOTS = 64  # texts remembered for each 3-gram; one that is in more is idiom, and tells of no copy
_LOOKED_AT = 32  # texts with most shared 3-grams whose real overlap is computed
_COMMIT_SECONDS = 0.5
_CACHE_KIB = 16 << 10
_FORMAT = 1  # of the tables
_TABLES = f"""
PRAGMA user_version={_FORMAT};
CREATE TABLE IF NOT EXISTS item (
    id INTEGER PRIMARY KEY, cell INTEGER NOT NULL, split TEXT NOT NULL, ord INTEGER NOT NULL, seed INTEGER NOT NULL,
    text TEXT NOT NULL, grams BLOB NOT NULL, sum TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS posting (
    gram INTEGER NOT NULL, slot INTEGER NOT NULL, item INTEGER NOT NULL, PRIMARY KEY (gram, slot)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejected (
    id INTEGER PRIMARY KEY, cell INTEGER NOT NULL, ord INTEGER NOT NULL, seed INTEGER NOT NULL, rule TEXT NOT NULL,
    fault TEXT NOT NULL, text TEXT NOT NULL, sum TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS taken (
    cell INTEGER NOT NULL, split TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (cell, split)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owed (cell INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


def _sum(*values: object) -> str:
    """First 64 bits of a SHA-256: SQLite has no checksums, and would give changed values back as they are."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _check(what: str, found: str | None, *values: object) -> None:
    """Raise unless values are what was written.

    Raises:
        ValueError: they are not.
    """
    if found != _sum(*values):
        raise ValueError(f"the checksum of {what} is wrong")


def _counts(text: str) -> Counter[str]:
    """Numbers by name.

    Raises:
        ValueError: something else.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or any(type(value) is not int for value in found.values()):
        raise ValueError("counts are not numbers by name")
    return Counter(found)


class Store:
    """Kept and rejected items, counts, and an index of 3-grams that finds near-duplicates.

    Changes reach the disk about twice a second; a crash goes back to the last time, and the journal knows the rest.
    What ends up in the bench, and what is asked next, is checked by sums as it is read.

    Args:
        path: of the database; made if it is not there.

    Raises:
        OutputError: it cannot be written, or is damaged.
        DiskFullError: no room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._translated():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA trusted_schema=OFF")  # of a file that somebody else made
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # consistent after a power cut, if not the newest
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._check_format()
            self._db.executescript(_TABLES)
            self._db.execute("BEGIN")
            self._count = int(self._db.execute("SELECT COALESCE(MAX(id), -1) + 1 FROM item").fetchone()[0])
            self.taken = Counter[tuple[int, str]](
                {(cell, split): count for cell, split, count in self._db.execute("SELECT * FROM taken")}
            )
            state = dict(self._db.execute("SELECT key, value FROM state"))
            if state or self.taken or self._count:
                _check("the state", state.pop("sum", None), *self._state_of(state))
            self.done = int(json.loads(state.get("done", "0")))
            self.turn = int(json.loads(state.get("turn", "0")))
            self.turn_begins = int(json.loads(state.get("turn_begins", "-1")))
            self.totals = _counts(state.get("totals", "{}"))
            self.reasons = _counts(state.get("reasons", "{}"))
            self._owed = state.get("owed", _sum())
            if sum(self.taken.values()) != self._count:
                raise ValueError("items are missing")
        self._changed: set[tuple[int, str]] = set()
        self._committed = time.monotonic()

    def _check_format(self) -> None:
        tables = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if tables and self._db.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
            raise ValueError("of another version")

    def _state_of(self, state: dict[str, str]) -> tuple[object, ...]:
        return sorted(state.items()), sorted(self.taken.items())

    def close(self) -> None:
        """What was not committed is forgotten."""
        self._db.close()

    def begin_turn(self, turn: int, owed: Sequence[tuple[int, int]]) -> None:
        """A round of orders begins: its number, and what each cell lacks."""
        self.turn, self.turn_begins = turn, self.done
        with self._translated():
            self._db.execute("DELETE FROM owed")
            self._db.executemany("INSERT INTO owed VALUES (?, ?)", owed)
        self._owed = _sum(*sorted(map(tuple, owed)))
        self.commit()

    def owed(self) -> dict[int, int]:
        """What each cell lacked when the round began."""
        with self._translated():
            found = dict(self._db.execute("SELECT cell, count FROM owed"))
            _check("what is owed", self._owed, *sorted(found.items()))
            return found

    def twin(self, found: Grams) -> int | None:
        """Number of a kept item whose 3-grams overlap by more than ``LIMIT`` of the shorter one's, or None.

        Candidates come from the index, the decision from the real overlap. The index holds every 3-gram of every
        item, but of one that is in more than 64 items only some: a copy shares rarer ones, too.
        """
        marks = ",".join("?" * len(found))
        with self._translated():
            candidates = self._db.execute(
                f"SELECT item FROM posting WHERE gram IN ({marks}) GROUP BY item ORDER BY COUNT(*) DESC, item "
                f"LIMIT {_LOOKED_AT}",
                found.tolist(),
            ).fetchall()
            for (item,) in candidates:
                (blob,) = self._db.execute("SELECT grams FROM item WHERE id = ?", (item,)).fetchone()
                if overlap(found, np.frombuffer(blob, np.int64)) > LIMIT:
                    return int(item)
        return None

    def keep(self, cell: int, split: str, order: int, seed: int, text: str, found: Grams | None = None) -> None:
        """Add an item; ``found`` are its 3-grams, where they are known already."""
        found = grams(text) if found is None else found
        number, self._count = self._count, self._count + 1
        with self._translated():
            row = (cell, split, order, seed, text)
            self._db.execute(
                "INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (number, *row, found.tobytes(), _sum(number, *row))
            )
            slot = number % _SLOTS
            self._db.executemany(
                "INSERT OR REPLACE INTO posting VALUES (?, ?, ?)", ((gram, slot, number) for gram in found.tolist())
            )
        self.taken[cell, split] += 1
        self._changed.add((cell, split))
        self.totals["kept"] += 1

    def reject(self, cell: int, order: int, seed: int, rule: str, fault: str, text: str, *, keep: bool) -> None:
        """Count a rejected item; ``keep`` it for ``rejected.jsonl``."""
        self.reasons[rule] += 1
        self.totals["rejected"] += 1
        if keep:
            with self._translated():
                row = (cell, order, seed, rule, fault, text)
                self._db.execute(
                    "INSERT INTO rejected (cell, ord, seed, rule, fault, text, sum) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, _sum(*row)),
                )

    def text(self, item: int) -> str:
        """The text of a kept item."""
        with self._translated():
            return str(self._db.execute("SELECT text FROM item WHERE id = ?", (item,)).fetchone()[0])

    def finish_order(self) -> None:
        """The next order is through; commits if it is time."""
        self.done += 1
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring everything to the disk."""
        state: dict[str, Any] = {
            "done": self.done,
            "turn": self.turn,
            "turn_begins": self.turn_begins,
            "totals": self.totals,
            "reasons": self.reasons,
        }
        kept = {key: json.dumps(value) for key, value in state.items()} | {"owed": self._owed}
        kept["sum"] = _sum(*self._state_of(kept))
        with self._translated():
            self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", kept.items())
            self._db.executemany(
                "INSERT OR REPLACE INTO taken VALUES (?, ?, ?)",
                [(cell, split, self.taken[cell, split]) for cell, split in self._changed],
            )
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")
        self._changed.clear()
        self._committed = time.monotonic()

    def items(self) -> Iterator[tuple[int, str, int, int, str]]:
        """Cell, split, order, seed and text of what was kept, in order."""
        with self._translated():
            expected = 0
            for number, *row, found in self._db.execute(
                "SELECT id, cell, split, ord, seed, text, sum FROM item ORDER BY id"
            ):
                _check(f"item {number}", found, expected, *row)
                expected += 1
                yield tuple(row)
            if expected != self._count:
                raise ValueError("items are missing")

    def rejects(self) -> Iterator[tuple[int, int, int, str, str, str]]:
        """Cell, order, seed, rule, fault and text of what was rejected, in order."""
        with self._translated():
            for *row, found in self._db.execute(
                "SELECT cell, ord, seed, rule, fault, text, sum FROM rejected ORDER BY id"
            ):
                _check("a rejected item", found, *row)
                yield tuple(row)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "disk I/O" in str(error):
                raise DiskFullError(
                    f"{self._path}: the disk is full ({error}); make room and run the command again, nothing is lost"
                ) from error
            if "decode" not in str(error):
                raise OutputError(f"{self._path}: cannot be written ({error})") from error
            raise self._damaged(error) from error
        except (sqlite3.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> OutputError:
        return OutputError(
            f"{self._path}: is damaged ({shortened(str(error), 200)}); delete it and the files {self._path.name}-* "
            "beside it: it is made again from the answers"
        )
