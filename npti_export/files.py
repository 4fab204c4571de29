"""Writing files so that they are either whole or absent."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from npti_export.errors import DiskFullError, OutputError
from npti_export.temporaries import REPLACED, sweep, temporary_beside

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH_CHUNK = 1 << 22
_SAMPLES, _SAMPLE = 64, 1 << 16  # pieces of a file, and bytes of each
# What lies beside the weights of a model and belongs to it.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# What an adapter or a steered checkpoint consists of.
_OURS = (
    "adapter_config.json", "adapter_model.safetensors", "npti.json", "README.md", "config.json", "model*.safetensors",
    "model.safetensors.index.json", *COMPANIONS,
)  # fmt: skip
# What a dial consists of; its index says that it is one.
DIAL_INDEX, DIAL_KEY = "index.json", "npti_dial"
_DIAL = (DIAL_INDEX, "README.md", "base*.gguf", "*.shift.gguf", "*.clamp.gguf", "*.overlap.gguf")


def check_writable(path: Path, *, force: bool, need_bytes: int = 0) -> None:
    """Raise before any work is done if ``path`` could not be written at the end of it.

    Raises:
        OutputError: the path exists and ``force`` is not set, is a directory, or its folder is missing
            or not writable.
        DiskFullError: the volume has less than ``need_bytes`` bytes free.
    """
    if len(os.fsencode(path.name)) > 255:
        raise OutputError(f"{path.name[:40]}…: the name is longer than 255 bytes; choose a shorter one")
    with translate_os_errors(path):
        path.exists()
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; give the name of a file to write")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; pass --force to replace it, or choose another name")
    check_place(path, need_bytes)


def check_place(path: Path, need_bytes: int) -> None:
    """Raise unless the folder that ``path`` goes to is there, writable and has ``need_bytes`` bytes of room.

    Raises:
        OutputError: no name, no such folder, or one that is not writable.
        DiskFullError: the volume has less room.
    """
    if not path.name or path.name == "..":
        raise OutputError(f"{path}: is no name of its own; name what to write")
    with translate_os_errors(path):
        parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{path}: the folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: the folder {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise DiskFullError(
            f"{path}: needs {need_bytes / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free in {parent}; "
            "make room or choose another folder"
        )


def check_files_writable(paths: Sequence[Path], *, force: bool, need_bytes: int = 0) -> None:
    """The same for files that belong together; what a killed job had published of them is taken back first."""
    sweep(paths[0])
    for path in paths:
        check_writable(path, force=force, need_bytes=need_bytes)


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; publish it on success, remove it on any failure.

    A job that is killed leaves the temporary file, which the next one for ``path`` removes.
    The temporary file is fsynced, then renamed over ``path``; without ``force`` an existing ``path`` is
    refused both before and after the work, so that two jobs cannot overwrite each other's result.
    A caller may move the temporary file elsewhere (a rejected artifact): then nothing is published.

    Raises:
        OutputError: see :func:`check_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_writable(path, force=force)
    with translate_os_errors(path):
        temporary = temporary_beside(path, folder=False)
    try:
        with translate_os_errors(path):
            yield temporary.path
            if temporary.path.exists():
                _settle(temporary.path)
                _publish(temporary.path, path, force=force)
    finally:
        temporary.remove()


@contextmanager
def atomic_files(paths: Sequence[Path], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``paths``; publish files of their names from it on success, none on any failure.

    For files that belong together and are opened by the first one's name: that one is published last, and one that it
    replaces is removed before any other, so that old and new ones never pass for one whole. All are on the disk before
    the first is published, and what a job published that was killed before the last is taken back by the next one.
    A caller may move the temporary folder elsewhere: then nothing is published.

    Raises:
        OutputError: see :func:`check_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_files_writable(paths, force=force)
    first, *others = paths
    with translate_os_errors(first):
        temporary = temporary_beside(first, folder=True)
    folder = temporary.path
    published: list[Path] = []
    try:
        with translate_os_errors(first):
            yield folder
            if folder.exists():
                for path in paths:
                    _settle(folder / path.name)
                if force:
                    first.unlink(missing_ok=True)
                for path in [*others, first]:
                    _publish(folder / path.name, path, force=force)
                    published.append(path)
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        raise
    finally:
        temporary.remove()


def set_aside(temporary: Path, out: Path) -> Path:
    """Keep an artifact that was not delivered, under a name that is free."""
    names = itertools.chain(
        [f"{out.name}.rejected"], (f"{out.name}.rejected-{number}" for number in itertools.count(2))
    )
    aside = next(path for name in names if not (path := out.with_name(name)).exists())
    temporary.rename(aside)
    return aside


def is_ours(directory: Path) -> bool:
    """Whether a directory is an adapter, a steered checkpoint or a dial of ours and nothing else.

    That is what --force may replace.
    """
    if (directory / DIAL_INDEX).is_file():
        return _consists_of(directory, _DIAL) and _mentions(directory / DIAL_INDEX, f'"{DIAL_KEY}"')
    if not _consists_of(directory, _OURS):
        return False
    return (directory / "npti.json").is_file() or _mentions(directory / "adapter_config.json", '"NPTI"')


def _consists_of(directory: Path, names: Sequence[str]) -> bool:
    return all(entry.is_file() and any(entry.match(name) for name in names) for entry in directory.iterdir())


def _mentions(path: Path, text: str) -> bool:
    try:
        return text in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def check_directory_writable(
    path: Path, *, force: bool, need_bytes: int = 0, ours: Callable[[Path], bool] = is_ours
) -> None:
    """Raise before any work is done if a directory ``path`` could not be written at the end of it.

    Args:
        path: the directory.
        force: it may replace one that is ``ours``.
        need_bytes: how large it will be.
        ours: whether a directory is such an output and nothing else.

    Raises:
        OutputError: the path exists and ``force`` is not set, or it is not an output of ours; or as for a file.
        DiskFullError: the volume has less than ``need_bytes`` bytes free.
    """
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path}: exists already; pass --force to replace it, or choose another name")
        if not ours(path):
            raise OutputError(f"{path}: holds more than an output of ours, so it is not replaced; choose another name")
    elif path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file, and this format is a directory; choose another name")
    check_place(path, need_bytes)


@contextmanager
def atomic_directory(path: Path, *, force: bool = False, ours: Callable[[Path], bool] = is_ours) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; publish it whole on success, remove it on any failure.

    Every file in it is fsynced first. A directory that is replaced disappears only after the new one is in its place.
    A caller may move the temporary directory elsewhere: then nothing is published. ``ours`` says what ``force`` may
    replace, see :func:`check_directory_writable`.

    Raises:
        OutputError: see :func:`check_directory_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_directory_writable(path, force=force, ours=ours)
    with translate_os_errors(path):
        temporary = temporary_beside(path, folder=True)
    try:
        with translate_os_errors(path):
            yield temporary.path
            if temporary.path.exists():
                check_directory_writable(path, force=force, ours=ours)
                _publish_directory(temporary.path, path)
    finally:
        temporary.remove()


def _publish_directory(temporary: Path, path: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes directories private
    old = temporary.with_suffix(REPLACED) if path.exists() else None
    try:
        if old is not None:
            path.rename(old)
        temporary.rename(path)
    finally:  # Ctrl-C may come between the two
        if old is not None:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)
    _sync_folder(path.absolute().parent)


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors on ``path`` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFullError(
                f"{path}: the disk is full; nothing was left behind, make room and run the command again"
            ) from error
        reason = error.strerror or str(error)
        other = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        if other and path.name[:100] not in other:  # of what it is made of
            reason = f"{other}: {reason}"
        elif error.errno == errno.EIO:  # which does not say of what file
            reason += "; see whether its disk is sound, and that of the model"
        raise OutputError(f"{path}: cannot be written ({reason})") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of reading ``path`` its name, which the system leaves out where a file is open already."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _settle(temporary: Path) -> None:
    """Have a finished file on the disk, with the mode that open() would have given it (mkstemp makes files private)."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o666 & ~_umask())


def _publish(temporary: Path, path: Path, *, force: bool) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)  # fails where rename would silently replace
        except OSError:
            if path.exists():
                raise OutputError(
                    f"{path}: was created by someone else meanwhile; pass --force to replace it"
                ) from None
            temporary.replace(path)  # a file system without hard links
    _sync_folder(path.absolute().parent)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows cannot open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits, read in bounded memory."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of pieces from all over it: files of gigabytes are told apart at once."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with naming(path), path.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
