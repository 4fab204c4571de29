"""GGUF files and importance matrices; ``fuzz_gguf.py`` gives them many more, and mutations of their structure."""

import functools
import shutil
import tempfile
from pathlib import Path

import fuzz_gguf
import fuzz_seeds
from imatrix import sums_for, write_legacy

from fuzz_targets.target import Target, plain, text
from npti_export.export.gguf import check_base
from npti_export.gguf.shards import named_shards, read_model, shard_paths


def _gguf(name):
    """A reader of GGUF files; ``fuzz_gguf.py`` gives it many more files, and mutations of their structure."""

    def read(path):
        work = path.parent / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        fuzz_gguf.TARGETS[name](path, work)

    return read


@functools.cache
def _gguf_seeds():
    with tempfile.TemporaryDirectory() as folder:
        return {name: parts[0] for name, parts in fuzz_seeds.write_seeds(Path(folder)).items() if len(parts) == 1}


def _gguf_files(kind):
    """Those of a kind: ``steered``, ``matrix``, ``vector`` or ``base``."""

    def prepare(folder):
        if kind == "base":
            return [data for name, data in _gguf_seeds().items() if "steered" not in name and "matrix" not in name]
        return [data for name, data in _gguf_seeds().items() if kind in name]

    return prepare


def _legacy(folder):
    fuzz_seeds.write_base(folder / "base.gguf")
    write_legacy(folder / "m.dat", sums_for(read_model(folder / "base.gguf")))
    return [(folder / "m.dat").read_bytes()]


def _overlaps(path):
    """What the reader accepts lies inside the file, and no two tensors share a byte."""
    header = read_model(path)
    ends = 0
    for one in sorted(header.parts[0].tensors, key=lambda tensor: tensor.offset):
        assert one.offset >= max(ends, header.parts[0].data_start), one.name
        ends = one.offset + one.nbytes
        assert ends <= path.stat().st_size, one.name
    check_base(header, "uniform")


def _split_folder(steered, part):
    """A model of two files or its steered files, one of which is damaged."""

    def prepare(folder):
        fuzz_seeds.write_base(folder / "m.gguf", "Q8_0", "F32", "Q4_0", split_max_tensors=9)
        paths = sorted(folder.iterdir())
        assert len(paths) == len(named_shards(paths[0])) == 2
        if steered:
            fuzz_seeds.steer(paths[0], folder / "steered-00001-of-00002.gguf")
            for path in paths:
                path.unlink()
            for path in sorted(folder.iterdir()):
                path.rename(path.with_name(path.name.replace("steered", "m")))
        return [(folder / f"m-0000{part}-of-00002.gguf").read_bytes()]

    return prepare


def _split(name):
    """The whole model, by its first file."""
    read = _gguf(name)
    return lambda path: read(path.with_name("m-00001-of-00002.gguf"))


def _shard_name(text):
    """What a name stands for lies beside it: nothing leads elsewhere, and there are no more than five digits tell."""
    path = Path("folder") / f"{text[:200]}.gguf"
    for one in [*named_shards(path), *shard_paths(path, 3)]:
        assert one.parent == path.parent
    assert len(named_shards(path)) < 10**5


TARGETS = {
    **{
        f"split-{name}-{part}": Target(
            "bytes", f"m-0000{part}-of-00002.gguf", _split_folder(name == "strip", part), _split(name)
        )
        for name in ("bake", "strip")
        for part in (1, 2)
    },
    "split-name": Target("text", "t", plain("m-00001-of-00003", "m", "m-00002-of-00003"), text(_shard_name)),
    "imatrix-dat": Target("bytes", "m.dat", _legacy, _gguf("importance")),
    "overlaps": Target("bytes", "m.gguf", _gguf_files("base"), _overlaps),
    **{
        f"gguf-{name}": Target("bytes", "m.gguf", _gguf_files(kind), _gguf(name))
        for name, kind in {
            "read": "base",
            "source": "base",
            "inspect": "base",
            "rule": "mixed-steered",
            "bake": "base",
            "strip": "mixed-steered",
            "requantise": "float",
            "importance": "matrix",
            "directions": "vector",
        }.items()
    },
}
