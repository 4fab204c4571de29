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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
        """Remove it, if it is still there, and give up the lock."""
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
        if handle is None or _is(place, handle):
            return Temporary(place, handle)
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed jobs left beside ``path``.

    Where one was killed between taking an old directory away and putting the new one in its place, the old one comes
    back; where it had published some of several files, these go. What a living job is making is locked and stays.
    Nothing is removed on systems without such locks.
    """
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for left in _leftovers(path, PARTIAL) + _leftovers(path, BASE):
            handle = locked(left, wait=False)
            if handle is not None:
                _put_back(left.with_suffix(REPLACED), path)
                _take_back(left, path)
                _remove(left)
                os.close(handle)
        for old in _leftovers(path, REPLACED):
            if not old.with_suffix(PARTIAL).exists():  # else it is of a living job
                _put_back(old, path)


def _leftovers(path: Path, suffix: str) -> list[Path]:
    return sorted(path.absolute().parent.glob(f"{glob.escape(_prefix(path))}{_RANDOM}{suffix}"))


def _put_back(old: Path, path: Path) -> None:
    if old.is_dir():
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def _take_back(left: Path, path: Path) -> None:
    """Remove what a killed job had published of files that belong together, unless ``path``, the last one, was, too.

    Such files are published as hard links of those in its folder.
    """
    if left.is_dir() and not _same(left / path.name, path):
        for file in left.iterdir():
            published = path.with_name(file.name)
            if _same(file, published):
                published.unlink()


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


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


def _is(place: Path, handle: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(place.stat(), os.fstat(handle))
    return False


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()
