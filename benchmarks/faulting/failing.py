"""A disk that fails under a run: calls of the operating system that return an error, from a random one on.

Two ways. In Python the n-th fsync, rename, link, open, write or read of our files raises EIO or ENOSPC (files are
opened with a failing lowest layer, buffers and text above it stay Python's own). What C and Rust call by themselves
(llama.cpp, safetensors, torch, SQLite, the quantiser's process) is out of reach of that; there the kernel is told to
refuse: a seccomp filter, from a random moment on, which also knows mmap. x86-64 and Linux only.
"""

import builtins
import ctypes
import errno
import io
import json
import os
import platform
import signal
import struct
import sys
from collections import Counter
from pathlib import Path

import npti_export

IN_PYTHON = ("fsync", "rename", "link", "open", "write", "read")
IN_C = ("write", "read", "fsync", "rename", "mmap")
REASONS = {"read": (errno.EIO,), "mmap": (errno.ENOMEM, errno.EIO)}  # no disk is too full to be read
FULL_OR_BROKEN = (errno.EIO, errno.ENOSPC)
_PACKAGE = str(Path(npti_export.__file__).parent)
_counted = {}


def calls(setting, ending):
    """How often an undisturbed run of an ending does each of these to our files."""
    if ending.name not in _counted:
        names = setting.root / "calls.json"

        def prepare():
            counts = Counter()
            _install(lambda what, path: counts.update([what] * _ours(path, setting)))
            leave = os._exit

            def end(code):
                with io.FileIO(str(names), "w") as stream:
                    stream.write(json.dumps(counts).encode())
                leave(code)

            os._exit = end

        setting.whole(ending)  # its modules are imported here before
        setting.undisturbed(setting.command(ending), prepare=prepare)
        _counted[ending.name] = Counter(json.loads(names.read_text()))
        names.unlink()
    return _counted[ending.name]


def killing(what, nth, setting):
    """What a run does first that is to be killed at its n-th call of a kind."""
    return lambda: _install(_nth(what, nth, setting, lambda _path: os.kill(os.getpid(), signal.SIGKILL)))


def failing(what, nth, reason, setting, *, once):
    """The same for one whose n-th call fails, and those after it unless only once."""

    def fail(path):  # as the system does: what goes by a descriptor has no name
        raise OSError(reason, os.strerror(reason), *([path] if what in ("rename", "link", "open") else []))

    return lambda: _install(_nth(what, nth, setting, fail, once=once))


def _nth(what, nth, setting, strike, *, once=False):
    seen = 0

    def called(name, path):
        nonlocal seen
        if name == what and _ours(path, setting):
            seen += 1
            if seen == nth or (seen > nth and not once):
                strike(path)

    return called


def _ours(path, setting):
    return path.startswith((str(setting.root), _PACKAGE))


def _path_of(file):
    if isinstance(file, int):
        try:
            return str(Path(f"/proc/self/fd/{file}").readlink())
        except OSError:
            return ""
    return os.path.abspath(os.fsdecode(file))  # noqa: PTH100


def _install(called):
    """Have ``called`` told of each call before it is made, by kind and path."""

    def watched(name, real, place=0):
        def call(*arguments, **options):
            called(name, _path_of(arguments[place]))
            return real(*arguments, **options)

        return call

    for name, what in {"fsync": "fsync", "rename": "rename", "replace": "rename", "link": "link", "open": "open",
                       "mkdir": "open", "write": "write", "unlink": "unlink"}.items():  # fmt: skip
        setattr(os, name, watched(what, getattr(os, name)))
    for name in ("sendfile", "copy_file_range"):
        place = 0 if name == "sendfile" else 1
        if hasattr(os, name):
            setattr(os, name, watched("write", getattr(os, name), place))
    _install_files(called)


def _install_files(called):
    class Watched(io.FileIO):
        """The lowest layer of an open file."""

        def write(self, data):
            called("write", _path_of(self.fileno()))
            return super().write(data)

        def readinto(self, buffer):
            called("read", _path_of(self.fileno()))
            return super().readinto(buffer)

        def read(self, size=-1):
            called("read", _path_of(self.fileno()))
            return super().read(size)

        def readall(self):
            called("read", _path_of(self.fileno()))
            return super().readall()

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not isinstance(file, int):
            called("open", _path_of(file))
        raw = Watched(file, "".join(one for one in mode if one not in "bt"), closefd=closefd, opener=opener)
        if buffering == 0 and "b" in mode:
            return raw
        layer = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        buffered = layer(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    builtins.open = io.open = opened


_SYSCALLS = {"write": (1, 18, 20, 326, 40), "read": (0, 17, 19), "fsync": (74, 75), "rename": (82, 264, 316, 86, 265),
             "mmap": (9,)}  # fmt: skip
_FILE = {"mmap": 4, "rename": None}  # which argument is the file, where it is not the first
_LOAD, _EQUAL, _ABOVE, _RETURN = 0x20, 0x15, 0x25, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X86_64 = 0xC000003E


def can_filter():
    return sys.platform == "linux" and platform.machine() == "x86_64"


def refusing(what, reason, seconds):
    """What a run does first whose kernel is to refuse calls after so many seconds, as if the disk had failed."""

    def prepare():
        signal.signal(signal.SIGALRM, lambda *_: _filter(what, reason))
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))

    return prepare


def _filter(what, reason):
    """Tell the kernel, for all threads and what they start; stdin, stdout and stderr stay as they are."""
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    numbers = _SYSCALLS[what]
    for place, number in enumerate(numbers):
        code.append((_EQUAL, len(numbers) - place, 0, number))
    code.append((_RETURN, 0, 0, _ALLOW))
    file = _FILE.get(what, 0)
    if file is not None:
        code.append((_LOAD, 0, 0, 16 + 8 * file))
        # mappings without a file have the descriptor -1
        code += [(_ABOVE, 0, 1, 0x7FFFFFFF), (_RETURN, 0, 0, _ALLOW), (_ABOVE, 1, 0, 2), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ERRNO | reason))
    program = b"".join(struct.pack("<HBBI", *one) for one in code)
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(buffer)))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if library.syscall(317, 1, 1, header):  # seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
        os.write(2, b"Traceback: no filter could be set\n")
        os._exit(70)
