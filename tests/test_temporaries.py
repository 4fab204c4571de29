"""What killed jobs leave beside an output is removed by the next one; what living jobs make is not."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from npti_export import temporaries
from npti_export.errors import OutputError
from npti_export.files import atomic_directory, atomic_files, atomic_output
from npti_export.temporaries import TemporaryFolder, sweep, temporary_beside

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


@pytest.mark.parametrize("folder", [False, True])
def test_taken_for_a_leftover_before_it_is_locked(tmp_path, monkeypatch, folder):
    """By another job's sweep: another place is made."""
    real, taken = temporaries.locked, []

    def late(place, *, wait):
        if wait and not taken:
            taken.append(place)
            sweep(tmp_path / "a.bin")
        return real(place, wait=wait)

    monkeypatch.setattr(temporaries, "locked", late)
    made = temporary_beside(tmp_path / "a.bin", folder=folder)
    assert made.handle is not None
    assert made.path.exists()
    assert not taken[0].exists()
    made.remove()


def test_gone_already(tmp_path):
    made = temporary_beside(tmp_path / "a.bin", folder=False)
    made.path.rename(tmp_path / "elsewhere")
    made.remove()
    assert (tmp_path / "elsewhere").exists()
    with pytest.raises(OSError, match="No such file"):
        temporary_beside(tmp_path / "no" / "a.bin", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def system_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


FOLDER = """
import os, signal, sys
from npti_export.temporaries import TemporaryFolder
made = TemporaryFolder()
(made.path / "x").write_text("gigabytes")
print(made.path, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_of_a_killed_process_is_gone_after_the_next_one_is_made(system_folder):
    others = ["npti-notes", "npti-abcdefgh", "npti-abcdefg.txt"]
    for name in others:
        (system_folder / name).mkdir()
    process = subprocess.Popen([sys.executable, "-c", FOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    left = Path(process.stdout.readline().strip())
    assert left.is_relative_to(system_folder)
    with TemporaryFolder() as mine:
        (mine / "x").write_text("mine")
        with TemporaryFolder() as another:
            assert another != mine
        assert not another.parent.exists()
        assert names(left) == names(mine) == ["x"]  # both live
        process.communicate("\n")
        assert process.returncode == -signal.SIGKILL
        assert names(left) == ["x"]
        TemporaryFolder().remove()
        assert not left.parent.exists()
        assert names(mine) == ["x"]
    assert names(system_folder) == sorted(others)


def test_a_folder_goes_with_its_object(system_folder):
    made = TemporaryFolder()
    path = made.path
    del made
    assert not path.parent.exists()
    assert names(system_folder) == []
    ends = FOLDER.replace("os.kill(os.getpid(), signal.SIGKILL)", "")
    assert subprocess.run([sys.executable, "-c", ends], input=b"", check=True, capture_output=True).stdout
    assert names(system_folder) == []


def test_many_folders_at_once(system_folder):
    program = """
from npti_export.temporaries import TemporaryFolder
for _ in range(100):
    with TemporaryFolder() as folder:
        (folder / "x").write_text("x")
        assert (folder / "x").read_text() == "x"
"""
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(300) for process in running] == [0, 0, 0]
    assert names(system_folder) == []


def test_old_marks_of_killed_runs_are_removed(tmp_path):
    from npti_export.distribute.spread import _mark

    folder = tmp_path / "identify"
    folder.mkdir()
    killed, young, other = (folder / f".{name}.shared" for name in ("a" * 32, "b" * 32, "notes"))
    with _mark(tmp_path) as long:
        for path in (killed, young, other):
            path.touch()
        for path in (killed, other, long):
            os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
        with _mark(tmp_path) as mine:
            assert {long, mine, young, other} == set(folder.iterdir())
    assert {young, other} == set(folder.iterdir())


PLACING = """
import json, os, signal, stat, sys
from pathlib import Path
from npti_export.files import atomic_files
paths, force, left, what = json.loads(sys.argv[1])
paths, real = [Path(path) for path in paths], os.fsync

def checked(handle):
    if stat.S_ISREG(os.fstat(handle).st_mode) and not force and any(path.exists() for path in paths):
        os._exit(4)  # that takes minutes: it comes first
    real(handle)

def counted(real):
    def run(source, target, *more):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(source, target, *more)
    return run

with atomic_files(paths, force=force) as folder:
    for path in paths:
        (folder / path.name).write_text(what)
    os.link, Path.rename, Path.replace = map(counted, (os.link, Path.rename, Path.replace))
    os.fsync = checked
if left:
    sys.exit(3)
"""


def killed_while_placing(paths, what, after, *, force):
    """Killed before the link or rename that comes after so many; returns whether it was."""
    arguments = json.dumps([list(map(str, paths)), force, after, what])
    code = subprocess.run([sys.executable, "-c", PLACING, arguments], check=False).returncode
    assert code in (-signal.SIGKILL, 0, 3)
    return code == -signal.SIGKILL


def contents(paths):
    return [path.read_text() if path.exists() else None for path in paths]


def test_a_kill_between_two_publications(tmp_path):
    """Parts without a first one are no model, and no reason for the next job to refuse."""
    for after in range(4):
        folder = tmp_path / str(after)
        folder.mkdir()
        paths = [folder / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        dead = killed_while_placing(paths, "new", after, force=False)
        assert dead == (after < 3)
        assert contents(paths) == [None if dead else "new"] + ["new" if after > number else None for number in (0, 1)]
        if not dead:
            continue
        with atomic_files(paths) as made:
            for path in paths:
                (made / path.name).write_text("again")
        assert contents(paths) == ["again"] * 3
        assert sorted(folder.iterdir()) == paths


def test_a_kill_while_old_files_are_replaced(tmp_path):
    """The old ones come back, unless the new ones are all there; never do some of both look like a whole."""
    for after in range(7):
        folder = tmp_path / str(after)
        folder.mkdir()
        paths = [folder / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        for path in paths:
            path.write_text("old")
        assert killed_while_placing(paths, "new", after, force=True) == (after < 6)
        found = contents(paths)
        assert found[0] is None or len(set(found)) == 1
        with pytest.raises(OutputError, match="exists already; pass --force"), atomic_files(paths):
            pass
        assert contents(paths) == (["old"] * 3 if after < 6 else ["new"] * 3)
        assert sorted(folder.iterdir()) == paths


def test_only_what_was_placed_is_taken_back(tmp_path):
    """What somebody put in the place of a part stays, whatever it holds."""
    paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert killed_while_placing(paths, "new", 2, force=False)
    paths[1].unlink()
    paths[1].write_text("new")
    with pytest.raises(OutputError, match=r"00002-of-00003\.gguf: exists already"), atomic_files(paths):
        pass
    assert contents(paths) == [None, "new", None]
    assert hidden(tmp_path) == []
    assert killed_while_placing(paths, "newer", 3, force=True)
    paths[1].unlink()
    paths[1].write_text("theirs")
    sweep(paths[0])
    assert contents(paths) == [None, "theirs", None]
    assert hidden(tmp_path) == []


def test_interrupted_while_old_files_come_back(tmp_path, monkeypatch):
    """They are not removed with the temporary folder; the next job brings them back."""
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in paths:
        path.write_text("old")
    rename = Path.rename

    def full(source, target):
        raise OSError(28, "no space")

    def interrupted(source, target):
        if source.parent.name == "npti.replaced":
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_files(paths, force=True) as made:
            for path in paths:
                (made / path.name).write_text("new")
    assert contents(paths) == [None, None]
    with pytest.raises(OutputError, match="exists already"), atomic_files(paths):
        pass
    assert contents(paths) == ["old", "old"]
    assert hidden(tmp_path) == []


def test_a_set_whose_killed_job_had_placed_it_all_stays(tmp_path):
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    program = PLACING.replace("real(handle)", "os.kill(os.getpid(), signal.SIGKILL) if paths[0].exists() else 0")
    arguments = json.dumps([list(map(str, paths)), False, 9, "new"])
    assert subprocess.run([sys.executable, "-c", program, arguments], check=False).returncode == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    with pytest.raises(OutputError, match="exists already"), atomic_files(paths):
        pass
    assert contents(paths) == ["new", "new"]
    assert hidden(tmp_path) == []


def test_a_damaged_marker_removes_nothing(tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    kept = tmp_path / "kept"
    kept.write_text("x")
    found = kept.stat()
    mark = [found.st_ino, found.st_size, found.st_mtime_ns]
    elsewhere = json.dumps([["none", 0, 0, 0], [f"../{tmp_path.name}/kept", *mark]])
    for text in ("", "[", "3", "[[1, 2, 3, 4]]", '[["a"]]', "[1]", elsewhere):
        folder = tmp_path / ".m-00001-of-00002.gguf.abcdefgh.partial"
        folder.mkdir()
        (folder / "npti.placed").write_text(text)
        sweep(path)
        assert [one.name for one in tmp_path.iterdir()] == ["kept"]
