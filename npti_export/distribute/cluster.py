"""Joining or starting a Ray, and how many workers of which size fit into it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from npti_export.distribute.plan import Distribution
from npti_export.errors import ClusterError
from npti_export.loader import Models, RuntimeSettings
from npti_export.runtimes.devices import MAP
from npti_export.runtimes.llamacpp.library import usable_cores

_STARTS = 3  # of a Ray of this machine, which gives up after half a minute, however busy the machine is
_PULSE = 5.0  # seconds between looks at the head of a cluster
_GONE = 20.0  # seconds without an answer after which it counts as lost
_CORES_A_WORKER = 4  # where nobody says how many workers
# Unless it is told not to, Ray sends usage statistics, warns of a change to come that does not concern us, prints what
# becomes of workers on standard output (we say what matters of that ourselves), and starts workers at niceness 15.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_worker_niceness": "0",
}


def import_ray() -> Any:
    """The module.

    Raises:
        ClusterError: it is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"--engine ray needs {error.name}, which is not installed: pip install 'npti-export[ray]'"
        ) from error
    return ray


def place_of(distribution: Distribution) -> str | None:
    """The cluster to join; None starts one of this machine."""
    address = distribution.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


@contextmanager
def connected(distribution: Distribution, cores: int) -> Iterator[Any]:
    """Ray, for as long as the block lasts; one that the process is connected to already is taken and left as it is.

    Args:
        distribution: which cluster.
        cores: of a Ray that is started here.

    Raises:
        ClusterError: Ray is not installed, or does not answer.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = place_of(distribution)
    named = "--address" if distribution.address else "RAY_ADDRESS"
    if address is not None and not reachable(address):
        raise ClusterError(
            f"{named} {address}: no Ray answers there; ray start --head starts one, and ray status shows where"
        )
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)
    for left in reversed(range(_STARTS)):
        try:
            if address is None:
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
            break
        except Exception as error:  # Ray raises anything, a bare Exception where its processes are late
            ray.shutdown()
            if address is None and left:
                continue
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = "Ray does not start here" if address is None else f"{named} {address}: cannot be joined from here"
            join = f"; run this on one of its nodes, or make this machine one (ray start --address={address})"
            mend = "" if address is None else join
            raise ClusterError(f"{what} ({reason}){mend}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process before anything is put in order
    try:
        yield ray
    finally:
        ray.shutdown()


def reachable(address: str) -> bool:
    """Whether anything takes a connection at ``host:port`` or ``ray://host:port``; Ray itself tries for minutes.

    What has another form, such as ``auto``, is Ray's to judge.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PULSE):
            return True
    except (OSError, OverflowError):
        return False


class Pulse:
    """Whether the head of a cluster is still there.

    Ray itself says nothing, tries to connect for a minute at the full speed of a core, and then ends the process as
    it is, temporary files and all.

    Args:
        ray: connected.
    """

    def __init__(self, ray: Any) -> None:
        # empty where Ray's own client is in between
        host, _, port = str(getattr(ray.get_runtime_context(), "gcs_address", "")).rpartition(":")
        self._place = host, int(port or 0)
        self._looked = time.monotonic()
        self._silent: float | None = None  # since when
        self._visible = self._answers()  # from where this process is

    def check(self) -> None:
        """Raise if it has not answered for a while.

        Raises:
            ClusterError: it has not.
        """
        now = time.monotonic()
        if not self._visible or now - self._looked < _PULSE:
            return
        self._looked = now
        if self._answers():
            self._silent = None
        elif self._silent is None:
            self._silent = now
        elif now - self._silent > _GONE:
            raise ClusterError(
                f"the Ray at {self._place[0]}:{self._place[1]} does not answer any more; once there is one again, the "
                "same command goes on from what is finished"
            )

    def _answers(self) -> bool:
        return reachable(f"{self._place[0]}:{self._place[1]}")


@dataclass(frozen=True)
class Size:
    """Of the workers.

    Attributes:
        workers: how many.
        threads: of each.
        gpus: of each; 0 where it runs on none.
    """

    workers: int
    threads: int
    gpus: int


def wants_gpu(models: Models, distribution: Distribution) -> bool:
    """Whether the model would run on a GPU where there is one.

    Whether the workers' llama.cpp can is taken from this machine's, unless the user says how many GPUs they take.

    Raises:
        ClusterError: a certain GPU is asked for.
    """
    settings = models.settings
    if models.engine == "llama.cpp":
        from npti_export.runtimes.llamacpp.library import llama

        asked = place_of(distribution) is not None and distribution.gpus is not None
        return bool(settings.gpu_layers and (asked or llama().llama_supports_gpu_offload()))
    if settings.device.startswith("cuda:"):
        raise ClusterError(f"--device {settings.device}: Ray gives each worker a GPU of its own; say --device cuda")
    return settings.device in ("auto", "cuda", MAP)


def local_cores(distribution: Distribution, threads: int) -> int:
    """Cores that a Ray of this machine is told it has: those that there are, or as many as the user divides."""
    return max(usable_cores(), (distribution.workers or 1) * max(threads, 1))


def size_of(
    nodes: Sequence[dict[str, Any]], distribution: Distribution, settings: RuntimeSettings, *, gpu: bool
) -> Size:
    """Workers for the nodes of a cluster, as ``ray.nodes()`` describes them.

    Args:
        nodes: what there is.
        distribution: what is asked for.
        settings: of the runtime; ``threads`` of a worker, 0 shares out the cores.
        gpu: whether the model would run on a GPU.

    Raises:
        ClusterError: they do not fit.
    """
    found = [_Room(int(one.get("CPU", 0)), int(one.get("GPU", 0)) if gpu else 0) for one in _resources(nodes)]
    there = [one for one in found if one.cores]
    each = _gpus_of_a_worker([one.gpus for one in there if one.gpus], distribution, settings)
    cores = [one.cores for one in there]
    room = sum(one.workers(1, each) for one in there)
    workers = distribution.workers or (room if each else max(len(cores), sum(cores) // _CORES_A_WORKER, 1))
    if each and workers > room:
        takes = "a GPU" if each == 1 else f"{each} GPUs of one node"
        gpus = " + ".join(str(one.gpus) for one in there if one.gpus)
        raise ClusterError(
            f"--workers {workers}: each worker takes {takes} and a core, and the cluster has {gpus}; give at most "
            f"{room}, or --device cpu (of llama.cpp: --gpu-layers 0)"
        )
    fits = [
        size for size in range(1, max(cores, default=0) + 1) if sum(one.workers(size, each) for one in there) >= workers
    ]
    threads = settings.threads
    if not fits or (threads and threads not in fits):
        raise ClusterError(
            f"--workers {workers}{f' with --threads {threads}' * bool(threads)}: the cluster has "
            f"{' + '.join(map(str, cores)) or 'no'} cores now; ask for fewer, or have its nodes started first"
        )
    return Size(workers, threads or fits[-1], each)


@dataclass(frozen=True)
class _Room:
    cores: int
    gpus: int

    def workers(self, threads: int, gpus: int) -> int:
        """How many of that size fit into the node."""
        fit = self.cores // threads
        return min(fit, self.gpus // gpus) if gpus else fit


def gpus_of(nodes: Sequence[dict[str, Any]]) -> int:
    """GPUs of all nodes."""
    return sum(int(one.get("GPU", 0)) for one in _resources(nodes))


def _resources(nodes: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [node["Resources"] for node in nodes if node["Alive"]]


def _gpus_of_a_worker(gpus: Sequence[int], distribution: Distribution, settings: RuntimeSettings) -> int:
    """``gpus`` are those of each node that has any."""
    most, asked = max(gpus, default=0), distribution.gpus
    if asked and asked > most:
        mend = "give fewer" if most else "leave --gpus out"
        raise ClusterError(
            f"--gpus {asked}: a worker's GPUs are of one node, and no node has more than {most} that this job would "
            f"use; {mend}"
        )
    if asked or not gpus:
        return asked or 0
    if settings.device == MAP and len(set(gpus)) > 1:
        raise ClusterError(
            f"--device map: the nodes have {' + '.join(map(str, gpus))} GPUs; say with --gpus how many a worker takes"
        )
    return most if settings.device == MAP else 1
