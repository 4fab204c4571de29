"""Every kind of fault, by its name: what it does, and to which command."""

from collections.abc import Callable
from dataclasses import dataclass

from . import disks, failing, inputs, kept, shards, stops
from .endings import ENDINGS, MAIN, Ending


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        trial: breaks the command of a place, by a generator of random numbers; returns what it met, and what came of
            running the command again.
        ending: the command; where a trial draws its own, only the first guess.
        reads: inputs that it needs.
    """

    trial: Callable
    ending: Ending = MAIN
    reads: tuple[str, ...] = ()


FULL = "disk full"
KINDS = {
    "kill": Kind(stops.kill),
    "interrupt": Kind(stops.interrupt),
    "file size limit": Kind(disks.file_size_limit),
    FULL: Kind(disks.disk_full),
    "read-only folder": Kind(disks.read_only),
    "folder removed": Kind(disks.folder_removed),
    "base lost": Kind(disks.base_lost),
    "two jobs": Kind(stops.two_jobs),
    "damaged input": Kind(inputs.damaged_input, reads=inputs.MAIN_INPUTS),
    "damaged cache": Kind(kept.damaged_cache),
}
KINDS |= {f"kill, {name}": Kind(stops.kill, one) for name, one in ENDINGS.items() if one is not MAIN}
KINDS |= {f"{what} fails": Kind(disks.calls_fail(what)) for what in failing.IN_PYTHON}
KINDS |= {"refused in C": Kind(disks.refused_in_c)}
KINDS |= {
    f"{name}, others": Kind(disks.of_any_ending(trial))
    for name, trial in (
        ("interrupt", stops.interrupt),
        ("file size limit", disks.file_size_limit),
        ("two jobs", stops.two_jobs),
    )
}
KINDS |= {f"damaged {which}": Kind(inputs.damages(which), reads=(which,)) for which in inputs.OTHERS}
KINDS |= {
    "damaged shards": Kind(shards.damaged_shards),
    "damaged journal": Kind(kept.damaged_journal),
    "damaged build": Kind(kept.damaged_build),
    "damaged study": Kind(kept.damaged_study),
    "kept state stopped": Kind(kept.stopped),
}
