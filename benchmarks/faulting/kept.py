"""What is kept for later runs, damaged: noticed and made again, or refused in one sentence."""

import json
import multiprocessing
import shutil
import traceback

from npti_export.bench import load_bench
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Node, Outcome, Series
from npti_export.errors import ProfileError
from npti_export.files import sha256_file
from npti_export.identify.collect import run_batch
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.stats import encode_stats, load_stats

from .damage import damaged
from .stops import ending_of

NOT_THE_SAME = ("seconds", "before")  # how long it took, and how often the pick was measured before
ROUNDED = 0.1  # of a judge's 1 to 5, whose answers are read in other batches
BATCHES = 9  # so that the first eight have a sum
_SHARDED = ["identify.questions=18", "identify.batch_size=4", "identify.max_new_tokens=4", "identify.until=all"]
_SHARDED += ["select.at_least=20", "select.at_most=20"]
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


def damaged_shards(place, draw):
    """Shards of an identification on Ray that was killed, as its driver takes them up: asked again, the same sum."""
    told = _Told()
    series, batches = _series(place.cache), _batches(place.setting)
    there = draw.sample(range(BATCHES), draw.randint(2, BATCHES))
    when = draw.choice(["before", "before", "meanwhile"])
    try:
        gathering = Gathering(series, gguf_source(place.setting.model), told)
        gathering.prepare()
        for index in there:
            gathering.shards.write(Node(0, index), batches[index].read_bytes())
        if set(range(8)) <= set(there) and draw.random() < 0.5:
            gathering.shards.merge(Node(1, 0))
        if when == "before":
            changed = _damage_one(series.shards, draw)
        gathering = Gathering(series, gguf_source(place.setting.model), told)
        if when == "meanwhile":
            changed = _damage_one(series.shards, draw)
        asked = _gather(gathering, batches)
    except Exception:
        place.wrong.append(traceback.format_exc()[-600:])
        return [when], ""
    if sha256_file(series.state) != sha256_file(_batches(place.setting)["sum"]):
        place.wrong.append("another sum")
    if series.shards.exists():
        place.wrong.append(f"left over: {list(series.shards.iterdir())}")
    if changed and when == "before" and not any("damaged" in note for note in told.notes):
        place.wrong.append("no note of the damage")
    if len(asked) != len(set(asked)) and when == "before":
        place.wrong.append(f"asked twice: {asked}")
    return [f"{when} it is taken up: {'asked again' if changed else 'nothing was changed'}"], "same bytes"


class _Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def _damage_one(folder, draw):
    target = draw.choice(sorted(folder.iterdir()))
    before = target.read_bytes()
    target.write_bytes(damaged(before, draw))
    return target.read_bytes() != before


def _series(cache):
    recipe = load_recipe("npti", _SHARDED)
    return Series(load_bench("extraversion"), recipe, cache / "identify" / "extraversion-0.safetensors")


def _gather(gathering, batches):
    """Ask for what is missing, sum up and finish, as the engine does with its workers. Returns what was asked."""
    asked = []
    for _ in range(3 * BATCHES):
        index = gathering.next((), BATCHES)
        if index is not None:
            asked.append(index)
            stats = load_stats(batches[index])[0].counts()
            gathering.answered(index, Outcome("here", stats=stats, data=batches[index].read_bytes()))
        try:
            for node in list(gathering.merges(())):
                gathering.shards.merge(node)
                gathering.merged(node)
        except ProfileError:
            gathering.damaged()
        if gathering.complete:
            gathering.finish()
            if gathering.finished:
                return asked
    raise RuntimeError(f"it never ends: {asked}")


def _batches(setting):
    """Files of the answers of each batch, and of their sum, made by a process of its own: this one runs no model."""

    def write(path):
        process = multiprocessing.get_context("fork").Process(target=_write_batches, args=(setting, path))
        process.start()
        process.join()
        assert process.exitcode == 0

    folder = setting.made("batches", write)
    return {index: folder / f"{index}.safetensors" for index in range(BATCHES)} | {
        "sum": folder / "identify" / "extraversion-0.safetensors"
    }


def _write_batches(setting, path):
    from npti_export.runtimes.llamacpp.context import Settings
    from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

    path.mkdir()
    source, series = gguf_source(setting.model), _series(path)
    with LlamaCppRuntime(setting.model, Settings(threads=1), sequences=4, source=source) as runtime:
        for index in range(BATCHES):
            stats = run_batch(runtime, series.bench, series.batch(index), series.asked(index), series.recipe)
            (path / f"{index}.safetensors").write_bytes(encode_stats(stats, {}))
    gathering = Gathering(series, source, Silent())
    gathering.prepare()
    _gather(gathering, {index: path / f"{index}.safetensors" for index in range(BATCHES)})


def damaged_journal(place, draw):
    """The journal of a judge: a torn end is cut off, else it is refused by the line; no verdict is another one."""
    setting = place.setting
    whole = setting.made("judged", lambda path: _judge(setting, path))
    target = place.out / "verdicts.jsonl"
    target.write_bytes(damaged((whole / target.name).read_bytes(), draw))
    ended = place.run(_judged(setting)).wait()
    return _again(place, ended, [(whole / "found.json", place.out / "found.json")])


def _judged(setting):
    more = ["--judge", setting.model, "--judge-journal", "verdicts.jsonl", "--json", "found.json", *JUDGED]
    return ["evaluate", setting.steered, *more]


def _judge(setting, path):
    setting.used("judge", _judged(setting))
    shutil.move(setting.undisturbed(_judged(setting)), path)


def damaged_build(place, draw):
    """A folder of ``bench build``: its plan, journal or store."""
    setting = place.setting
    whole = setting.made("built", lambda path: _build(setting, path))
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


def _build(setting, path):
    setting.used("build", _built(setting))
    shutil.move(setting.undisturbed(_built(setting)), path)


def damaged_study(place, draw):
    """The SQLite file of ``tune``."""
    setting = place.setting
    whole = setting.made("tuned", lambda path: _tune(setting, path))
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


def _tune(setting, path):
    setting.used("tune", _tuned(setting))
    shutil.move(setting.undisturbed(_tuned(setting)), path)


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
