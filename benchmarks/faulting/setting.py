"""What all trials share: tiny models, what undisturbed runs write, and the inputs of other commands."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai_stub
from families import cut_tokenizer, write_tiny
from forked import Run, import_what_a_run_imports, threads
from imatrix import sums_for, write_gguf

from npti_export.export.control_vector import write_control_vector
from npti_export.gguf.reader import read_gguf
from npti_export.models import default_model_path

from .endings import ENDINGS, MAIN
from .place import Place

ANY_OLDER = b"an older file"


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run of an ending writes.

    Attributes:
        seconds: that it takes.
        files: SHA-256 by name.
    """

    seconds: float
    files: dict


class Setting:
    """Models and inputs; each is made when it is first asked for.

    Args:
        root: folder of everything, removed at the end.
    """

    def __init__(self, root):
        self.root = root
        self._inputs, self._whole, self._older, self._used = root / "inputs", {}, {}, set()
        self._stub, self._seconds = None, {}
        self._inputs.mkdir()
        root.chmod(0o755)
        self._tokenizer = cut_tokenizer(default_model_path())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._stub is not None:
            self._stub.stdin.close()
            self._stub.wait()

    @property
    def endpoint(self):
        """Address of a stub of an OpenAI-compatible endpoint, a process of its own."""
        if self._stub is None:
            command = [sys.executable, str(Path(openai_stub.__file__))]
            self._stub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._endpoint = self._stub.stdout.readline().strip()
        return self._endpoint

    def environment(self, cache):
        return {**os.environ, "NPTI_CACHE": str(cache)}

    def command(self, ending, model=None):
        """The command line of an ending, of another model if that is given."""
        line = ending.command(self)
        return [model if model is not None and one == self.model else one for one in line]

    def made(self, name, make):
        """An input, made by ``make(path)`` if it is not there yet."""
        path = self._inputs / name
        if not path.exists():
            make(path)
        return path

    @property
    def model(self):
        return self.made("tiny.gguf", lambda path: write_tiny(path, self._tokenizer, "F32"))

    @property
    def wide(self):
        return self.made("wide.gguf", lambda path: write_tiny(path, self._tokenizer, "F32", width=128))

    @property
    def split(self):
        self.made("parts", lambda path: path.mkdir() or write_tiny(path / "tiny.gguf", self._tokenizer, split=6))
        return self._inputs / "parts" / "tiny-00001-of-00005.gguf"

    @property
    def imatrix(self):
        return self.made("imatrix.gguf", lambda path: write_gguf(path, sums_for(read_gguf(self.model))))

    @property
    def vector(self):
        directions = np.random.default_rng(0).normal(0, 0.3, (2, 64)).astype(np.float32)
        return self.made("vector.gguf", lambda path: write_control_vector(path, directions, "llama", {}))

    @property
    def recipe(self):
        text = 'extends = "npti"\nname = "mine"\n[rule]\ngamma = 1.2\n'
        return self.made("mine.toml", lambda path: path.write_text(text))

    @property
    def steered(self):
        return self.written("steered.gguf", ENDINGS["gguf"])

    @property
    def adapter(self):
        return self.written("adapter", ENDINGS["peft"])

    @property
    def profile(self):
        def write(path):
            self.undisturbed([*self.command(MAIN), "--save-profile", path])

        return self.made("p.safetensors", write)

    def written(self, name, ending):
        """What an ending writes, as an input of something else."""

        def write(path):
            self.whole(ending)
            shutil.move(self.undisturbed(self.command(ending)) / ending.outputs[0], path)

        return self.made(name, write)

    def undisturbed(self, arguments, codes=(0,), prepare=None):
        """Run a command to its end in a folder of its own, which is returned."""
        place = Place(self, Path(tempfile.mkdtemp(dir=self.root)))
        ended = place.run(arguments, prepare).wait()
        if ended.fault or ended.code not in codes:
            sys.exit(f"{arguments}: {ended.said}")
        return place.out

    def used(self, name, arguments):
        """Run a command once as it is, importing its modules here: it must go well."""
        if name not in self._used:
            self._used.add(name)
            place = Place(self, Path(tempfile.mkdtemp(dir=self.root)))
            ended = import_what_a_run_imports(arguments, place.out, self.environment(place.cache))
            if ended.code != 0:
                sys.exit(f"{name}: {ended.said}")
            self._check_forkable()

    def seconds(self, name, arguments):
        """How long a command takes that nobody disturbs."""
        if name not in self._seconds:
            began = time.monotonic()
            self.undisturbed(arguments)
            self._seconds[name] = time.monotonic() - began
        return self._seconds[name]

    def _check_forkable(self):
        if threads() > 1:
            sys.exit(f"this process has {threads()} threads; a fork of it would not be a run like any other")

    def whole(self, ending):
        """What undisturbed runs write; two are made, which must agree."""
        if ending.name not in self._whole:
            self._whole[ending.name] = self._two_runs(ending)
        return self._whole[ending.name]

    def _two_runs(self, ending):
        command = self.command(ending)
        first = Place(self, Path(tempfile.mkdtemp(dir=self.root)), ending)
        ended = import_what_a_run_imports(command, first.out, self.environment(first.cache))
        if ended.code != 0:
            sys.exit(f"the undisturbed run failed: {ended.said}")
        second = Place(self, Path(tempfile.mkdtemp(dir=self.root)), ending)
        began = time.monotonic()
        ended = Run(command, second.out, self.environment(second.cache)).wait()
        seconds = time.monotonic() - began
        found = [ending.found(place.out) for place in (first, second)]
        if ended.code != 0 or found[0] != found[1] or not found[0]:
            differ = {name for name in {*found[0], *found[1]} if found[0].get(name) != found[1].get(name)}
            sys.exit(f"{ending.name}: two undisturbed runs differ in {differ}: {ended.said}")
        self._check_forkable()
        for place in (first, second):
            shutil.rmtree(place.root)
        return Whole(seconds, found[0])

    def put_older(self, place):
        """An older output where the new one goes; any file where the ending does not look into what it replaces."""
        ending = place.ending
        if not ending.older:
            place.file.write_bytes(ANY_OLDER)
        else:
            if ending.name not in self._older:
                self._older[ending.name] = self.undisturbed([*self.command(ending), *ending.older])
            shutil.copytree(self._older[ending.name], place.out, dirs_exist_ok=True)
        place.old = ending.found(place.out)
