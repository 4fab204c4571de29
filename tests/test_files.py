"""Outputs are whole or absent."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from npti_export.errors import DiskFullError, OutputError
from npti_export.files import (
    atomic_directory,
    atomic_files,
    atomic_output,
    check_directory_writable,
    check_writable,
    set_aside,
    sha256_file,
)


def test_published_on_success(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    with pytest.raises(error), atomic_output(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_needs_force(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match="--force"), atomic_output(path):
        pytest.fail("the work must not begin")
    with pytest.raises(RuntimeError), atomic_output(path, force=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_output(path, force=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OutputError, match="meanwhile"), atomic_output(path) as temporary:
        temporary.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def no_links(*_paths):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_neither_is_it_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.txt"
    with pytest.raises(OutputError, match="meanwhile"), atomic_output(path) as temporary:
        temporary.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    path.unlink()
    with atomic_output(path) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_at_fault_is_named(tmp_path):
    """What an output is made of may fail, too."""
    path = tmp_path / "a.txt"
    with pytest.raises(OutputError, match=r"a\.txt: cannot be written \(.*model\.gguf: No such"), atomic_output(path):
        (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(OutputError, match=r"cannot be written \(No such file"), atomic_output(path) as temporary:
        temporary.with_name(f"{temporary.name}.x").read_bytes()
    with pytest.raises(OutputError, match=r"\(Input/output error; see whether its disk is"), atomic_output(path):
        raise OSError(errno.EIO, "Input/output error")


def test_bad_places(tmp_path):
    with pytest.raises(OutputError, match="is a directory"):
        check_writable(tmp_path, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_writable(tmp_path / "no" / "a.txt", force=False)
    with pytest.raises(DiskFullError, match="MB are free"):
        check_writable(tmp_path / "a.txt", force=False, need_bytes=1 << 60)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_up_half_way(tmp_path):
    """A real failing write: the process may not write files over 64 KiB."""
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from npti_export.errors import DiskFullError
        from npti_export.files import atomic_output
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            with atomic_output(Path(sys.argv[1])) as temporary, temporary.open("wb", buffering=0) as stream:
                for _ in range(100):
                    stream.write(bytes(4096))
        except DiskFullError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.bin"], capture_output=True, text=True)
    assert "disk is full" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def elsewhere(tmp_path):
    """Two folders: one with a link, and the one that it leads to."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    return here, there


def test_a_link_to_a_file_is_written_through(elsewhere):
    here, there = elsewhere
    link, target = here / "a.bin", there / "b.bin"
    link.symlink_to("../there/b.bin")
    with atomic_output(link) as temporary:  # which leads to nothing yet
        assert temporary.parent == there
        temporary.write_text("first")
    assert (link.is_symlink(), target.read_text()) == (True, "first")
    with pytest.raises(OutputError, match=r"a\.bin: exists already; pass --force"), atomic_output(link):
        pass
    with atomic_output(link, force=True) as temporary:
        temporary.write_text("second")
    assert (link.is_symlink(), target.read_text()) == (True, "second")
    with atomic_output(link, force=True) as temporary:
        temporary.write_text("not faithful")
        assert set_aside(temporary, link) == there / "b.bin.rejected"
    assert (list(here.iterdir()), target.read_text()) == ([link], "second")
    assert sorted(path.name for path in there.iterdir()) == ["b.bin", "b.bin.rejected"]


def test_a_link_to_a_folder_is_written_through(elsewhere):
    here, there = elsewhere
    link, target = here / "a", there / "b"
    link.symlink_to(target)
    for text in ("first", "second"):
        with atomic_directory(link, force=text == "second", ours=lambda folder: True) as temporary:
            assert temporary.parent == there
            (temporary / "x").write_text(text)
        assert (link.is_symlink(), target.is_symlink(), (target / "x").read_text()) == (True, False, text)
        assert (list(here.iterdir()), list(there.iterdir())) == ([link], [target])
    with pytest.raises(OutputError, match="exists already; pass --force"), atomic_directory(link):
        pass
    with pytest.raises(OutputError, match="holds more than an output of ours"):
        check_directory_writable(link, force=True)


def test_links_that_lead_nowhere(elsewhere):
    here, there = elsewhere
    link, other = here / "a", here / "b"
    link.symlink_to(other)
    other.symlink_to(link)
    for context in (atomic_output(link, force=True), atomic_directory(link, force=True)):
        with pytest.raises(OutputError, match="is a link that leads back to itself"), context:
            pass
    link.unlink()
    link.symlink_to(there / "no" / "a")
    with pytest.raises(OutputError, match=r"/no does not exist; create it first"), atomic_output(link):
        pass
    assert sorted(here.iterdir()) == [link, other]


def test_split_files_are_not_written_through_links(elsewhere):
    """They are renamed together within one folder."""
    here, there = elsewhere
    paths = [here / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    paths[1].symlink_to(there / "x")
    with pytest.raises(OutputError, match=r"00002-of-00002\.gguf: is a link"), atomic_files(paths, force=True):
        pass
    assert (list(here.iterdir()), list(there.iterdir())) == ([paths[1]], [])


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_a_directory_stays_where_the_new_one_does_not_come(tmp_path, monkeypatch, error):
    """Ctrl-C, or a disk that fails, between taking the old one away and putting the new one in its place."""
    rename = Path.rename

    def interrupted(source, target):
        if target == tmp_path / "d" and source.suffix == ".partial":
            raise error
        return rename(source, target)

    ours = {"ours": lambda _: True}
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "old").write_text("x")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((KeyboardInterrupt, OutputError)), atomic_directory(tmp_path / "d", force=True, **ours) as new:
        (new / "new").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "old"]


def test_an_atomic_directory_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "whole").write_text("x")
        assert not (tmp_path / "d").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
