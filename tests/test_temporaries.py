"""What killed jobs leave beside an output is removed by the next one; what living jobs make is not."""

import signal
import subprocess
import sys
import textwrap

import pytest

from npti_export.files import atomic_directory, atomic_files, atomic_output
from npti_export.temporaries import sweep, temporary_beside

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks, nothing is removed")


def killed_while_writing(path, how):
    """A process that dies by SIGKILL with a temporary file or folder of ours beside ``path``."""
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        from npti_export.files import atomic_directory, atomic_files, atomic_output
        with {how}(Path(sys.argv[1])) as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    ).replace("atomic_files(Path(sys.argv[1]))", "atomic_files([Path(sys.argv[1])])")
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == -signal.SIGKILL


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("how", ["atomic_output", "atomic_directory", "atomic_files"])
def test_the_next_job_removes_what_a_killed_one_left(tmp_path, how):
    path = tmp_path / "a[1]*.bin"
    killed_while_writing(path, how)
    assert not path.exists()
    assert len(hidden(tmp_path)) == 1
    with atomic_output(tmp_path / "another.bin") as temporary:
        temporary.write_text("x")
    assert len(hidden(tmp_path)) == 1  # not its output
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert hidden(tmp_path) == []


def test_what_a_living_job_makes_stays(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_output(path) as one:
        one.write_text("mine")
        with pytest.raises(RuntimeError), atomic_output(path) as two:
            assert two != one
            raise RuntimeError
        sweep(path)
        assert one.read_text() == "mine"
    assert path.read_text() == "mine"
    folder = tmp_path / "d"
    with atomic_directory(folder) as one, pytest.raises(RuntimeError), atomic_directory(folder) as two:
        (one / "x").write_text("mine")
        sweep(folder)
        assert one.is_dir()
        assert two.is_dir()
        raise RuntimeError
    with atomic_files([path.with_name("b.1"), path.with_name("b.2")]) as one:
        for name in ("b.1", "b.2"):
            (one / name).write_text(name)
        sweep(path.with_name("b.1"))
    assert path.with_name("b.2").read_text() == "b.2"
    assert hidden(tmp_path) == []


def test_files_of_others_stay(tmp_path):
    names = [".a.bin.partial", ".a.bin.abcdefghi.partial", ".a.bin.abcdefgh.part", "a.bin.abcdefgh.partial"]
    for name in names:
        (tmp_path / name).write_text("not ours")
    with atomic_output(tmp_path / "a.bin") as temporary:
        temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", *names}


def test_a_directory_taken_away_comes_back(tmp_path):
    """As after a kill between the two renames that replace a directory."""
    path = tmp_path / "d"
    old, new = tmp_path / ".d.abcdefgh.replaced", tmp_path / ".d.abcdefgh.partial"
    for folder in (old, new):
        folder.mkdir()
        (folder / "x").write_text(folder.suffix)
    sweep(path)
    assert (path / "x").read_text() == ".replaced"
    assert hidden(tmp_path) == []
    old.mkdir()  # as after a kill behind the second one
    sweep(path)
    assert (path / "x").read_text() == ".replaced"
    assert hidden(tmp_path) == []


def test_many_at_once(tmp_path):
    """Sweeps of some against new places of others: nobody loses one."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from npti_export.temporaries import temporary_beside
        for _ in range(150):
            made = temporary_beside(Path(sys.argv[1]), folder=False)
            made.path.write_text("x")
            assert made.path.read_text() == "x"
            made.remove()
        """
    )
    command = [sys.executable, "-c", program, tmp_path / "a.bin"]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(300) for process in running] == [0, 0, 0]
    assert hidden(tmp_path) == []


def test_gone_already(tmp_path):
    made = temporary_beside(tmp_path / "a.bin", folder=False)
    made.path.rename(tmp_path / "elsewhere")
    made.remove()
    assert (tmp_path / "elsewhere").exists()
    with pytest.raises(OSError, match="No such file"):
        temporary_beside(tmp_path / "no" / "a.bin", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
