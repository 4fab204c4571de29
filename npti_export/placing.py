"""Putting finished files under their final names: one at once, or several so that no mixture passes for a whole."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from npti_export.errors import OutputError

MARKER, _OLD, _NOTE = "npti.placed", "npti.replaced", "npti.reserved"  # in a folder of files published together
RESERVED = ".reserved"  # of the note beside a temporary file that an empty file holds its final name
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # exFAT, SMB, FUSE …
_NO_SUCH_CALL = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class _Mark:
    """By what a file is known again under its final name: links and renames change none of it."""

    name: str
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> _Mark:
        found = path.lstat()
        return cls(path.name, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_in(self, folder: Path) -> bool:
        try:
            return _Mark.of(folder / self.name) == self
        except OSError:
            return False


def place(temporary: Path, path: Path, *, force: bool) -> None:
    """Give a finished file its final name, once it is on the disk.

    Raises:
        OutputError: there is something of that name, and ``force`` is not set.
        OSError: it cannot be done.
    """
    _finish(temporary)
    _name(temporary, path, temporary.with_name(temporary.name + RESERVED), force=force)
    sync_folder(path.absolute().parent)


def place_all(folder: Path, paths: Sequence[Path], *, force: bool) -> None:
    """Give finished files their final names, which are beside the folder that they lie in.

    All are on the disk before the first of them gets its name, so that nothing but links and renames happens in
    between. A model is opened by the first of ``paths``: one that is replaced is taken away before any other, and the
    new one comes last, so at each moment there is the old model, the new one, or none. What a kill in between leaves,
    parts without a first one, and old ones in the folder, is known by a marker there: see :func:`take_back`.

    Raises:
        OutputError: there is something of such a name, and ``force`` is not set; then nothing has changed.
        OSError: it cannot be done; likewise.
    """
    first, *others = paths
    for path in paths:
        _finish(folder / path.name)
    _mark(folder, paths)
    try:
        if force:
            (folder / _OLD).mkdir()
            for path in paths:
                if os.path.lexists(path):
                    path.rename(folder / _OLD / path.name)
        for path in others:
            _name(folder / path.name, path, folder / _NOTE, force=force)
        sync_folder(folder.parent)
        _name(folder / first.name, first, folder / _NOTE, force=force)
    except BaseException:
        take_back(folder)
        raise
    sync_folder(folder.parent)
    (folder / MARKER).unlink()


def take_back(folder: Path) -> None:
    """Undo what :func:`place_all` began in a folder and did not end.

    Files beside it are removed only if they are those that were put there, by inode, size and time of change. What they
    were to replace comes back, unless somebody has put something else there meanwhile.

    Raises:
        OSError: it cannot be done.
    """
    marks, beside = _marks(folder), folder.parent
    if not marks or marks[0].is_in(beside):  # the first one comes last: all are there
        return
    for mark in marks:
        if mark.is_in(beside):
            (beside / mark.name).unlink()
    drop_reserved(folder / _NOTE, beside)
    names = [mark.name for mark in [*marks[1:], marks[0]] if os.path.lexists(folder / _OLD / mark.name)]
    if not any(os.path.lexists(beside / name) for name in names):
        for name in names:
            (folder / _OLD / name).rename(beside / name)
    sync_folder(beside)


def holds_old(folder: Path) -> bool:
    """Whether files that were to be replaced lie in a folder still, as :func:`take_back` was interrupted or failed."""
    try:
        marks = _marks(folder)
    except OSError:
        return True  # nobody knows
    if not marks or marks[0].is_in(folder.parent):
        return False
    return any(os.path.lexists(folder / _OLD / mark.name) for mark in marks)


def _mark(folder: Path, paths: Sequence[Path]) -> None:
    text = json.dumps([astuple(_Mark.of(folder / path.name)) for path in paths])
    with (folder / MARKER).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _marks(folder: Path) -> list[_Mark]:
    """What was about to be placed; nothing where the marker is missing or was not finished, for then nothing was."""
    try:
        marks = [_Mark(*entry) for entry in json.loads((folder / MARKER).read_text(encoding="utf-8"))]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return []
    return marks if all(isinstance(one.name, str) and Path(one.name).name == one.name for one in marks) else []


def _finish(temporary: Path) -> None:
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    # mkstemp makes files private; an artifact gets the mode that open() would have given it.
    temporary.chmod(0o666 & ~umask())


def _name(temporary: Path, path: Path, note: Path, *, force: bool) -> None:
    if force:
        temporary.replace(path)
        return
    try:
        if sys.platform == "win32":
            temporary.rename(path)  # which replaces nothing there
        else:
            os.link(temporary, path)  # fails where rename would silently replace
    except FileExistsError:
        raise _came_meanwhile(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_without_links(temporary, path, note)


def _came_meanwhile(path: Path) -> OutputError:
    return OutputError(f"{path}: was created by someone else meanwhile; pass --force to replace it")


def _rename_without_links(temporary: Path, path: Path, note: Path) -> None:
    """Replaces nothing either: by Linux's own call or, where there is none, over an empty file that it made itself.

    A note says so while that is there, by which the next job knows it if this one is killed: :func:`drop_reserved`.
    """
    try:
        if _renamed(temporary, path):
            return
        note.write_bytes(os.fsencode(path.name))
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        note.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _came_meanwhile(path) from None
        raise
    try:
        temporary.replace(path)
    except BaseException:
        drop_reserved(note, path.parent)
        raise
    note.unlink()


def _renamed(temporary: Path, path: Path) -> bool:
    """Rename, unless there is something of that name; False where the system or the file system cannot do that.

    Raises:
        FileExistsError: there is.
        OSError: it cannot be renamed at all.
    """
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, no_replace = ctypes.c_int(-100), ctypes.c_uint(1)  # AT_FDCWD, RENAME_NOREPLACE
    if rename(here, os.fsencode(temporary), here, os.fsencode(path), no_replace) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_CALL:
        return False
    raise OSError(code, os.strerror(code), str(path))


def drop_reserved(note: Path, folder: Path) -> None:
    """Remove the empty file in a folder that a note tells of, and the note, if there is one.

    Raises:
        OSError: it cannot be removed.
    """
    with suppress(FileNotFoundError):
        path = folder / os.fsdecode(note.read_bytes())
        found = path.lstat()
        if path.parent == folder and stat.S_ISREG(found.st_mode) and found.st_size == 0:
            path.unlink()
    note.unlink(missing_ok=True)


def umask() -> int:
    """The process's own."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with suppress(OSError):  # Windows cannot open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
