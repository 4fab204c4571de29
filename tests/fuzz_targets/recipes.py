"""Recipes, and what the tuner keeps and writes."""

import itertools
import sqlite3
from contextlib import closing

from fuzz_targets.target import LAYERS, WIDTH, Target, plain
from npti_export.bench.lines import encodable
from npti_export.errors import NptiError
from npti_export.evaluate.document import Estimate
from npti_export.progress import Silent
from npti_export.recipe import PoleSection, load_recipe, recipe_from_json
from npti_export.tuning.recipe_file import write_recipe
from npti_export.tuning.search import Limits, opened_study
from npti_export.tuning.space import Space, with_section
from npti_export.tuning.trial import Figures


def _recipe(path):
    recipe = load_recipe(str(path))
    assert recipe_from_json(recipe.to_json()) == recipe
    assert encodable(recipe.to_json())


def _recipe_inside(path):
    recipe = recipe_from_json(path.read_bytes().decode("utf-8", "replace"))
    assert recipe_from_json(recipe.to_json()) == recipe


def _override(path):
    recipe = load_recipe("npti", [path.read_bytes().decode("utf-8", "replace")])
    assert recipe_from_json(recipe.to_json()) == recipe


_RECIPE = 'extends = "npti"\nname = "mine"\n[rule]\ngamma = 0.7\n[poles."openness+"]\nselect = { threshold = 0.2 }\n'


SPACE, STUDY = Space(LAYERS, LAYERS * WIDTH), "calm abc"
_POLES = ("openness+", "openness-", "calm+")
_SECTION = PoleSection(select={"at_least": 5, "at_most": 9}, rule={"gamma": 1.5, "clamp": False})


def _write(path, pole):
    npti, changed = load_recipe("npti"), load_recipe("npti", ["identify.questions=9"])
    about = {"fingerprint": "0" * 64, "model": "tiny", "comments": ["of 3"]}
    return write_recipe(path, "npti", npti, changed, pole, _SECTION, **about, force=True)


def _tuned_folder(folder):
    for pole in _POLES[:2]:
        _write(folder / "tuned.toml", pole)
    return [(folder / "tuned.toml").read_bytes()]


def _tuned(path):
    """What was edited is read or refused; ``tune`` writes on it, or leaves it alone, and what it writes is read."""
    before = path.read_bytes()
    try:
        kept = _write(path, "neuroticism-")
    except NptiError:
        assert path.read_bytes() == before
        raise
    try:
        recipe = load_recipe(str(path))
        assert recipe.for_pole("neuroticism-").rule.gamma == 1.5
        for pole in kept:
            recipe.for_pole(pole)
    except NptiError as error:
        raise AssertionError(f"what was written is not read: {error}") from error
    path.write_bytes(before)
    _recipe(path)


def _measured(point):
    near = Estimate(mean=0.1, low=0.0, high=0.2, n=9)
    return Figures(near, near, near)


def _opened(path):
    return opened_study(path, STUDY, SPACE, lambda figures: (0.0, 0.0), seed=0)


def _run(study, trials):
    ticks = itertools.count()
    limits = Limits(trials, 1000.0, clock=lambda: next(ticks) / 1000)
    study.run(_measured, SPACE.starts(load_recipe("npti"))[: trials - 1], limits, Silent())


def _study_folder(folder):
    with _opened(folder / "s.sqlite") as study:
        _run(study, 3)
        study.confirm()
    with closing(sqlite3.connect(folder / "s.sqlite")) as database:  # the same bytes, whenever it is made
        database.execute("UPDATE trials SET datetime_start = '2026-01-01', datetime_complete = '2026-01-01'")
        database.commit()
    data = (folder / "s.sqlite").read_bytes()
    for left in folder.iterdir():
        left.unlink()
    return [data]


def _study(path):
    """Trials that count are whole, and give a recipe; it can be gone on with."""
    with _opened(path) as study:
        before = study.finished()
        recipe = load_recipe("npti")
        for one in before:
            with_section(recipe, "calm+", SPACE.section(one.point))
            assert isinstance(SPACE.label(one.point), str)
        _run(study, len(before) + 1)
        assert len(study.finished()) == len(before) + 1
        assert study.failed >= 0
        study.confirm()
        assert study.confirmed > 0


TARGETS = {
    "recipe": Target("text", "r.toml", plain(_RECIPE), _recipe),
    "recipe-json": Target("json", "r.json", lambda folder: [load_recipe("npti").to_json().encode()], _recipe_inside),
    "override": Target("text", "o.txt", plain("rule.gamma=0.7", "select.at_most=none"), _override),
    "tuned": Target("text", "tuned.toml", _tuned_folder, _tuned),
    "study": Target("sqlite", "s.sqlite", _study_folder, _study),
}
