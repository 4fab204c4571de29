"""File systems without hard links: what came meanwhile is not overwritten there either."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from npti_export import placing
from npti_export.errors import DiskFullError, OutputError
from npti_export.files import atomic_files, atomic_output
from npti_export.temporaries import sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="rename replaces nothing there")
RENAMED = placing._renamed
LACKING = [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK]


def no_links(monkeypatch, code, *, rename=True):
    def link(source, target):
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr(os, "link", link)
    if not rename:
        monkeypatch.setattr(placing, "_renamed", lambda temporary, path: False)


@pytest.mark.parametrize("rename", [True, False], ids=["by the system", "over an empty file"])
@pytest.mark.parametrize("code", LACKING, ids=errno.errorcode.get)
def test_without_links(tmp_path, monkeypatch, code, rename):
    no_links(monkeypatch, code, rename=rename)
    path, parts = tmp_path / "a.bin", [tmp_path / "b.1", tmp_path / "b.2"]
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    with atomic_files(parts) as folder:
        for part in parts:
            (folder / part.name).write_text(part.name)
    assert [part.read_text() for part in parts] == ["b.1", "b.2"]
    assert sorted(tmp_path.iterdir()) == [path, *parts]


@pytest.mark.parametrize("theirs", ["theirs", ""])
@pytest.mark.parametrize("rename", [True, False], ids=["by the system", "over an empty file"])
def test_what_came_meanwhile_stays(tmp_path, monkeypatch, rename, theirs):
    no_links(monkeypatch, errno.EPERM, rename=rename)
    path, parts = tmp_path / "a.bin", [tmp_path / "b.1", tmp_path / "b.2"]
    with pytest.raises(OutputError, match="created by someone else meanwhile"), atomic_output(path) as temporary:
        temporary.write_text("mine")
        path.write_text(theirs)
    assert path.read_text() == theirs
    with pytest.raises(OutputError, match="created by someone else meanwhile"), atomic_files(parts) as folder:
        for part in parts:
            (folder / part.name).write_text("mine")
        parts[0].write_text(theirs or "theirs")  # the last to be placed
    assert sorted(tmp_path.iterdir()) == [path, parts[0]]
    assert parts[0].read_text() == (theirs or "theirs")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, OutputError)]
)
def test_other_errors_are_errors(tmp_path, monkeypatch, code, kind):
    no_links(monkeypatch, code)
    with pytest.raises(kind), atomic_output(tmp_path / "a.bin") as temporary:
        temporary.write_text("mine")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_rename_are_errors(tmp_path, monkeypatch):
    no_links(monkeypatch, errno.EPERM, rename=False)

    def replace(source, target):
        raise OSError(errno.EIO, "failing")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="failing"), atomic_output(tmp_path / "a.bin") as temporary:
        temporary.write_text("mine")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        RENAMED(tmp_path / "none", tmp_path / "a.bin")


KILLED = """
import errno, os, signal, sys
from pathlib import Path
from npti_export import placing
from npti_export.files import atomic_files, atomic_output

def no_link(source, target):
    raise OSError(errno.EPERM, "no links")

real = Path.replace

def replace(source, target):
    if sys.argv[2] == "after":
        real(source, target)
    os.kill(os.getpid(), signal.SIGKILL)

os.link, placing._renamed, Path.replace = no_link, lambda temporary, path: False, replace
path = Path(sys.argv[1])
if sys.argv[3] == "one":
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
else:
    paths = [path, path.with_name("b.2")]
    with atomic_files(paths) as folder:
        for one in paths:
            (folder / one.name).write_text("whole")
"""


def killed(path, when, how):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), path, when, how], check=False)
    assert done.returncode == -signal.SIGKILL


def test_an_empty_file_of_a_killed_job_is_no_output(tmp_path):
    path = tmp_path / "b.1"
    killed(path, "before", "one")
    assert path.stat().st_size == 0
    with atomic_output(path) as temporary:
        temporary.write_text("again")
    assert path.read_text() == "again"
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    killed(path, "before", "several")
    assert (tmp_path / "b.2").stat().st_size == 0
    sweep(path)
    assert list(tmp_path.iterdir()) == []


def test_what_has_its_name_is_the_output(tmp_path):
    path = tmp_path / "b.1"
    killed(path, "after", "one")
    with pytest.raises(OutputError, match="exists already"), atomic_output(path):
        pass
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_somebody_put_there_stays(tmp_path):
    path = tmp_path / "b.1"
    killed(path, "before", "one")
    (note,) = tmp_path.glob(".b.1.????????.partial.reserved")
    note.write_bytes(b"../" + os.fsencode(tmp_path.name) + b"/other")
    (tmp_path / "other").touch()
    path.write_text("theirs")
    sweep(path)
    assert path.read_text() == "theirs"
    (tmp_path / "other").unlink()
    assert list(tmp_path.iterdir()) == [path]
