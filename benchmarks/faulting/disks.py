"""Disks that are full, read-only or failing, and files and folders that vanish."""

import contextlib
import os
import shutil
import time

from . import failing
from .endings import ENDINGS
from .stops import ending_of

NOBODY = 65534
EXPECTED = (0, 2, 4)


def file_size_limit(place, draw):
    """Writes fail behind a random number of bytes, as on a full disk."""
    import resource

    allowed = draw.randint(20_000, 900_000)
    ended = place.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))).wait()
    place.check(ended)
    place.said = ended.sentence if ended.code else ""
    return [ending_of(ended)], place.finish()


def disk_full(place, draw):
    """A small disk of its own fills up at a random moment."""
    run = place.start()
    moment = draw.uniform(0, place.setting.whole(place.ending).seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    filler = place.out / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 14))
    ended = run.wait()
    place.check(ended)
    filler.unlink()
    return [ending_of(ended)], place.finish()


def read_only(place, draw):
    """A folder, of the output or the cache, that the job may not write to."""
    folder = draw.choice([place.out, place.cache])
    other = place.cache if folder is place.out else place.out
    folder.chmod(0o555)
    other.chmod(0o777)
    place.root.chmod(0o755)

    def prepare():
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    ended = place.start(prepare=prepare if os.getuid() == 0 else None).wait()
    place.check(ended)
    if ended.code == 0:
        place.wrong.append("wrote where it may not")
    folder.chmod(0o755)
    return [f"{folder.name}: {ending_of(ended)}"], place.finish()


def folder_removed(place, draw):
    """The output's folder, or the cache, is removed at a random moment."""
    folder = draw.choice([place.out, place.cache])
    run = place.start()
    moment = draw.uniform(0, place.setting.whole(place.ending).seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    shutil.rmtree(folder, ignore_errors=True)
    ended = run.wait()
    place.check(ended)
    for path in (place.out, place.cache):
        path.mkdir(exist_ok=True)
    return [f"{folder.name}: {ending_of(ended)}"], place.finish()


def base_lost(place, draw):
    """The base is removed, or cut short, at a random moment."""
    base = place.root / place.setting.model.name
    shutil.copy2(place.setting.model, base)
    place.model = base
    how = draw.choice(["removed", "cut short"])
    run = place.start()
    moment = draw.uniform(0, place.setting.whole(place.ending).seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    if how == "removed":
        base.unlink()
    else:
        os.truncate(base, draw.randrange(base.stat().st_size))
    ended = run.wait()
    place.check(ended)
    shutil.copy2(place.setting.model, base)
    return [f"{how}: {ending_of(ended)}"], place.finish()


def _any_ending(place, draw):
    """One of all endings; sometimes over an older output."""
    place.ending = ENDINGS[draw.choice(list(ENDINGS))]
    place.setting.whole(place.ending)
    if draw.random() < 0.25:
        place.setting.put_older(place)
        return ["--force"]
    return []


def of_any_ending(trial):
    """The same kind of fault, of a command that the trial draws."""

    def one(place, draw):
        place.ending = ENDINGS[draw.choice([name for name in ENDINGS if name != "gguf"])]
        place.setting.whole(place.ending)
        return trial(place, draw)

    one.__doc__ = trial.__doc__
    return one


def calls_fail(what):
    """A kind of fault: the n-th call of a kind, and those after it unless it is once, return an error."""

    def fail(place, draw):
        more = _any_ending(place, draw)
        nth = draw.randint(1, max(1, failing.calls(place.setting, place.ending)[what]))
        reason = draw.choice(failing.REASONS.get(what, failing.FULL_OR_BROKEN))
        once = draw.random() < 0.5
        prepare = failing.failing(what, nth, reason, place.setting, once=once)
        ended = place.start(*more, prepare=prepare).wait()
        return _failed(place, ended)

    fail.__doc__ = f"The n-th {what} of a run, or each from it on, fails."
    return fail


def refused_in_c(place, draw):
    """From a random moment on the kernel refuses all writes, reads, fsyncs, renames or mappings."""
    more = _any_ending(place, draw)
    what = draw.choice(failing.IN_C)
    reason = draw.choice(failing.REASONS.get(what, failing.FULL_OR_BROKEN))
    seconds = draw.uniform(0, place.setting.whole(place.ending).seconds)
    ended = place.start(*more, prepare=failing.refusing(what, reason, seconds)).wait()
    met, after = _failed(place, ended)
    return [f"{what}: {one}" for one in met], after


def _failed(place, ended):
    place.check(ended)
    if ended.code not in EXPECTED:
        place.wrong.append(f"exit {ended.code}: {ended.said[-600:]}")
    place.said = ended.sentence if ended.code else ""
    return [f"{ending_of(ended)}"], place.finish()
