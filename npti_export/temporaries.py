"""Temporary places: locked as long as their job lives, swept by the next job if it was killed.

They lie beside an output, or in the system's folder for such.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from npti_export.placing import RESERVED, drop_reserved, holds_old, take_back

if sys.platform != "win32":
    import fcntl

PARTIAL, BASE, REPLACED = ".partial", ".base.partial", ".replaced"
_FOLDERS, _LOCK = "npti-", "npti.lock"  # in the system's folder; a folder without such a lock is not ours
_RANDOM = "?" * 8  # characters that tempfile puts into a name


@dataclass(frozen=True)
class Temporary:
    """A file or folder that is being made.

    Attributes:
        path: of it.
        handle: open and locked, by which others see that its job lives; None where there are no such locks.
    """

    path: Path
    handle: int | None

    def remove(self) -> None:
        """Remove it, if it is still there, and give up the lock; if something has to come out of it, a sweep will."""
        if not holds_old(self.path):
            _remove(self.path)
        if self.handle is not None:
            os.close(self.handle)


class TemporaryFolder:
    """A new folder in the system's place for them, removed at the end of a block, or when this object goes.

    Those that killed processes left there are removed first. They may hold gigabytes.

    Attributes:
        path: of the folder.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        sweep_folders()
        made = _new_folder()
        self._end = weakref.finalize(self, made.remove)
        self.path = made.path / "files"
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove it, if it is still there."""
        self._end()


def _new_folder() -> Temporary:
    while True:
        place = Path(tempfile.mkdtemp(prefix=_FOLDERS))
        lock = place / _LOCK
        lock.touch()
        handle = locked(lock, wait=True)
        # another process's sweep may have taken it for a leftover before it was locked
        if lock.is_file() if handle is None else _is(lock, handle):
            return Temporary(place, handle)
        if handle is not None:
            os.close(handle)


def sweep_folders() -> None:
    """Remove the folders of this user's killed processes. The lock is the folder's own, as anybody may name one so."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for place in sorted(Path(tempfile.gettempdir()).glob(f"{_FOLDERS}{_RANDOM}")):
            if place.is_symlink() or place.stat().st_uid != os.geteuid() or not (place / _LOCK).is_file():
                continue
            handle = locked(place / _LOCK, wait=False)
            if handle is not None:
                _remove(place)
                os.close(handle)


def temporary_beside(path: Path, *, folder: bool, suffix: str = PARTIAL) -> Temporary:
    """A new file or folder beside ``path``, of a hidden name; what killed jobs left there for ``path`` is removed.

    Raises:
        OSError: it cannot be made.
    """
    sweep(path)
    while True:
        place = _made(path, folder=folder, suffix=suffix)
        handle = locked(place, wait=True)
        # another job's sweep may have taken it for a leftover before it was locked
        if os.path.lexists(place) if handle is None else _is(place, handle):
            return Temporary(place, handle)
        if handle is not None:
            os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed jobs left beside ``path``.

    Where one was killed between taking an old directory away and putting the new one in its place, the old one comes
    back, and so do files, see :func:`npti_export.placing.take_back`. What a living job is making is locked and stays.
    Nothing is removed on systems without such locks.
    """
    if sys.platform == "win32":
        return
    with suppress(OSError):
        found = _leftovers(path)
        for left in found[PARTIAL] + found[BASE]:
            handle = locked(left, wait=False)
            if handle is not None:
                with _held(handle):
                    take_back(left)
                    drop_reserved(left.with_name(left.name + RESERVED), left.parent)
                    _put_back(left.with_suffix(REPLACED), path)
                    _remove(left)
        for note in found[PARTIAL + RESERVED]:
            if not note.with_suffix("").exists():  # it has its name, and the note went too late
                note.unlink(missing_ok=True)
        for old in found[REPLACED]:
            if not old.with_suffix(PARTIAL).exists():  # else it is of a living job
                _put_back(old, path)


def sweep_folder(folder: Path) -> None:
    """Remove what killed jobs left half-written in a folder of ours."""
    with suppress(OSError):
        for left in sorted(folder.glob(f".*.{_RANDOM}{PARTIAL}")):
            handle = locked(left, wait=False)
            if handle is not None:
                with _held(handle):
                    _remove(left)


def _leftovers(path: Path) -> dict[str, list[Path]]:
    """What lies beside ``path`` for it, by suffix; the folder is read once, as it may be large."""
    prefix = _prefix(path)
    found: dict[str, list[Path]] = {suffix: [] for suffix in (PARTIAL, BASE, PARTIAL + RESERVED, REPLACED)}
    for place in sorted(path.absolute().parent.glob(f"{glob.escape(prefix)}{_RANDOM}.*")):
        found.get(place.name[len(prefix) + len(_RANDOM) :], []).append(place)
    return found


def _put_back(old: Path, path: Path) -> None:
    if old.is_dir():
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}."


def _made(path: Path, *, folder: bool, suffix: str) -> Path:
    parent = path.absolute().parent
    if folder:
        return Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=suffix, dir=parent))
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=suffix, dir=parent)
    os.close(handle)
    return Path(name)


def locked(place: Path, *, wait: bool) -> int | None:
    """A handle that holds the lock of a file or folder, or None where it is another's, gone, or cannot be had."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another's, or a file system without locks
        os.close(handle)
        return None
    return handle


@contextmanager
def _held(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


def _is(place: Path, handle: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(place.stat(), os.fstat(handle))
    return False


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
