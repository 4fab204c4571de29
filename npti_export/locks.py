"""One at a time: a lock beside a kept file, where the file system has locks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from npti_export.files import translate_os_errors

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system without them


@contextmanager
def alone(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file, which need not exist; within the block it is known whether another held it before.

    Args:
        path: of the file; the lock is an empty one beside it, ending in ``.lock``, that stays.
        waiting: called once, where it has to be waited for.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    place = path.with_name(f".{path.name}.lock")
    with translate_os_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(place), False
    with translate_os_errors(place):
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError, too
            waited = True
            waiting()
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        yield waited
    finally:
        lock.release()
