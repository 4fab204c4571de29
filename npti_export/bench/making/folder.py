"""The folder of a build: whose plan it is, that only one process works on it, and what it ends up holding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npti_export.bench.definition import FILE_NAME
from npti_export.bench.making.plan import Plan
from npti_export.bench.making.prompts import JUDGE_VERSION, PROMPT_VERSIONS
from npti_export.errors import BenchError, OutputError, shortened
from npti_export.files import atomic_output, translate_os_errors

WORK = "work"
_PLAN, _JOURNAL, _STORE, _LOCK = "plan.json", "answers.jsonl", "index.sqlite", "lock"
_WORK_FILES = (_PLAN, _JOURNAL, _STORE, f"{_STORE}-wal", f"{_STORE}-shm", f"{_STORE}-journal")
# The trait's definition and the other file of its bench may lie here, too, so that the folder can be given to --bench.
_KNOWN = {WORK, "questions.jsonl", "personas.jsonl", "rejected.jsonl", "build.json", FILE_NAME}


class Folder:
    """Paths of a build's files.

    Args:
        root: what the user calls it.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / WORK
        self.journal, self.store = self.work / _JOURNAL, self.work / _STORE

    @contextmanager
    def opened(self, plan: Plan, *, force: bool) -> Iterator[None]:
        """Hold the folder for a plan as long as the block lasts; made if it is not there.

        Args:
            plan: what is built.
            force: forget what another plan (or this one) has left there.

        Raises:
            BenchError: the folder belongs to another plan, or another process works on it.
            OutputError: it holds other things, or cannot be written.
        """
        from filelock import FileLock, Timeout

        self._check()
        with translate_os_errors(self.root):
            self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / _LOCK)
        with translate_os_errors(self.work / _LOCK):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:  # an OSError, too
                raise BenchError(
                    f"{self.root}: another process is building there; wait for it, or choose another folder"
                ) from error
        try:
            if force:
                self._clear(f"{plan.what}.jsonl")
            self._claim(plan)
            yield
        finally:
            lock.release()

    def _check(self) -> None:
        if not self.root.name:
            raise OutputError(f"{self.root}: is no name of its own; name a folder to build in")
        with translate_os_errors(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise OutputError(f"{self.root}: is a file; name a folder to build in")
            if not self.root.absolute().parent.is_dir():
                raise OutputError(
                    f"{self.root}: the folder {self.root.absolute().parent} does not exist; create it first"
                )
            strange = sorted(
                entry.name
                for entry in (self.root.iterdir() if self.root.is_dir() else ())
                if entry.name not in _KNOWN and not entry.name.startswith(".")
            )
        if strange:
            raise OutputError(
                f"{self.root}: holds {shortened(strange[0])}, which is not of a build; choose a folder of its own"
            )

    def _clear(self, own: str) -> None:
        names = (own, "rejected.jsonl", "build.json")
        with translate_os_errors(self.root):
            for path in (*(self.work / name for name in _WORK_FILES), *(self.root / name for name in names)):
                path.unlink(missing_ok=True)

    def _claim(self, plan: Plan) -> None:
        path, now = self.work / _PLAN, identity(plan)
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any((self.work / name).exists() for name in _WORK_FILES):
                raise BenchError(f"{path}: is missing beside a build's files; pass --force to start anew") from None
            own = self.root / f"{plan.what}.jsonl"
            if own.exists():
                raise OutputError(
                    f"{own}: is there already, and not of a build; move it away, or pass --force to replace it"
                ) from None
            with atomic_output(path) as temporary:
                temporary.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        except (OSError, ValueError, RecursionError) as error:
            raise BenchError(
                f"{path}: is damaged ({shortened(str(error), 200)}); pass --force to start anew"
            ) from error
        if before != now:
            names = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
            told = "; ".join(f"{name} was {_told(before, name)}, is {_told(now, name)}" for name in names[:3])
            raise BenchError(
                f"{self.root}: was begun with another plan ({told or 'other fields'}); give the same one to go on, "
                "another folder, or --force to start anew"
            )

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """Write one of the results, replacing an earlier one."""
        with atomic_output(self.root / name, force=True) as temporary:
            yield temporary


def identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for a build to go on: the plan, and the wording of its prompts."""
    judge = {"judge_prompt": JUDGE_VERSION} if plan.judge else {}
    return {**plan.identity(), "prompt": PROMPT_VERSIONS[plan.what], **judge}


def _told(fields: Any, name: str) -> str:
    return shortened(fields.get(name) if isinstance(fields, dict) else None)
