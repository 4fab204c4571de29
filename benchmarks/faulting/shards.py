"""Shards of an identification on Ray whose driver was killed, damaged: asked again, and the same sum."""

import multiprocessing
import traceback

from npti_export.bench import load_bench
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Outcome, Series
from npti_export.errors import ProfileError
from npti_export.files import sha256_file
from npti_export.identify.collect import run_batch
from npti_export.identify.shards import Node, Shards
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.stats import load_stats

from .damage import damaged

BATCHES = 9  # so that the first eight have a sum
_SHARDED = ["identify.questions=18", "identify.batch_size=4", "identify.max_new_tokens=4", "identify.until=all"]
_SHARDED += ["select.at_least=20", "select.at_most=20"]


def damaged_shards(place, draw):
    """Shards of an identification on Ray that was killed, as its driver takes them up: asked again, the same sum."""
    told = _Told()
    series, batches = _series(place.cache), _batches(place.setting)
    there = draw.sample(range(BATCHES), draw.randint(2, BATCHES))
    when = draw.choice(["before", "before", "meanwhile"])
    try:
        gathering = Gathering(series, gguf_source(place.setting.model), told)
        names = {Node(0, at): gathering.shards.write(Node(0, at), batches[at].read_bytes()) for at in there}
        if set(range(8)) <= set(there) and draw.random() < 0.5:
            gathering.shards.merge(Node(1, 0), names)
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
                gathering.merge(node)
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
            (path / f"{index}.safetensors").write_bytes(Shards(series.shards).encode(Node(0, index), stats))
    gathering = Gathering(series, source, Silent())
    _gather(gathering, {index: path / f"{index}.safetensors" for index in range(BATCHES)})
