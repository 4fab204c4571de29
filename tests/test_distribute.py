"""What workers give back is merged as one process would have counted it, in whatever order it comes."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import QUICK
from tolerances import SUMS_FLOAT64

from npti_export.bench import load_bench
from npti_export.distribute.cluster import gpus_of, size_of
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Distribution, Outcome, Series, Setup
from npti_export.distribute.worker import Worker, files_digest
from npti_export.errors import ClusterError, ProfileError
from npti_export.gguf.reader import read_gguf
from npti_export.identify.collect import save_state
from npti_export.identify.shards import FAN, Node, Shards, covering
from npti_export.loader import Models, RuntimeSettings
from npti_export.models import gguf_source, resolve_model
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.stats import BIN_COUNT, ActivationStats, AnswerCounts, ContrastStats, PairSpread
from npti_export.stats import load_stats as load
from npti_export.version import __version__


def random_stats(shape, seed):
    """What a batch of two questions could give: counts, and sums that do not add up exactly."""
    rng = np.random.default_rng(seed)

    def pole():
        active = rng.integers(0, 40, (2, shape.layers, shape.width)).astype(np.int32)
        histogram = rng.integers(0, 9, (shape.layers, shape.width, BIN_COUNT)).astype(np.int32)
        largest = rng.random((shape.layers, shape.width), np.float32)
        product = rng.normal(size=(2, shape.layers, shape.width)) * 10.0 ** rng.integers(-6, 6)
        stats = ActivationStats(80, active.sum(0, dtype=np.int64), histogram, largest, product=product)
        return stats, AnswerCounts(active, np.array([40, 40]))

    (plus, one), (minus, other) = pole(), pole()
    return ContrastStats(plus, minus, PairSpread.of_answers(one, other))


def outcome(gathering, index, stats):
    tokens = stats.plus.tokens + stats.minus.tokens
    data = gathering.shards.encode(Node(0, index), stats)
    return Outcome("here:1", stats=stats.counts(), data=data, tokens=tokens)


def assert_counts_equal(left, right):
    for one, other in ((left.plus, right.plus), (left.minus, right.minus)):
        assert one.tokens == other.tokens
        for name in ("active", "histogram", "largest"):
            found, wanted = getattr(one, name), getattr(other, name)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
    assert (left.spread.pairs, left.spread.lengths) == (right.spread.pairs, right.spread.lengths)
    np.testing.assert_array_equal(left.spread.products, right.spread.products)
    np.testing.assert_array_equal(left.spread.mixed, right.spread.mixed)


@pytest.fixture
def series(tmp_path):
    """19 batches of two questions and one of one."""
    recipe = load_recipe("npti", ["identify.questions=39", "identify.batch_size=4", "identify.until=all"])
    return Series(load_bench("openness"), recipe, tmp_path / "identify" / "openness-key.safetensors")


@pytest.fixture
def source(tiny):
    return gguf_source(tiny)


def gather(series, source, order, parts, merging):
    gathering = Gathering(series, source, Silent())
    gathering.shards.prepare()
    for index in order:
        gathering.answered(index, outcome(gathering, index, parts[index]))
        for node in list(gathering.merges(())) if merging else []:
            gathering.merge(node)
    assert gathering.complete
    gathering.finish()
    return series.state.read_bytes()


def test_every_order_gives_the_same_bytes_and_the_counts_of_one_process(series, source, tmp_path):
    parts = [random_stats(source.shape, seed) for seed in range(series.batches)]
    assert series.batches == 20
    orders = [list(range(20)), list(reversed(range(20))), np.random.default_rng(0).permutation(20).tolist()]
    files = set()
    for number, order in enumerate(orders):
        for merging in (False, True):
            own = replace(series, state=tmp_path / f"{number}{merging}" / "openness-key.safetensors")
            files.add(gather(own, source, order, parts, merging))
            assert not own.shards.exists()
    assert len(files) == 1
    found, record = load(own.state)
    assert record == {"batches": 20, "of": series.state.stem}
    plain = ContrastStats.empty(source.shape.layers, source.shape.width)
    for part in parts:
        plain += part
    assert_counts_equal(found, plain)
    for one, other in ((found.plus, plain.plus), (found.minus, plain.minus)):
        size = sum(np.abs(getattr(part, "plus" if other is plain.plus else "minus").product) for part in parts)
        assert (np.abs(one.product - other.product) <= SUMS_FLOAT64 * size).all()
    assert (found.plus.product != plain.plus.product).any()  # the tree does sum in another order


def test_a_run_goes_on_from_the_shards_that_are_there(series, source):
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    first = Gathering(series, source, Silent())
    first.shards.prepare()
    for index in (*range(10), 12, 19):
        first.answered(index, outcome(first, index, parts[index]))
    for node in list(first.merges(())):
        first.merge(node)
    assert first.shards.found() == {Node(1, 0), Node(0, 8), Node(0, 9), Node(0, 12), Node(0, 19)}
    again = Gathering(series, source, Silent())
    assert (again.prefix, again.found, again.asked) == (10, 12, 2 * 11 + 1)
    asked = []
    while (index := again.next((), 99)) is not None:
        asked.append(index)
        again.answered(index, outcome(again, index, parts[index]))
    assert asked == [10, 11, *range(13, 19)]
    again.finish()
    whole = replace(series, state=series.state.parent / "whole" / series.state.name)
    assert series.state.read_bytes() == gather(whole, source, range(20), parts, True)


def test_a_damaged_shard_is_asked_again_and_a_double_one_counts_once(series, source):
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    first = Gathering(series, source, Silent())
    first.shards.prepare()
    for index in range(4):
        first.answered(index, outcome(first, index, parts[index]))
    other = replace(parts[2].plus, product=parts[2].plus.product * (1 + 1e-15))  # another processor's
    first.shards.write(Node(0, 2), first.shards.encode(Node(0, 2), replace(parts[2], plus=other)))
    assert len(list(series.shards.glob("0-2.*"))) == 2
    (path,) = series.shards.glob("0-1.*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="damaged"):
        first.shards.read(Node(0, 1), path.name)
    notes, told = [], Silent()
    told.note = notes.append
    again = Gathering(series, source, told)
    assert len(notes) == 1
    assert "shard 1 is damaged" in notes[0]
    assert (again.next((), 99), again.next({1}, 99)) == (1, 4)
    for index in (1, *range(4, 20)):
        again.answered(index, outcome(again, index, parts[index]))
    again.finish()
    plain = sum(parts[1:], parts[0])
    assert_counts_equal(load(series.state)[0], plain)


def test_a_shard_that_is_damaged_during_the_run_is_noticed_at_the_end(series, source):
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    gathering = Gathering(series, source, Silent())
    gathering.shards.prepare()
    for index in range(20):
        gathering.answered(index, outcome(gathering, index, parts[index]))
    (path,) = series.shards.glob("0-7.*")
    path.write_bytes(path.read_bytes()[:-9])
    assert gathering.complete
    gathering.finish()
    assert not gathering.finished
    assert gathering.next((), 99) == 7
    gathering.answered(7, outcome(gathering, 7, parts[7]))
    gathering.finish()
    assert gathering.finished
    assert_counts_equal(load(series.state)[0], sum(parts[1:], parts[0]))


@pytest.mark.parametrize("what", ["another job", "a flipped bit"])
def test_a_state_that_changes_during_the_run_is_not_added_to(series, source, what):
    """What it holds is counted anew: batches are neither counted twice nor left out."""
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    held = 9 if what == "a flipped bit" else 0
    if held:
        save_state(series.state, sum(parts[1:9], parts[0]), 9)
    gathering = Gathering(series, source, Silent())
    gathering.shards.prepare()
    for index in range(held, 20):
        gathering.answered(index, outcome(gathering, index, parts[index]))
    if held:
        data = bytearray(series.state.read_bytes())
        data[-1] ^= 1
        series.state.write_bytes(data)
    else:  # by one process, with the same key
        save_state(series.state, sum(parts[1:9], parts[0]), 9)
    gathering.finish()
    assert not gathering.finished
    while (index := gathering.next((), 99)) is not None:
        gathering.answered(index, outcome(gathering, index, parts[index]))
    gathering.finish()
    assert gathering.finished
    stats, record = load(series.state)
    assert record == {"batches": 20, "of": series.state.stem}
    assert_counts_equal(stats, sum(parts[1:], parts[0]))


def test_only_so_many_are_asked_behind_a_gap(series, source):
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    gathering = Gathering(series, source, Silent())
    gathering.shards.prepare()
    asked = []
    while (index := gathering.next({0}, 4)) is not None:  # the first one hangs
        asked.append(index)
        gathering.answered(index, outcome(gathering, index, parts[index]))
    assert asked == [1, 2, 3]
    gathering.answered(0, outcome(gathering, 0, parts[0]))
    assert gathering.next((), 4) == 4


def test_a_model_is_known_by_its_files(tiny, tmp_path):
    """Other weights of the same size and norms are another model."""
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    assert files_digest(gguf_source(copy)) == files_digest(gguf_source(tiny))  # wherever it lies
    data = bytearray(copy.read_bytes())
    weight = next(tensor for tensor in read_gguf(tiny).tensors if tensor.name == "blk.1.ffn_down.weight")
    data[weight.offset : weight.offset + weight.nbytes] = bytes(weight.nbytes)
    copy.write_bytes(data)
    assert gguf_source(copy).fingerprint == gguf_source(tiny).fingerprint
    assert files_digest(gguf_source(copy)) != files_digest(gguf_source(tiny))


def test_a_directory_is_known_by_its_small_files_too(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "m")
    before = files_digest(resolve_model(str(tmp_path / "m")))
    assert before == files_digest(resolve_model(str(tiny_checkpoint)))
    (tmp_path / "m/tokenizer_config.json").write_text("{}")
    assert files_digest(resolve_model(str(tmp_path / "m"))) != before


def test_what_is_asked_beyond_the_end_is_kept_for_a_run_that_asks_more(series, source):
    parts = [random_stats(source.shape, seed) for seed in range(20)]
    early = replace(series, recipe=load_recipe("npti", [
        "identify.questions=39", "identify.batch_size=4", "identify.floor=6", "identify.overlap=0.0001",
    ]))  # fmt: skip
    notes, told = [], Silent()
    told.note = notes.append
    gathering = Gathering(early, source, told)
    gathering.shards.prepare()
    for index in (5, 4, 2, 1, 0):  # three batches are enough
        assert not gathering.complete
        gathering.answered(index, outcome(gathering, index, parts[index]))
    assert (gathering.prefix, gathering.complete) == (3, True)
    gathering.finish()
    assert notes[0].startswith("stopped after 6 of 39 questions")
    assert_counts_equal(load(series.state)[0], sum(parts[1:3], parts[0]))
    rest = Gathering(series, source, Silent())
    assert (rest.prefix, rest.found, rest.next((), 99)) == (3, 2, 3)
    for index in (3, *range(6, 20)):
        rest.answered(index, outcome(rest, index, parts[index]))
    rest.finish()
    assert_counts_equal(load(series.state)[0], sum(parts[1:], parts[0]))


def test_the_tree_covers_each_batch_once():
    for first, end in ((0, 1), (0, FAN), (3, 100), (0, 1000), (FAN, FAN * FAN + 1), (5, 5)):
        nodes = list(covering(first, end))
        batches = [at for node in nodes for at in range(node.first, node.end)]
        assert batches == list(range(first, end))
        assert all(child.parent == node for node in nodes if node.level for child in node.children)
        assert [child.first for child in Node(2, 1).children] == list(range(FAN * FAN, 2 * FAN * FAN, FAN))
    assert [(node.level, node.index) for node in covering(6, 20)] == [
        (0, 6),
        (0, 7),
        (1, 1),
        *((0, at) for at in range(16, 20)),
    ]


def nodes(*resources):
    return [{"Alive": True, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu in resources]


def test_workers_fit_into_the_cluster():
    def size(there, workers, threads=0, gpu=False, each=None, device="auto"):
        settings = RuntimeSettings(threads=threads, device=device)
        found = size_of(there, Distribution(workers, gpus=each), settings, gpu=gpu)
        return found.workers, found.threads, found.gpus

    assert size(nodes((2, 0)), 2) == (2, 1, 0)
    assert size(nodes((2, 0)), None) == (1, 2, 0)
    assert size(nodes((16, 0), (8, 0)), None) == (6, 4, 0)
    assert size(nodes((16, 0), (8, 0)), 4) == (4, 5, 0)  # three in one node, one in the other
    assert size(nodes((16, 4), (16, 4)), None, gpu=True) == (8, 4, 1)
    assert size(nodes((16, 4)), 3, threads=2) == (3, 2, 0)
    assert size(nodes((16, 4), (16, 3)), None, gpu=True, each=2) == (3, 8, 2)  # a worker's GPUs are of one node
    assert size(nodes((16, 4), (16, 4)), None, gpu=True, device="map") == (2, 16, 4)
    assert size(nodes((16, 8)), None, gpu=True, each=4, device="map") == (2, 8, 4)
    assert size(nodes((4, 0)), None, gpu=True, device="map") == (1, 4, 0)
    assert size(nodes((64, 0), (16, 4)), None, gpu=True, each=4) == (1, 16, 4)  # cores where the GPUs are
    assert size(nodes((64, 0), (8, 8)), None, gpu=True, device="map") == (1, 8, 8)
    assert size(nodes((2, 8), (8, 2)), None, gpu=True) == (4, 1, 1)
    dead = nodes((64, 0))[0] | {"Alive": False}
    assert size([dead, *nodes((2, 0))], 2) == (2, 1, 0)
    for there, workers, threads, each, says in (
        (nodes((2, 0)), 3, 0, None, "2 cores"),
        (nodes((2, 0), (2, 0)), 2, 4, None, "--threads 4: the cluster has 2 \\+ 2 cores"),
        ([], 1, 0, None, "no cores"),
        (nodes((8, 1)), 2, 0, None, "takes a GPU and a core, and the cluster has 1; give at most 1"),
        (nodes((8, 3), (8, 3)), 3, 0, 2, "takes 2 GPUs of one node and a core, .* has 3 \\+ 3; give at most 2"),
        (nodes((8, 0)), None, 0, 1, "--gpus 1: .* leave --gpus out"),
        (nodes((8, 3), (8, 3)), None, 0, 4, "--gpus 4: .* no node has more than 3"),
    ):
        with pytest.raises(ClusterError, match=says):
            size(there, workers, threads, gpu=True, each=each)
    with pytest.raises(ClusterError, match=r"8 \+ 1 GPUs; say with --gpus"):
        size(nodes((8, 8), (8, 1)), None, gpu=True, device="map")


def test_a_node_that_cannot_go_on_is_named_in_one_sentence(series, source, tmp_path, monkeypatch):
    """A disk that is full there, or a folder that is not there, is no mistake of the program's."""
    setup = Setup(
        source, files_digest(source), None, RuntimeSettings(), 4, tmp_path / "mark", tmp_path, "driver", __version__
    )
    worker = Worker(setup)

    def full(_self, _task, _series):
        raise OSError(28, "No space left on device", "/tmp/npti-x")

    monkeypatch.setattr(Worker, "_run", full)
    fault = worker.run(None, series)
    assert fault.kind == "ClusterError"
    assert fault.text.startswith(f"the worker {worker.process} cannot go on: [Errno 28] No space left on device")
    monkeypatch.setattr(Models, "dtype", lambda _self: full(None, None, None))
    assert worker.hello().kind == "ClusterError"


def test_gpus_of_living_nodes():
    there = nodes((4, 2), (4, 0), (4, 1))
    there[2]["Alive"] = False
    assert gpus_of(there) == 2


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from npti_export.cli import main
main()
"""


def test_without_ray_one_sentence_says_how_to_get_it(tiny, cli_environment, tmp_path):
    job = ["identify", "--trait", "openness", "--model", str(tiny), "--recipe", "npti", *QUICK[:6], "--out", "p"]
    command = [sys.executable, "-c", WITHOUT, *job]
    ask = {"capture_output": True, "text": True, "env": cli_environment, "cwd": tmp_path}
    done = subprocess.run([*command, "--engine", "ray"], **ask)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "npti-export: --engine ray needs ray, which is not installed: pip install 'npti-export[ray]'"
    ]
    done = subprocess.run([*command, "--workers", "2"], **ask)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--workers goes with --engine ray" in done.stderr
    done = subprocess.run([*command, "--gpus", "2"], **ask)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--gpus goes with --engine ray" in done.stderr
    done = subprocess.run(command, **ask)  # and nothing else needs it
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path, "p").is_file()


def test_shards_of_unknown_names_are_left_alone(tmp_path):
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    shards = Shards(tmp_path)
    assert shards.found() == set()
    shards.close()
    assert (tmp_path / "notes.safetensors").is_file()
