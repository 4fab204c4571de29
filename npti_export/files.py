"""Writing files so that they are either whole or absent."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from npti_export.errors import DiskFullError, OutputError
from npti_export.placing import place, place_all, sync_folder, umask
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


def target_of(path: Path) -> Path:
    """Where an output goes: of a link, whether to a file or to a folder, what it leads to, as for ``cp``; it stays.

    Raises:
        OutputError: it leads nowhere.
    """
    with translate_os_errors(path):
        if not path.is_symlink():
            return path
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OutputError(f"{path}: is a link that leads back to itself; remove it, or choose another name")
        return target


def check_writable(path: Path, *, force: bool, need_bytes: int = 0) -> None:
    """Raise before any work is done if ``path`` could not be written at the end of it.

    What a killed job left of it is removed first, and is no reason.

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
    sweep(target_of(path))
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; pass --force to replace it, or choose another name")
    check_place(path, need_bytes)


def check_files_writable(paths: Sequence[Path], *, force: bool, need_bytes: int = 0) -> None:
    """Raise before any work is done if files that belong together could not be written, see :func:`check_writable`.

    Raises:
        OutputError: likewise; or one is a link, as they are renamed together within one folder.
        DiskFullError: likewise.
    """
    for path in paths:
        if path.is_symlink():
            raise OutputError(f"{path}: is a link, and split files go where they are named; remove it first")
        check_writable(path, force=force, need_bytes=need_bytes)


def check_place(path: Path, need_bytes: int) -> None:
    """Raise unless the folder that ``path`` goes to is there, writable and has ``need_bytes`` bytes of room.

    Raises:
        OutputError: no name, no such folder, or one that is not writable.
        DiskFullError: the volume has less room.
    """
    if not path.name or path.name == "..":
        raise OutputError(f"{path}: is no name of its own; name what to write")
    with translate_os_errors(path):
        parent = target_of(path).absolute().parent
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


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; publish it on success, remove it on any failure.

    A link is written through, see :func:`target_of`. A job that is killed leaves the temporary file, which the next one
    for ``path`` removes. The temporary file is fsynced, then renamed over ``path``; without ``force`` an existing
    ``path`` is refused both before and after the work, so that two jobs cannot overwrite each other's result.
    A caller may move the temporary file elsewhere (a rejected artifact): then nothing is published.

    Raises:
        OutputError: see :func:`check_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_writable(path, force=force)
    target = target_of(path)
    with translate_os_errors(path):
        temporary = temporary_beside(target, folder=False)
    try:
        with translate_os_errors(path):
            yield temporary.path
            if temporary.path.exists():
                place(temporary.path, target, force=force)
    finally:
        temporary.remove()


def holds_other(path: Path, data: bytes) -> bool:
    """Whether there is a file that is not byte for byte what would be written."""
    if not path.exists():
        return False
    with translate_os_errors(path):
        return path.stat().st_size != len(data) or path.read_bytes() != data


@contextmanager
def atomic_files(paths: Sequence[Path], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``paths``; publish files of their names from it on success, none on any failure.

    For files that belong together and are opened by the first one's name, see :func:`npti_export.placing.place_all`.
    A caller may move the temporary folder elsewhere: then nothing is published.

    Raises:
        OutputError: see :func:`check_files_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_files_writable(paths, force=force)
    first = paths[0]
    with translate_os_errors(first):
        temporary = temporary_beside(first, folder=True)
    try:
        with translate_os_errors(first):
            yield temporary.path
            if temporary.path.exists():
                place_all(temporary.path, paths, force=force)
    finally:
        temporary.remove()


def set_aside(temporary: Path, out: Path) -> Path:
    """Keep an artifact that was not delivered, under a name that is free."""
    target = target_of(out)
    name = f"{target.name}.rejected"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    aside = next(path for name in names if not (path := target.with_name(name)).exists())
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
    sweep(target_of(path))  # a directory that a killed job was replacing comes back
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

    Every file in it is fsynced first. A link is written through, see :func:`target_of`. A directory that is replaced
    disappears only after the new one is in its place. A caller may move the temporary directory elsewhere: then nothing
    is published. ``ours`` says what ``force`` may replace, see :func:`check_directory_writable`.

    Raises:
        OutputError: see :func:`check_directory_writable`.
        DiskFullError: the disk filled up while writing.
    """
    check_directory_writable(path, force=force, ours=ours)
    target = target_of(path)
    with translate_os_errors(path):
        temporary = temporary_beside(target, folder=True)
    try:
        with translate_os_errors(path):
            yield temporary.path
            if temporary.path.exists():
                check_directory_writable(path, force=force, ours=ours)
                _publish_directory(temporary.path, target)
    finally:
        temporary.remove()


def _publish_directory(temporary: Path, path: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    temporary.chmod(0o777 & ~umask())  # mkdtemp makes directories private
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
    sync_folder(path.absolute().parent)


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
