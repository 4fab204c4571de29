"""Output folder and cache of one trial, and what was wrong there."""

import tempfile

from forked import Run

from npti_export.checked import load_checked
from npti_export.errors import DamagedError

from .endings import MAIN

ABSENT, WHOLE, OLD, MIXED, BROKEN = "absent", "whole", "old", "old and new", "broken output"


class Place:
    """Where one trial runs a command, of an ending, on a model that may be another than the setting's."""

    def __init__(self, setting, root, ending=MAIN, model=None):
        self.setting, self.ending, self.model = setting, ending, model
        self.root, self.out, self.cache, self.temporary = root, root / "out", root / "cache", root / "tmp"
        for folder in (self.out, self.cache, self.temporary):
            folder.mkdir(parents=True)
        self.old, self.wrong, self.said = {}, [], ""

    @property
    def file(self):
        """The output, of an ending that has one."""
        return self.out / self.ending.outputs[0]

    def start(self, *more, prepare=None):
        return self.run([*self.setting.command(self.ending, self.model), *more], prepare)

    def run(self, arguments, prepare=None):
        """Begin any command here."""

        def begin():
            tempfile.tempdir = str(self.temporary)  # the parent has asked for the system's place already
            if prepare is not None:
                prepare()

        return Run(arguments, self.out, self.setting.environment(self.cache), begin)

    def leftovers(self):
        partial = [path for folder in (self.out, self.cache) for path in folder.rglob(".*") if _is_ours(path)]
        return partial + list(self.temporary.iterdir())

    def state(self):
        """What is under the output's names: nothing that counts, the whole output, the whole older one, or neither.

        Files that do not belong together may be old and new ones.
        """
        found, whole = self.ending.found(self.out), self.setting.whole(self.ending).files
        if not found:
            return ABSENT
        if found in (whole, self.old):
            return WHOLE if found == whole else OLD
        first = self.ending.opened_by
        if not first or not all(digest in (whole.get(name), self.old.get(name)) for name, digest in found.items()):
            return BROKEN
        if first not in found:
            return ABSENT
        return BROKEN if self.ending.together else MIXED

    def check_files(self):
        """Nothing half-written under a name that counts, output or cache."""
        if self.state() == BROKEN:
            self.wrong.append(f"{BROKEN}: {sorted(self.ending.found(self.out))}")
        for path in self.cache.glob("*/*.safetensors"):
            try:
                load_checked(path)
            except DamagedError:  # noqa: PERF203
                self.wrong.append("broken cache")

    def check(self, ended):
        if ended.fault:
            self.wrong.append(f"{ended.fault}: {ended.said[-600:]}")
        self.check_files()

    def finish(self):
        """The same command again, undisturbed: the same bytes, and nothing beside them."""
        ended = self.start(*(["--force"] if self.state() != ABSENT else [])).wait()
        self.check(ended)
        if ended.code != 0:
            self.wrong.append(f"not finished: {ended.said[-600:]}")
        elif self.state() != WHOLE:
            self.wrong.append("no output" if self.state() == ABSENT else f"it is {self.state()}")
        if self.leftovers():
            self.wrong.append(f"left over: {self.leftovers()}")
        return "went on from its cache" if "going on from" in ended.said else "began afresh"


def _is_ours(path):
    return path.suffix in (".partial", ".replaced", ".shared")
