"""Identification on real Ray clusters of several nodes on this machine, whose workers, nodes and drivers are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from jobs import COMMAND, ENDS_WITH_US
from test_distribute import assert_counts_equal
from tolerances import SUMS_FLOAT64

from npti_export.bench import load_bench
from npti_export.distribute.plan import Distribution
from npti_export.distribute.spread import Request, answered
from npti_export.errors import ClusterError, ModelError
from npti_export.identify.collect import cache_key, collect, state_path
from npti_export.identify.profiles import Place, identified, kept_constant, match, matched_path
from npti_export.identify.shards import Shards
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import resolve_model
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.stats import load_stats

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ray.cluster_utils.Cluster is for Linux")

# 20 batches of up to four answers, long enough to be killed in the middle, and two levels of the tree.
SETTINGS = ["identify.questions=39", "identify.batch_size=4", "identify.max_new_tokens=96", "identify.until=all"]
BATCHES = 20
KILLABLE = [*COMMAND[:2], f"{ENDS_WITH_US}; {COMMAND[2]}"]
JOB = ["identify", "--trait", "openness", "--recipe", "npti", "--questions", "39", "--batch-size", "4"]
JOB += ["--max-new-tokens", "96", "--until", "all", "--engine", "ray", "--workers", "2"]
LIMIT = 900  # seconds of a test, starts of Ray on a busy machine included
STARTS = 5  # of Ray, which gives up after half a minute
SOON_DEAD = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("npti", SETTINGS)


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny(decided=True)


@pytest.fixture(autouse=True)
def _every_test_ends():
    """Whatever Ray waits for: the driver looks at what came back twice a second, and an exception ends it then."""

    def expire(_signal, _frame):
        raise TimeoutError(f"not done after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, LIMIT, 30)  # again, where C code swallows it
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster():
    """A head without cores and two nodes of one core each; joined by this process."""
    from npti_export.distribute.cluster import import_ray

    ray = import_ray()
    from ray.cluster_utils import Cluster

    found = in_time(Cluster)
    try:
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def in_time(kind):
    """Ray gives up a process that does not start within half a minute, which no setting changes."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON_DEAD}
    for left in reversed(range(STARTS)):
        before, found = set(psutil.Process().children(recursive=True)), kind()
        try:
            found.add_node(**head)
            found.add_node(num_cpus=1)
            found.add_node(num_cpus=1)
        except Exception:  # a bare one
            found.shutdown()
            end(set(psutil.Process().children(recursive=True)) - before)  # what Ray has not taken note of
            if not left:
                raise
        else:
            return found
    raise AssertionError


def end(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=60)


class Notes(Silent):
    """Keeps what a user is told."""

    def __init__(self):
        self.texts, self.steps = [], 0

    def start(self, stage, total):
        self.stage, self.total, self.steps = stage, total, 0

    def advance(self, steps, tokens=0):
        self.steps += steps

    def note(self, text):
        self.texts.append(text)


def models_of(path, **settings):
    source = resolve_model(str(path))
    return source, Models(source, RuntimeSettings(**settings), Timings(), Silent(), verifies=False, sequences=4)


def on_ray(path, recipe, cache, traits=("openness",), workers=2, notes=None, **settings):
    """By the cluster that this process has joined: the merged statistics by trait, and the log."""
    source, models = models_of(path, **settings)
    place = Place(models.fast, source, models.dtype(), models.device(), cache)
    benches = {trait: load_bench(trait) for trait in traits}
    request = Request(benches, dict.fromkeys(traits, recipe), {}, recipe, str(path))
    with answered(request, Distribution(workers, "joined"), place, models, notes or Notes()) as (answers, log):
        return {
            trait: load_stats(state_path(cache, bench, cache_key(source, bench, recipe, answers.dtype, answers.device)))
            for trait, bench in benches.items()
        }, log


@pytest.fixture(scope="module")
def alone(model, recipe):
    """By trait, what one process counts."""
    source, models = models_of(model, threads=1)
    with models:
        return {
            trait: collect(
                models.fast, source, load_bench(trait), recipe, Silent(), dtype="ggml", device="cpu", cache=None
            )[0]
            for trait in ("openness", "extraversion")
        }


def assert_same(found, wanted):
    assert_counts_equal(found, wanted)
    for one, other in ((found.plus, wanted.plus), (found.minus, wanted.minus)):
        # a sum of squares bounds that of sizes: |x| <= (1 + x^2) / 2
        size = np.stack([(other.tokens + other.product[1]) / 2, other.product[1]])
        assert (np.abs(one.product - other.product) <= SUMS_FLOAT64 * size).all()


def workers_of(process):
    """Real processes of actors among those that ``process`` started."""
    return [child for child in process.children(recursive=True) if title(child).startswith("ray::Worker")]


def title(process):
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # or a zombie
        return ""


def until(happens):
    """Wait for it."""
    limit = time.monotonic() + LIMIT / 3
    while not happens() and time.monotonic() < limit:
        time.sleep(0.05)
    assert happens()


def shards_in(cache):
    return sorted(cache.glob("identify/*.shards/*.safetensors"))


class Meanwhile(threading.Thread):
    """Does something once so many shards are there; its result must be looked at."""

    def __init__(self, cache, count, what):
        super().__init__(daemon=True)
        self.cache, self.count, self.what, self.result = cache, count, what, None
        self.start()

    def run(self):
        limit = time.monotonic() + LIMIT / 3
        while time.monotonic() < limit:
            if len(shards_in(self.cache)) >= self.count:
                self.result = self.what()
                return
            time.sleep(0.002)


def test_two_workers_count_what_one_process_counts(cluster, model, recipe, alone, tmp_path):
    """Two traits, one set of workers."""
    notes = Notes()
    stats, log = on_ray(model, recipe, tmp_path, ("extraversion", "openness"), notes=notes)
    for trait, (found, record) in stats.items():
        assert_same(found, alone[trait])
        assert record["batches"] == BATCHES
    asked = sorted((one.trait, one.index) for one in log.asked)
    assert asked == [(trait, index) for trait in ("extraversion", "openness") for index in range(BATCHES)]
    assert (log.restarted, log.lost) == (0, 0)
    assert log.merged >= 2  # sums of eight, made by workers
    assert (notes.stage, notes.steps, notes.total) == ("identify extraversion, openness", 78, 78)
    kept = [path for path in (tmp_path / "identify").iterdir() if path.suffix != ".lock"]
    assert [path.suffix for path in kept] == [".safetensors"] * 2
    _, again = on_ray(model, recipe, tmp_path, ("extraversion", "openness"))
    assert again.asked == []


def test_it_stops_where_one_process_stops(cluster, model, tmp_path):
    few = ["select.at_least=30", "select.at_most=30", "identify.floor=8", "identify.overlap=0.45"]
    recipe = load_recipe("npti", [*SETTINGS[:3], *few])
    source, models = models_of(model, threads=1)
    with models:
        place = Place(models.fast, source, "ggml", "cpu", None)
        wanted, profile = identified(place, load_bench("openness"), recipe, Silent())
    assert 8 <= profile.origin["questions"] < 38
    notes = Notes()
    stats, log = on_ray(model, recipe, tmp_path, notes=notes)
    found, record = stats["openness"]
    assert record["batches"] == profile.origin["questions"] // 2
    assert_same(found, wanted)
    assert any(text.startswith(f"stopped after {profile.origin['questions']} of 39") for text in notes.texts)
    assert record["batches"] <= len(log.asked) < BATCHES  # how far the faster worker is ahead depends on the machine


def test_a_worker_that_is_killed_is_started_again(cluster, model, recipe, alone, tmp_path):
    """The only one, so that nobody else can be done before it is back."""
    until(lambda: not workers_of(psutil.Process()))  # those of the tests before

    def kill():
        (victim,) = workers_of(psutil.Process())
        victim.send_signal(signal.SIGKILL)
        return victim.pid

    notes, killing = Notes(), Meanwhile(tmp_path, 3, kill)
    stats, log = on_ray(model, recipe, tmp_path, workers=1, notes=notes)
    killing.join()
    assert killing.result is not None
    assert log.restarted == 1
    assert [f":{killing.result} died; Ray started it again" in text for text in notes.texts] == [True]
    assert_same(stats["openness"][0], alone["openness"])
    assert sorted(one.index for one in log.asked) == list(range(BATCHES))


def test_a_node_that_is_lost_takes_no_answer_with_it(cluster, model, recipe, alone, tmp_path):
    """Its worker finds no other place; what it was at is done by those that are left."""
    import ray

    node = cluster.add_node(num_cpus=1)
    removing = Meanwhile(tmp_path, 3, lambda: cluster.remove_node(node, allow_graceful=False) or "removed")
    stats, log = on_ray(model, recipe, tmp_path, workers=3)
    removing.join()
    assert removing.result == "removed"
    until(lambda: sum(one["Alive"] for one in ray.nodes()) == 3)
    assert log.repeated + log.lost >= 1  # the lost worker's task was done a second time, by somebody else
    assert_same(stats["openness"][0], alone["openness"])
    assert sorted(one.index for one in log.asked) == list(range(BATCHES))


def test_a_damaged_shard_is_asked_again(cluster, model, recipe, alone, tmp_path):
    def damage():
        path = shards_in(tmp_path)[0]
        path.write_bytes(path.read_bytes()[:-8])
        return path

    notes, damaging = Notes(), Meanwhile(tmp_path, 4, damage)
    stats, log = on_ray(model, recipe, tmp_path, notes=notes)
    damaging.join()
    assert damaging.result is not None
    assert len(log.asked) > BATCHES  # some batch twice
    assert any("is damaged, asking its questions again" in text for text in notes.texts)
    assert_same(stats["openness"][0], alone["openness"])


def test_workers_without_the_folder_send_what_they_counted(cluster, model, recipe, alone, tmp_path, monkeypatch):
    """As on nodes that share no file system: the mark is not to be seen there."""
    from npti_export.distribute import spread

    setup = spread._setup
    monkeypatch.setattr(spread, "_setup", lambda *given: replace(setup(*given), mark=Path("/nowhere/at/all")))
    stats, log = on_ray(model, recipe, tmp_path)
    assert_same(stats["openness"][0], alone["openness"])
    assert log.merged >= 1


def test_constants_are_matched_by_workers(cluster, model, tmp_path):
    recipe = load_recipe("matched", [*SETTINGS, "identify.matched_questions=6"])
    source, models = models_of(model, threads=1)
    bench = load_bench("openness")
    place = Place(models.fast, source, "ggml", "cpu", tmp_path)
    request = Request({"openness": bench}, {}, {"openness": ("+", "-")}, recipe, str(model))
    with answered(request, Distribution(2, "joined"), place, models, Notes()) as (answers, log), models:
        for sign in "+-":
            wanted = match(models.fast(), bench, sign, recipe, Silent()).constant
            np.testing.assert_array_equal(kept_constant(matched_path(answers, bench, sign, recipe), source), wanted)
    assert log.asked == []


def test_transformers_in_workers(cluster, tiny_checkpoint, tmp_path):
    settings = ["identify.questions=8", "identify.batch_size=4", "identify.max_new_tokens=8", "identify.until=all"]
    recipe = load_recipe("npti", settings)
    stats, log = on_ray(tiny_checkpoint, recipe, tmp_path, dtype="float32", device="cpu")
    source, models = models_of(tiny_checkpoint, dtype="float32", device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as of a worker: the order of sums depends on it
    try:
        wanted, _ = collect(
            models.fast, source, load_bench("openness"), recipe, Silent(), dtype="float32", device="cpu", cache=None
        )
    finally:
        torch.set_num_threads(threads)
    assert len(log.asked) == 4
    assert_same(stats["openness"][0], wanted)


def test_errors_of_workers_are_their_own_sentences(cluster, model, recipe, tmp_path):
    with pytest.raises(ModelError, match="--context 256 is too small"):
        on_ray(model, load_recipe("npti", [*SETTINGS[:2], "identify.max_new_tokens=600"]), tmp_path, context=256)
    with pytest.raises(ClusterError, match="--workers 9: the cluster has 1 \\+ 1 cores"):
        on_ray(model, recipe, tmp_path, workers=9)


@pytest.mark.parametrize(("how", "joins"), [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_driver_that_is_killed_goes_on_and_asks_nothing_twice(cluster, model, recipe, alone, tmp_path, how, joins):
    """With a Ray of this machine, for which nothing is set up, or in the cluster."""
    environment = {**os.environ, "NPTI_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    where = ["--address", cluster.address] if joins else []
    job = [*KILLABLE, *JOB, "--model", str(model), "--out", "p.safetensors", *where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(job, env=environment, cwd=tmp_path, text=True, **pipes)
    started = []
    try:
        limit = time.monotonic() + LIMIT / 3
        while len(shards_in(tmp_path / "cache")) < 5 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed:\n" + process.communicate()[1]
        started = psutil.Process(process.pid).children(recursive=True)
        workers = workers_of(psutil.Process(process.pid))
        process.send_signal(how)
        out, errors = process.communicate(timeout=LIMIT / 3)
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
        assert out == ""
        if how != signal.SIGKILL:
            assert "goes on from the last finished batch" in errors.splitlines()[-1]
        if not joins:
            assert len(workers) == 2
            assert psutil.wait_procs(started, timeout=LIMIT / 6)[1] == []
    finally:
        process.kill()
        process.wait()
        end(started)
    assert not (tmp_path / "p.safetensors").exists()
    (folder,) = (tmp_path / "cache").glob("identify/*.shards")
    done = {at for node in Shards(folder).found() for at in range(node.first, node.end)}
    assert 5 <= len(done) < BATCHES
    notes = Notes()
    stats, log = on_ray(model, recipe, tmp_path / "cache", notes=notes)
    assert sorted(one.index for one in log.asked) == sorted(set(range(BATCHES)) - done)
    assert f"{len(done)} finished shards are there already" in notes.texts[0]
    assert_same(stats["openness"][0], alone["openness"])


ELSEWHERE = """
import time
from npti_export.distribute.cluster import import_ray
import_ray()  # with its settings
from ray.cluster_utils import Cluster
from test_ray import in_time
print(in_time(Cluster).address, flush=True)
time.sleep(3600)
"""


def test_a_cluster_that_is_lost_ends_the_job(model, tmp_path):
    """With all its nodes and workers, killed at once."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "NPTI_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{ENDS_WITH_US}\n{ELSEWHERE}"],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    nodes, process = [], None
    try:
        address = holder.stdout.readline().strip()  # or nothing, where it ended
        assert address, "no cluster"
        job = [*KILLABLE, *JOB, "--model", str(model), "--out", "p.safetensors", "--address", address]
        process = subprocess.Popen(job, env=environment, cwd=tmp_path, **pipes)
        until(lambda: shards_in(tmp_path / "cache") or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        nodes = psutil.Process(holder.pid).children(recursive=True)
        holder.kill()
        end(nodes)
        _, errors = process.communicate(timeout=LIMIT / 3)
        assert process.returncode == 2, errors
        assert "does not answer any more" in errors.splitlines()[-1]
        assert [path.name for path in tmp_path.glob("npti-*")] == []
        assert not (tmp_path / "p.safetensors").exists()
    finally:
        for one in (holder, process):
            if one is not None:
                one.kill()
                one.wait()
        end(nodes)


LATE = """
import ray
from npti_export.distribute.cluster import connected
from npti_export.distribute.plan import Distribution
asked, real = [], ray.init
def init(**options):
    asked.append(options)
    if len(asked) == 1:
        raise Exception("The current node timed out during startup.")
    return real(**options)
ray.init = init
with connected(Distribution(1), 1):
    print(len(asked) > 1, ray.is_initialized())
print(ray.is_initialized())
"""


def test_a_ray_that_is_late_is_started_again(tmp_path):
    command = [sys.executable, "-c", f"{ENDS_WITH_US}\n{LATE}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT / 3)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


def test_an_address_where_no_ray_is(model, tmp_path):
    environment = {**os.environ, "NPTI_CACHE": str(tmp_path / "cache")}
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        job = [*COMMAND, *JOB, "--model", str(model), "--out", "p.safetensors", "--address", address]
        done = subprocess.run(job, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2
        assert f"--address {address}: no Ray answers there" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
