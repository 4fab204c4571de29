"""What runs in a worker process: a model, loaded once, and one task after the other."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from dataclasses import replace
from functools import cached_property

from npti_export.distribute.plan import Fault, Hello, Match, Merge, Outcome, Series, Setup, Task
from npti_export.errors import ClusterError, ModelError, NptiError
from npti_export.files import sampled_sha256
from npti_export.identify.collect import run_batch
from npti_export.identify.matched import match
from npti_export.identify.profiles import encode_constant, keep_constant
from npti_export.identify.shards import Node, Shards
from npti_export.loader import Models, Timings
from npti_export.models import ModelSource, resolve_model
from npti_export.progress import Silent
from npti_export.runtimes.base import Runtime
from npti_export.version import __version__

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a directory


class Worker:
    """The class of the actors. Nothing is loaded before it is needed, so that one that was started again is soon ready.

    Errors on purpose are returned, not raised: a traceback through two processes says less than their own sentence.

    Args:
        setup: the model and how it runs.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.process = f"{socket.gethostname()}:{os.getpid()}"

    def hello(self) -> Hello | Fault:
        """Say what it would compute in."""
        try:
            if self._setup.version != __version__:
                raise ModelError(
                    f"the worker {self.process} has npti-export {__version__}, this machine {self._setup.version}; "
                    "install the same version on every node"
                )
            return Hello(self.process, self._models.dtype(), self._models.device())
        except (NptiError, OSError) as error:
            return self._fault(error)

    def run(self, task: Task, series: Series) -> Outcome | Fault:
        """Do one task of a trait."""
        started = time.perf_counter()
        try:
            outcome = self._run(task, series)
        except (NptiError, OSError) as error:
            return self._fault(error)
        except (MemoryError, RuntimeError) as error:
            torch = sys.modules.get("torch")
            if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
                return Fault("MemoryError", f"the worker {self.process} is out of memory")
            raise
        return replace(outcome, seconds=time.perf_counter() - started)

    def _fault(self, error: NptiError | OSError) -> Fault:
        """An error on purpose, or of the node: a full disk, a folder that is not there."""
        if isinstance(error, NptiError):
            return Fault(type(error).__name__, str(error))
        return Fault(ClusterError.__name__, f"the worker {self.process} cannot go on: {error}; mend that node")

    def close(self) -> None:
        """Free the model and what was written for it."""
        self._models.__exit__()

    def _run(self, task: Task, series: Series) -> Outcome:
        shares, shards = self._setup.mark.is_file(), Shards(series.shards)
        if isinstance(task, Merge):
            if not shares:
                return Outcome(self.process, data=b"")
            return Outcome(self.process, name=shards.merge(task.node, task.names))
        if isinstance(task, Match):
            found = match(self._runtime, series.bench, task.sign, task.recipe, Silent())
            data = encode_constant(found.constant)
            if shares:
                keep_constant(task.path, data)
            return Outcome(self.process, data=None if shares else data)
        runtime, first = self._runtime, series.asked(task.index)
        started = time.perf_counter()
        stats = run_batch(runtime, series.bench, series.batch(task.index), first, series.recipe)
        computing = time.perf_counter() - started
        node = Node(0, task.index)
        data = shards.encode(node, stats)
        name = shards.write(node, data) if shares else ""
        tokens = stats.plus.tokens + stats.minus.tokens
        return Outcome(self.process, computing, 0.0, stats.counts(), name, None if shares else data, tokens)

    @cached_property
    def _runtime(self) -> Runtime:
        runtime = self._models.fast()
        if self._models.engine == "transformers":
            import torch

            torch.set_num_threads(max(1, self._setup.settings.threads))
        return runtime

    @cached_property
    def _models(self) -> Models:
        setup = self._setup
        copies = setup.copies if setup.copies.is_dir() else None
        return Models(
            self._source(), setup.settings, Timings(), Silent(), verifies=False, sequences=setup.sequences,
            copies=copies,
        )  # fmt: skip

    def _source(self) -> ModelSource:
        """The model on this machine.

        Raises:
            ModelError: it is not there, or what is there is another one.
        """
        setup, here = self._setup, socket.gethostname()
        found = setup.source
        try:
            if not found.path.exists():
                found = resolve_model(setup.model)
            same = (found.fingerprint, found.kind) == (setup.source.fingerprint, setup.source.kind)
            same = same and files_digest(found) == setup.digest
        except (ModelError, OSError) as error:
            raise ModelError(f"on the node {here}: {error}") from error
        if not same:
            raise ModelError(
                f"on the node {here}: {found.path} is not the {setup.source.name} of {setup.host}; put the same files "
                "at the same place on every node"
            )
        return found


def files_digest(source: ModelSource) -> str:
    """SHA-256 of a model's files: small ones whole, of weights the sizes and pieces from all over them.

    A fingerprint is of the norms, which all quantisations of a model and many fine-tunes of it have in common.
    """
    files = list(source.shards) or [source.path]
    if source.path.is_dir():
        files = sorted(path for path in source.path.iterdir() if path.suffix in _MODEL_FILES)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name if source.path.is_dir() else ''} {sampled_sha256(path)} ".encode())
    return digest.hexdigest()
