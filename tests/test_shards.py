"""Models split into several files: read as one, baked file by file, stripped, published together."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rule
from jobs import QUICK, main_job, npti
from reference import ReferenceLlama, kl
from test_bake import TOKENS, llama_logits
from test_temporaries import killed_while_placing
from tolerances import KL_TINY_FLOAT

from npti_export.compiler.exact import compile_exact
from npti_export.errors import DiskFullError, GGUFError, ModelError, OutputError
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import atomic_files, sha256_file
from npti_export.gguf.reader import read_gguf
from npti_export.gguf.shards import named_shards, read_model, shard_paths
from npti_export.models import gguf_source

COUNT = 5


@pytest.fixture
def split(make_tiny, tmp_path):
    """The first file of the tiny model in five files, in a folder of its own."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in named_shards(make_tiny(split=6)):
        shutil.copy(path, folder)
    return next(folder.glob("*-00001-of-00005.gguf"))


def bake_split(first, out, rule):
    base = read_model(first)
    check_base(base)
    plan = plan_bake(base, compile_exact(rule, 5), {"trait": "calm"}, [sha256_file(part.path) for part in base.parts])
    write_bake(plan, out)
    return plan


def test_the_parts_are_one_model(tiny, split):
    whole, parts = read_gguf(tiny), read_model(split)
    assert len(parts.shards) == COUNT
    assert [tensor.name for tensor in parts.tensors] == [tensor.name for tensor in whole.tensors]
    assert parts.size == sum(path.stat().st_size for path in split.parent.iterdir())
    source = gguf_source(split)
    assert source.identity == gguf_source(tiny).identity
    assert source.shards == tuple(sorted(split.parent.iterdir()))


@pytest.mark.parametrize("sizes", [{}, {"family": "qwen2"}, {"small_first_shard": True}, {"kind": "Q8_0"}], ids=str)
def test_a_split_model_is_baked_and_stripped_file_by_file(make_tiny, tmp_path, sizes):
    first, whole = make_tiny(split=6, **sizes), make_tiny(**{**sizes, "small_first_shard": False})
    rule = random_rule(3, 96)
    files = shard_paths(tmp_path / "steered.gguf", len(named_shards(first)))
    plan = bake_split(first, files[0], rule)
    assert sorted(tmp_path.iterdir()) == files
    assert sum(path.stat().st_size for path in files) == plan.nbytes
    reference = ReferenceLlama(whole)
    want, plain = reference.logits(TOKENS, rule.shift, rule.clamp), reference.logits(TOKENS)
    error = kl(want, llama_logits(files[0]))
    assert error < (KL_TINY_FLOAT if "kind" not in sizes else 0.02)
    assert kl(want, plain) > 10 * error
    total = len(read_model(files[0]).tensors)
    assert [read_gguf(path).get("split.tensors.count") for path in files] == [total] * len(files)
    assert strip(files[0], tmp_path / "back.gguf", force=False) == sha256_file(first)
    for was, now in zip(named_shards(first), shard_paths(tmp_path / "back.gguf", len(files)), strict=True):
        assert now.read_bytes() == was.read_bytes()


def patch(path, key, raw):
    entry = read_gguf(path).by_key[key]
    assert len(entry.raw) == len(raw)
    with path.open("rb+") as stream:
        stream.seek(entry.position)
        stream.write(raw)


def test_parts_that_do_not_belong_together(split, make_tiny):
    third = split.with_name(split.name.replace("-00001-", "-00003-"))
    with pytest.raises(GGUFError, match=r"is part 3 of 5 of a model; give the first, tiny-F32-00001-of-00005.gguf"):
        read_model(third)
    renamed = split.rename(split.with_name("model.gguf"))
    with pytest.raises(GGUFError, match=r"call it NAME-00001-of-00005.gguf again"):
        read_model(renamed)
    renamed.rename(split)
    content = third.read_bytes()
    third.unlink()
    with pytest.raises(GGUFError, match=r"incomplete without tiny-F32-00003-of-00005.gguf; put them into the same"):
        gguf_source(split)
    shutil.copy(split, third)
    with pytest.raises(GGUFError, match=r"00003-of-00005.gguf: split.no is 0, not 2, so it is not part 3"):
        read_model(split)
    third.write_bytes(content)
    patch(third, "split.count", struct.pack("<IH", 2, 6))
    with pytest.raises(GGUFError, match=r"split\.count is 6, not 5"):
        read_model(split)
    third.write_bytes(content)
    patch(third, "split.tensors.count", struct.pack("<Ii", 5, 31))
    with pytest.raises(GGUFError, match=r"split.tensors.count is 31, not 29"):
        read_model(split)
    third.write_bytes(content)
    patch(third, "split.no", struct.pack("<Ih", 3, -2))
    with pytest.raises(GGUFError, match=r"split.no is missing or not a number"):
        read_model(split)
    second = split.with_name(split.name.replace("-00001-", "-00002-"))
    name = read_gguf(second).tensors[0].name.encode()
    twin = next(one.name.encode() for one in read_gguf(third).tensors if len(one.name) == len(name))
    third.write_bytes(content.replace(twin, name))
    with pytest.raises(GGUFError, match="two of its 5 files have the same tensor"):
        read_model(split)
    third.write_bytes(content)
    assert len(read_model(split).shards) == COUNT


def test_names_of_the_output(tmp_path):
    names = [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for asked in ("x.gguf", "x", "x-00001-of-00003.gguf"):
        assert [path.name for path in shard_paths(tmp_path / asked, 3)] == names
    assert shard_paths(tmp_path / "x", 1) == [tmp_path / "x"]
    for asked in ("x-00002-of-00003.gguf", "x-00001-of-00002.gguf"):
        with pytest.raises(OutputError, match=r"has 3 files; name the first of them, x-00001-of-00003.gguf, or x.gguf"):
            shard_paths(tmp_path / asked, 3)


def test_no_room_for_all_of_them_is_said_before_writing(split, tmp_path, monkeypatch):
    base = read_model(split)
    plan = plan_bake(base, compile_exact(random_rule(3, 96), 4), {}, ["0" * 64] * COUNT)
    free = plan.nbytes - 1
    assert free > max(part.nbytes for part in plan.parts)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))
    with pytest.raises(DiskFullError, match=r"the file needs \d+ MB"):
        write_bake(plan, tmp_path / "s-00001-of-00005.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_files_are_published_together_the_first_one_last(tmp_path, monkeypatch):
    paths, order = shard_paths(tmp_path / "x.gguf", 3), []
    paths[0].write_text("old 0")
    paths[2].write_text("old 2")
    publish = Path.replace

    def seen(source, target):
        order.append((target.name, paths[0].exists()))
        return publish(source, target)

    monkeypatch.setattr(Path, "replace", seen)
    with pytest.raises(OutputError, match="exists already; pass --force"), atomic_files(paths):
        pass
    with atomic_files(paths, force=True) as folder:
        for path in paths:
            (folder / path.name).write_text("new")
        assert paths[0].read_text() == "old 0"
    assert order == [(paths[1].name, False), (paths[2].name, False), (paths[0].name, False)]
    assert [path.read_text() for path in paths] == ["new"] * 3
    assert sorted(tmp_path.iterdir()) == paths


def test_files_of_a_failed_job_are_not_published(tmp_path):
    paths = shard_paths(tmp_path / "x.gguf", 2)
    with pytest.raises(RuntimeError), atomic_files(paths) as folder:
        (folder / paths[0].name).write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="created by someone else"), atomic_files(paths) as folder:
        for path in paths:
            (folder / path.name).write_text("new")
        paths[0].write_text("someone else's")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["someone else's"]


def test_files_that_do_not_reach_the_disk_replace_nothing(tmp_path, monkeypatch):
    paths, calls, sync = shard_paths(tmp_path / "x.gguf", 3), [], os.fsync
    for path in paths:
        path.write_text("old")

    def fails(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="cannot be written"), atomic_files(paths, force=True) as folder:
        for path in paths:
            (folder / path.name).write_text("new")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old"] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks, nothing is taken back")
@pytest.mark.parametrize("published", [0, 1, 2, 3])
def test_what_a_killed_job_published_in_part_is_taken_back(tmp_path, published):
    """The same command is not refused because of what it left; what is all there stays."""
    paths = shard_paths(tmp_path / "x.gguf", 3)
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from npti_export.files import atomic_files
        paths, published, link, left = list(map(Path, sys.argv[2:])), int(sys.argv[1]), os.link, []
        def counted(source, target):
            if len(left) == published:
                os.kill(os.getpid(), signal.SIGKILL)
            left.append(target)
            link(source, target)
            if len(left) == len(paths):
                os.kill(os.getpid(), signal.SIGKILL)
        os.link = counted
        with atomic_files(paths) as folder:
            for path in paths:
                (folder / path.name).write_text("first")
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(published), *paths], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sum(path.exists() for path in paths) == published
    if published == 3:
        with pytest.raises(OutputError, match="exists already; pass --force"), atomic_files(paths):
            pass
        assert [path.read_text() for path in paths] == ["first"] * 3
    else:
        with atomic_files(paths) as folder:
            for path in paths:
                (folder / path.name).write_text("second")
        assert [path.read_text() for path in paths] == ["second"] * 3
    assert sorted(tmp_path.iterdir()) == paths


def test_a_split_file_is_not_read_by_transformers(split):
    from npti_export.runtimes.transformers import TransformersRuntime

    with pytest.raises(ModelError, match="is split into 5 files, which transformers cannot read; take"):
        TransformersRuntime(gguf_source(split), device="cpu", dtype="float32")


@pytest.mark.parametrize("stem", ["ffn_gate", "ffn_up", "ffn_down"])
def test_mlp_biases_are_not_read_by_transformers(make_tiny, stem):
    from npti_export.runtimes.transformers import TransformersRuntime

    with pytest.raises(ModelError, match="its MLPs have biases, which transformers does not read"):
        TransformersRuntime(gguf_source(make_tiny(biases=(stem,))), device="cpu", dtype="float32")


def test_the_main_job_on_a_split_base(split, tiny_checkpoint, cli_environment, tmp_path):
    """Identified on the transformers model, baked into the split file of it; used again, inspected, stripped."""

    def run(*args):
        return npti(*args, environment=cli_environment, cwd=tmp_path)

    common = ["--model", str(tiny_checkpoint), "--base", str(split)]
    files = shard_paths(tmp_path / "s.gguf", COUNT)
    if sys.platform != "win32":  # parts of a killed job are no reason to refuse, neither before the work nor after it
        assert killed_while_placing(files, "left", 3, force=False)
        assert [path.exists() for path in files] == [False, True, True, True, False]
    done = run("--trait", "calm", "--recipe", "npti", *common, "--out", "s.gguf", "--report", "r.json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.glob("s*")) == files
    artifact = json.loads((tmp_path / "r.json").read_text())["artifact"]
    assert artifact["path"] == files[0].name
    assert artifact["sha256"] == {path.name: sha256_file(path) for path in files}
    assert artifact["base_sha256"] == {path.name: sha256_file(path) for path in named_shards(split)}
    assert artifact["bytes"] == sum(path.stat().st_size for path in files)
    assert kl(llama_logits(split), llama_logits(files[0])) > 1e-3
    again = run("--trait", "calm", "--recipe", "npti", *common, "--out", "s.gguf", *QUICK)
    assert (again.returncode, "pass --force" in again.stderr) == (2, True)
    inputs = run("--trait", "calm", "--recipe", "npti", *common, "--out", str(split), "--force", *QUICK)
    assert (inputs.returncode, "is an input of this very job" in inputs.stderr) == (2, True)
    assert "files" in run("inspect", files[0].name).stdout
    done = run("strip", files[0].name, "--out", "b.gguf")
    assert done.returncode == 0, done.stderr
    for was, now in zip(named_shards(split), shard_paths(tmp_path / "b.gguf", COUNT), strict=True):
        assert now.read_bytes() == was.read_bytes()
    done = run("--from", files[0].name, *common, "--out", "again.gguf")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(llama_logits(files[0]), llama_logits(tmp_path / "again-00001-of-00005.gguf"))


FEW = ["--set", "select.at_least=10", "--set", "select.at_most=10"]  # the narrowest layer here has 64 neurons
JOBS = [
    {"family": "qwen2", "split": 8},
    {"biases": ("ffn_gate", "ffn_up")},
    {"family": "deci", "width": (96, 0, 64)},
]


@pytest.mark.parametrize("sizes", JOBS, ids=str)
def test_the_main_job_inside_llama_cpp(make_tiny, cli_environment, tmp_path, sizes):
    """What transformers does not read: a split file, MLP biases, a width a layer. Identified, baked, verified."""
    model = make_tiny(**sizes)
    done = npti(*main_job(model, "s.gguf", "--report", "r.json", *FEW), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    out = tmp_path / report["artifact"]["path"]
    assert report["fidelity"]["kl_rule_artifact"] < report["fidelity"]["limit"]
    assert kl(llama_logits(model), llama_logits(out)) > 1e-3
    strip(out, tmp_path / "b.gguf", force=False)
    for was, now in zip(named_shards(model), shard_paths(tmp_path / "b.gguf", len(named_shards(model))), strict=True):
        assert now.read_bytes() == was.read_bytes()
    second = named_shards(out)[-1]
    again = npti("--from", out, "--out", second, "--force", environment=cli_environment, cwd=tmp_path)
    assert (again.returncode, "an input of this very job" in again.stderr) == (2, True), again.stderr
