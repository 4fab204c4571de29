"""What a stopped run goes on from: statistics, constants, shards; and what other runs may have left beside it.

Kept files carry a checksum, so that a damaged one is not believed. ``signed`` puts a right one into a damaged file:
what is behind the checksum has to hold by itself, as anybody can compute one.
"""

import hashlib
import json
import shutil
import struct
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from own_trait import write_trait

from fuzz_targets.target import HIDDEN, LAYERS, WIDTH, Target, plain
from npti_export.bench import load_bench
from npti_export.checked import load_checked, save_checked
from npti_export.cli.long_runs import _check_log
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Outcome, Series
from npti_export.distribute.spread import _sweep_marks
from npti_export.files import is_ours
from npti_export.identify.collect import resume, save_state
from npti_export.identify.profiles import encode_constant, kept_constant
from npti_export.identify.shards import Node, Shards
from npti_export.models import ModelShape
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.stats import ActivationStats, ContrastStats, PairSpread, encode_stats, load_stats, save_stats
from npti_export.temporaries import sweep

SOURCE = SimpleNamespace(shape=ModelShape(LAYERS, WIDTH, HIDDEN))
NARROW = SimpleNamespace(shape=ModelShape(LAYERS, 5, HIDDEN))  # statistics hold a histogram for each neuron
BATCHES = 3


def signed(data):
    """The file with the checksum that it should have, if it is one that can have any."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        record = json.loads(data[8 : 8 + length])["__metadata__"]["npti"]
        old = b'"npti":"sha256:' + record[7:71].encode() + b" "
        new = b'"npti":"sha256:' + b"0" * 64 + b" "
        if len(record[7:71]) == 64 and data.count(old) == 1:
            blank = data.replace(old, new)
            return blank.replace(new, new.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode()), 1)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return data


def _sign(path):
    path.write_bytes(signed(path.read_bytes()))


def _checked(path):
    """Whole, and the same when it is kept again."""
    _sign(path)
    arrays, record = load_checked(path)
    save_checked(path, arrays, record)
    again, said = load_checked(path)
    assert json.dumps(said) == json.dumps(record)
    assert {name: (one.dtype, one.shape, one.tobytes()) for name, one in arrays.items()} == {
        name: (one.dtype, one.shape, one.tobytes()) for name, one in again.items()
    }


def _stats(path):
    stats, progress = load_stats(path)
    assert isinstance(progress, dict)
    shape = stats.plus.active.shape
    for one in (stats.plus, stats.minus):
        assert one.active.shape == one.largest.shape == one.histogram.shape[:2] == shape
        assert one.tokens >= 0
        assert one.active.dtype == np.int64
    assert stats.spread.products.shape == (3, *shape)
    assert stats.spread.mixed.shape == (4, *shape)
    save_stats(path, stats + stats, progress)


def _signed_stats(path):
    _sign(path)
    _stats(path)


def _resumed(path):
    """Whatever is there, a run goes on or begins anew; it raises nothing."""
    _sign(path)
    stats, done = resume(path, NARROW, Silent())
    assert stats.plus.active.shape == stats.minus.active.shape == (LAYERS, 5)
    assert type(done) is int
    assert done >= 0
    (stats + some_stats(1)).spread.delta_variance(some_stats(1).plus, some_stats(1).minus)


def _constant(path):
    for sign in (False, True):
        if sign:
            _sign(path)
        values = kept_constant(path, SOURCE)
        if values is not None:
            assert values.shape == (LAYERS, WIDTH)
            assert values.dtype == np.float32
            assert np.isfinite(values).all()


def some_stats(seed, layers=LAYERS, width=5):
    """Counts of one question, that fit together."""
    rng = np.random.default_rng(seed)

    def pole():
        stats = ActivationStats.empty(layers, width)
        active = rng.integers(0, 9, (layers, width))
        histogram = stats.histogram.copy()
        histogram[..., 3] = active
        largest = rng.random((layers, width)).astype(np.float32)
        return ActivationStats(9, active, histogram, largest, None, rng.random((2, layers, width)))

    spread = PairSpread(1, (81, 81, 81), *(rng.integers(0, 81, (count, layers, width)) for count in (3, 4)))
    return ContrastStats(pole(), pole(), spread)


@cache
def _bench_of(folder):
    return load_bench("pirate", folder)


def _series(folder):
    asked = load_recipe("npti", ["identify.questions=6", "identify.batch_size=4", "identify.until=all"])
    return Series(_bench_of(folder / "trait"), asked, folder / "pirate.safetensors")


def _shard_folder(folder):
    write_trait(folder / "trait")
    return [shard_of(some_stats(1)), shard_of(some_stats(1, width=6))]


def shard_of(stats):
    """The file of the second batch, as a worker writes it."""
    return Shards(Path("pirate.shards")).encode(Node(0, 1), stats)


def _gather(folder, put):
    """Shards of three batches, the second one's put there by ``put``: gathered, the rest asked, and merged."""
    series = _series(folder)
    series.state.unlink(missing_ok=True)
    shutil.rmtree(series.shards, ignore_errors=True)
    series.shards.mkdir()
    assert series.batches == BATCHES
    shards = Shards(series.shards)
    for index in (0, 2):
        shards.write(Node(0, index), shards.encode(Node(0, index), some_stats(index)))
    put(series.shards)
    gathering = Gathering(series, NARROW, Silent())
    while (index := gathering.next((), BATCHES)) is not None:
        stats = some_stats(index)
        data = shards.encode(Node(0, index), stats)
        gathering.answered(index, Outcome("here", stats=stats.counts(), data=data))
    gathering.finish()
    assert gathering.finished
    stats, done = resume(series.state, NARROW, Silent())
    assert done == BATCHES
    assert stats.plus.active.shape == (LAYERS, 5)


def _shard(path):
    data = path.read_bytes()

    def put(shards):
        for content in {data, signed(data)}:
            (shards / f"0-1.{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)

    _gather(path.parent, put)


def _name(path):
    """The text as a file's name, where a file can have it."""
    name = path.read_bytes().decode("utf-8", "replace")
    return None if not name or "/" in name or "\0" in name or name in (".", "..") or len(name.encode()) > 255 else name


def _shard_name(path):
    name = _name(path)

    def put(shards):
        if name is not None:
            (shards / name).write_bytes(shard_of(some_stats(1)))

    _gather(path.parent, put)


def _leftover(path):
    """A sweep takes what is a killed job's by its name, and nothing else."""
    name, place = _name(path), path.parent / "swept"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "m.gguf").write_bytes(b"whole")
    if name is not None:
        (place / name).write_bytes(b"whole" if name == "m.gguf" else b"x")
    sweep(place / "m.gguf")
    _sweep_marks(place)
    assert (place / "m.gguf").read_bytes() == b"whole"
    if name is not None and not (name.startswith(".m.gguf.") and name.endswith((".partial", ".replaced"))):
        assert (place / name).is_file()


def _log(path):
    _check_log(path)
    first = path.read_bytes().partition(b"\n")[0]
    assert not first or b"npti-export" in first


def _replaceable(path):
    """--force takes a folder of ours away, and no other."""
    if is_ours(path.parent):
        assert b"npti_dial" in path.read_bytes()


def _stats_folder(folder):
    save_stats(folder / "s.safetensors", ContrastStats.empty(LAYERS, 5), {"done": 3})
    return [(folder / "s.safetensors").read_bytes(), encode_stats(some_stats(1), {"done": 1})]


def _state_folder(folder):
    save_state(folder / "s.safetensors", some_stats(2), 3)
    return [(folder / "s.safetensors").read_bytes()]


_HALF = encode_constant(np.full((LAYERS, WIDTH), 0.5, np.float32))
_LOG = "2026-01-01 00:00:00,000 1 npti-export 0.1.0: --trait calm\n2026-01-01 00:00:01,000 1 begins\n"
_SHARD, _HIGH = f"0-1.{'0' * 64}.safetensors", f"{'9' * 12}-0.{'0' * 64}.safetensors"
_LEFT = (".m.gguf.abcdefgh.partial", ".m.gguf.abcdefgh.replaced", f".{'0' * 32}.shared")

TARGETS = {
    "stats": Target("safetensors", "s.safetensors", _stats_folder, _stats),
    "stats-signed": Target("safetensors", "s.safetensors", _stats_folder, _signed_stats),
    "state": Target("safetensors", "s.safetensors", _state_folder, _resumed, ()),
    "kept-arrays": Target("safetensors", "s.safetensors", lambda folder: [_HALF, *_stats_folder(folder)], _checked),
    "kept-constant": Target("safetensors", "s.safetensors", plain(_HALF), _constant, ()),
    "shard": Target("safetensors", "s.safetensors", _shard_folder, _shard, ()),
    "shard-name": Target(
        "text", "t", lambda folder: [*_shard_folder(folder)[2:], _SHARD.encode(), _HIGH.encode()], _shard_name, ()
    ),
    "leftover": Target("text", "t", plain(*_LEFT), _leftover, ()),
    "log": Target("text", "r.log", plain(_LOG), _log),
    "force": Target("json", "index.json", plain('{"npti_dial": 1}', '{"x": 2}'), _replaceable, ()),
}
