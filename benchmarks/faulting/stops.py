"""Commands that are stopped: killed at any moment, interrupted, or beside another one."""

import os
import signal
import time

from forked import BEFORE

from . import failing
from .endings import MAIN
from .place import ABSENT, WHOLE

AT_A_WRITE = 0.3  # share of the kills that aim at a file that is being written
AT_A_CALL = 0.4  # share of the others, of what is not the main job, that aim at what publishes an output
PUBLISHES = ("fsync", "rename", "link", "unlink", "open")
MOST_IN_A_ROW = 3
LATE = "too late"


def kill(place, draw):
    """Up to three kills in a row, then to the end; sometimes over an older output that is to be replaced."""
    more = []
    if draw.random() < 0.25:
        place.setting.put_older(place)
        more = ["--force"]
    met = []
    for _ in range(draw.randint(1, MOST_IN_A_ROW)):
        ended, killed, where = _killed(place, draw, more)
        met.append(f"{ended.stage}{where}" if killed else f"{LATE}: it had ended")
        place.check_files()
        if killed and place.leftovers():
            met[-1] += ", leaving a temporary file"
        if not killed:
            if ended.fault:
                place.check(ended)
            break
    if not more and place.state() == WHOLE:
        return met, "was complete"
    return met, place.finish()


def _killed(place, draw, more):
    """One run that is killed: how it ended, whether it was alive then, and what was aimed at."""
    if draw.random() < AT_A_WRITE:
        return _killed_at_a_write(place, draw, more)
    if place.ending is not MAIN and draw.random() < AT_A_CALL:
        what = draw.choice(PUBLISHES)
        nth = draw.randint(1, max(1, failing.calls(place.setting, place.ending)[what]))
        if draw.random() < 0.5:  # its last ones publish
            nth = max(1, failing.calls(place.setting, place.ending)[what] - draw.randint(0, 5))
        ended = place.start(*more, prepare=failing.killing(what, nth, place.setting)).wait()
        return ended, ended.code == -signal.SIGKILL, f", at its {what}"
    run = place.start(*more)
    moment = draw.uniform(0, place.setting.whole(place.ending).seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    killed = run.kill()
    return run.wait(), killed, ""


def _killed_at_a_write(place, draw, more):
    run = place.start(*more)
    nth, later = draw.randint(1, 8), draw.choice([0.0, draw.uniform(0, 0.003)])
    seen = set()

    def written():
        seen.update(place.leftovers())
        return len(seen) >= nth

    run.wait_until(written)
    time.sleep(later)
    killed = run.kill()
    return run.wait(), killed, ", at a write"


def interrupt(place, draw):
    """Ctrl-C, or a shutdown's SIGTERM: one line that says how to go on, and nothing left beside the output."""
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    run = place.start()
    moment = draw.uniform(0, place.setting.whole(place.ending).seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    sent = not run.poll()
    if sent:
        os.kill(run.pid, number)
    ended = run.wait()
    if sent and ended.code in (-number, 70) and ended.stage == BEFORE:
        met = "before the command line had begun"  # which is up to Python
    else:
        place.check(ended)
        met = f"{number.name}: {ending_of(ended)}, {ended.stage}"
        if ended.code not in (0, 130) or (ended.code == 130 and "interrupted; nothing was" not in ended.sentence):
            place.wrong.append(f"no word of the interruption: {ended.said[-600:]}")
        if place.leftovers():
            place.wrong.append(f"left over: {place.leftovers()}")
    return [met], place.finish()


def two_jobs(place, draw):
    """Two jobs on one output and one cache, the second some moments later."""
    more = draw.choice([[], ["--force"]])
    one = place.start(*more)
    time.sleep(draw.uniform(0, place.setting.whole(place.ending).seconds / 2))
    two = place.start(*more)
    ends = [one.wait(), two.wait()]
    for ended in ends:
        place.check(ended)
    codes = sorted(ended.code if ended.code is not None else -1 for ended in ends)
    # without --force one of them may not replace the other's; a profile that is there and is the very one may stay
    expected = [[0, 0]] if more else [[0, 2], *([[0, 0]] if place.ending.stays else [])]
    if codes not in expected:
        place.wrong.append(f"two jobs ended with {codes}: {[ended.sentence for ended in ends]}")
    if place.leftovers():
        place.wrong.append(f"left over: {place.leftovers()}")
    if place.state() == ABSENT:
        place.wrong.append("no output")
    return [f"{'--force' if more else 'no --force'}: exit {codes[0]} and {codes[1]}"], "same bytes"


def ending_of(ended):
    return "done" if ended.code == 0 else f"exit {ended.code}"
