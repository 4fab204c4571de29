"""What is kept for later runs: damaged, it is made again or refused in one sentence; stopped, it is gone on with."""

import json
import shutil
import time

from .damage import damaged
from .stops import ending_of

NOT_THE_SAME = ("seconds", "before")  # how long it took, and how often the pick was measured before
ROUNDED = 0.1  # of a judge's 1 to 5, whose answers are read in other batches
JUDGED = ["--baselines", "none", "--no-prompts", "--questions", "4", "--answer-tokens", "4", "--personas", "1"]
JUDGED += ["--threads", "1", "--skip", "cross-talk", "--skip", "capability", "--skip", "inventory"]


def damaged_cache(place, draw):
    """A kept file that is not what it was: made again, with a note, and the same bytes come out."""
    first = place.start().wait()
    place.check(first)
    place.file.unlink()
    target = draw.choice(sorted(place.cache.glob("*/*.safetensors")))
    before = target.read_bytes()
    after = damaged(before, draw)
    target.write_bytes(after)
    ended = place.start().wait()
    place.check(ended)
    if ended.code != 0 or not place.file.is_file():
        place.wrong.append(f"not finished: {ended.said[-600:]}")
    if after != before and "damaged" not in ended.said:
        place.wrong.append("no note of the damage")
    return [f"{target.parent.name}: {'made again' if after != before else 'nothing was changed'}"], "same bytes"


def damaged_journal(place, draw):
    """The journal of a judge: a torn end is cut off, else it is refused by the line; no verdict is another one."""
    setting = place.setting
    whole = _made(setting, "journal")
    target = place.out / "verdicts.jsonl"
    target.write_bytes(damaged((whole / target.name).read_bytes(), draw))
    ended = place.run(_judged(setting)).wait()
    return _again(place, ended, [(whole / "found.json", place.out / "found.json")])


def _judged(setting):
    more = ["--judge", setting.model, "--judge-journal", "verdicts.jsonl", "--json", "found.json", *JUDGED]
    return ["evaluate", setting.steered, *more]


def damaged_build(place, draw):
    """A folder of ``bench build``: its plan, journal or store."""
    setting = place.setting
    whole = _made(setting, "build")
    shutil.copytree(whole / "built", place.out / "built")
    target = draw.choice(
        [path for path in sorted((place.out / "built").rglob("*")) if path.is_file() and _matters(path)]
    )
    target.write_bytes(damaged(target.read_bytes(), draw))
    ended = place.run(_built(setting)).wait()
    met, after = _again(place, ended, [(whole / "built" / "questions.jsonl", place.out / "built" / "questions.jsonl")])
    return [f"{target.name}: {one}" for one in met], after


def _matters(path):
    return path.is_file() and path.stat().st_size > 0 and path.name != "lock"


def _built(setting):
    sizes = ["--search", "60", "--test", "12", "--per-request", "6"]
    return ["bench", "build", "extraversion", "--endpoint", setting.endpoint, "--model", "stub", "--out", "built",
            *sizes]  # fmt: skip


def damaged_study(place, draw):
    """The SQLite file of ``tune``."""
    setting = place.setting
    whole = _made(setting, "study")
    target = place.out / "study.sqlite"
    target.write_bytes(damaged((whole / target.name).read_bytes(), draw))
    ended = place.run(_tuned(setting)).wait()
    return _again(place, ended, [(whole / "trials.json", place.out / "trials.json")])


def _tuned(setting):
    few = ["--trials", "3", "--questions", "2", "--test-questions", "1", "--answer-tokens", "4", "--personas", "1"]
    more = ["--recipe", "npti", "--set", "identify.questions=4", "--set", "identify.max_new_tokens=4"]
    budget = ["--max-kl", "50", "--max-fluency-loss", "50", "--methods", "neurons,mean"]
    return ["tune", "--trait", "extraversion+", "--model", setting.model, "--threads", "1", "--storage", "study.sqlite",
            "--json", "trials.json", *few, *more, *budget]  # fmt: skip


KEPT = {
    # what is kept, the command that keeps it, what comes of it, and bytes that its files may not grow beyond at most
    "journal": (_judged, "found.json", 4_000),
    "build": (_built, "built/questions.jsonl", 300_000),
    "study": (_tuned, "trials.json", 200_000),
}


def stopped(place, draw):
    """A judge's journal, a bench build or a study that is killed, or whose files may not grow: the command goes on."""
    setting, name = place.setting, draw.choice(list(KEPT))
    command, out, most = KEPT[name]
    line, whole = command(setting), _made(setting, name)
    met = _killed(place, draw, name, line) if draw.random() < 0.5 else _without_room(place, draw, most, line)
    ended = place.run([*line, *(["--force"] if name != "build" else [])]).wait()
    if ended.fault or ended.code != 0:
        place.wrong.append(f"not finished: {ended.said[-600:]}")
    elif name != "study" and not _alike(whole / out, place.out / out):  # which draws on, from the trials that are there
        place.wrong.append(f"{out}: another one")
    return [f"{name}: {met}"], "went on"


def _made(setting, name):
    """The folder that an undisturbed run of a command leaves."""
    line = KEPT[name][0](setting)

    def make(path):
        setting.used(name, line)
        shutil.move(setting.undisturbed(line), path)

    return setting.made(f"whole {name}", make)


def _killed(place, draw, name, line):
    run = place.run(line)
    moment = draw.uniform(0, place.setting.seconds(name, line))
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    killed = run.kill()
    run.wait()
    return "killed" if killed else "too late"


def _without_room(place, draw, most, line):
    import resource

    allowed = draw.randint(200, most)
    ended = place.run(line, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))).wait()
    if ended.fault or ended.code not in (0, 2, 4):
        place.wrong.append(f"{ended.fault} exit {ended.code}: {ended.said[-600:]}")
    place.said = ended.sentence if ended.code else ""
    return f"no room, {ending_of(ended)}"


def _again(place, ended, same):
    """How a command went with what is damaged: refused, or done with what comes out as before."""
    place.said = ended.sentence if ended.code else ""
    if ended.fault:
        place.wrong.append(f"{ended.fault}: {ended.said[-600:]}")
    elif ended.code not in (0, 2):
        place.wrong.append(f"exit {ended.code}: {ended.said[-600:]}")
    elif ended.code == 0:
        place.wrong += [f"{now.name}: another one" for was, now in same if not _alike(was, now)]
    return [ending_of(ended)], ""


def _alike(was, now):
    """Whether two files are the same; JSON documents but for times, and for what batches of others' answers round."""
    if was.suffix != ".json":
        return was.read_bytes() == now.read_bytes()
    return _close(json.loads(was.read_text()), json.loads(now.read_text()))


def _close(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _close(one[key], other[key]) for key in one if key not in NOT_THE_SAME
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < ROUNDED
    return one == other
