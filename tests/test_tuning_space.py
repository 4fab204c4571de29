"""What the tuner may choose, what it picks, when it stops, and the recipe that it writes; no model is run."""

import sqlite3
from contextlib import closing

import numpy as np
import optuna
import pytest

from npti_export.errors import DiskFullError, EvaluationError, OutputError, ProfileError, RecipeError
from npti_export.evaluate.document import Estimate
from npti_export.profile import NeuronProfile
from npti_export.progress import Silent
from npti_export.recipe import PoleSection, Recipe, load_recipe, recipe_from_json
from npti_export.rule import build_rule
from npti_export.traits import TraitSpec
from npti_export.tuning.budget import Budget, largest_gain, pareto_front
from npti_export.tuning.recipe_file import write_recipe
from npti_export.tuning.search import Limits, opened_study
from npti_export.tuning.space import Space, with_section
from npti_export.tuning.trial import Figures

LAYERS, WIDTH = 6, 50
SPEC = TraitSpec("openness", "+")
SPACE = Space(LAYERS, LAYERS * WIDTH)


@pytest.fixture(scope="module")
def profile():
    rng = np.random.default_rng(3)
    p_plus, p_minus, a95, other = rng.random((4, LAYERS, WIDTH)).astype(np.float32)
    means = rng.normal(size=(3, LAYERS, WIDTH)).astype(np.float32)
    deviation = (0.2 + rng.random((LAYERS, WIDTH)) * 3).astype(np.float32)
    return NeuronProfile("openness", p_plus, p_minus, a95, other, None, {}, *means[:2], deviation, means[2])


def drawn(space, count):
    """Points drawn at random, with the parameters that gave them."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(count):
        trial = study.ask()
        yield space.suggest(trial), trial.params
        study.tell(trial, 0.0)


def equal(one, other):
    np.testing.assert_array_equal(one.shift, other.shift)
    np.testing.assert_array_equal(one.clamp, other.clamp)
    zero = np.zeros_like(one.shift)
    constants = [zero if rule.constant is None else rule.constant for rule in (one, other)]
    np.testing.assert_array_equal(*constants)


@pytest.mark.parametrize(
    "space",
    [
        SPACE,
        Space(LAYERS, LAYERS * WIDTH, matched=False),
        Space(LAYERS, LAYERS * WIDTH, constants=False, matched=False),
        Space(LAYERS, LAYERS * WIDTH, selects=False),
        Space(LAYERS, LAYERS * WIDTH, constants=False, selects=False),
        Space(1, 3),
    ],
)
def test_every_point_is_a_recipe(space, profile):
    base, kinds = load_recipe("smollm2-135m"), set()
    for point, parameters in drawn(space, 150):
        assert space.point(parameters) == space.point(space.parameters(point)) == point
        recipe = with_section(base, "openness+", space.section(point))
        assert recipe_from_json(recipe.to_json()) == recipe  # all of it is validated again
        rule = recipe.for_pole("openness+").rule
        parts = (rule.shift, rule.clamp, rule.constant > 0, rule.matched > 0)
        kinds.add(parts)
        assert any(parts)
        amounts = (point.gamma * rule.shift, point.constant, point.matched)
        assert (rule.gamma * rule.shift, rule.gamma * rule.constant, rule.gamma * rule.matched) == pytest.approx(
            amounts, rel=1e-5
        )
        assert not (rule.matched and not space.matched)
        assert not (rule.constant and not space.constants)
        assert not ((rule.shift or rule.clamp) and not space.selects)
        assert space.label(point)
        if space is not SPACE:
            continue
        try:
            made = build_rule(profile, SPEC, recipe)
        except ProfileError:
            continue  # nothing is as large as it asks for
        touched = np.flatnonzero((made.shift != 0).any(1) | made.clamp.any(1))
        assert set(touched) <= set(range(point.first, point.last))
        if point.count and (point.first, point.last) == (0, LAYERS):
            assert made.shifted == (point.count if rule.shift else 0)
            assert made.clamped == (point.count if rule.clamp else 0)
    constants = 2 ** (space.constants + space.matched)
    assert len(kinds) == (4 if space.selects else 1) * constants - 1


def test_starts_are_the_shipped_methods(profile):
    base = load_recipe("npti", ["select.at_least=40", "select.at_most=40", "rule.gamma=0.7"])
    found = [with_section(base, "openness+", SPACE.section(point)) for point in SPACE.starts(base)]
    ours = [build_rule(profile, SPEC, recipe) for recipe in found]
    theirs = [base, load_recipe("npti")]
    theirs += [load_recipe("matched", [f"rule.gamma={strength}"]) for strength in (1.5, 2, 1, 2.5)]
    theirs += [load_recipe("dpn-le"), load_recipe("mean-shift")]
    assert len(ours) == len(theirs)
    for one, recipe in zip(ours, theirs, strict=True):
        equal(one, build_rule(profile, SPEC, recipe))
    matched = Space(LAYERS, LAYERS * WIDTH, constants=False, selects=False)
    assert [one.matched for one in matched.starts(base)] == [1.5, 2, 1, 2.5]
    plain = Space(LAYERS, LAYERS * WIDTH, constants=False, matched=False)
    assert len(plain.starts(base)) == 2
    assert plain.nearest(load_recipe("matched")) is None


def test_what_is_picked_against_plain_sorting():
    rng = np.random.default_rng(0)
    for _ in range(50):
        gains, damages, fluencies = rng.integers(0, 6, (3, 25)) / 10  # with ties
        budget, unsteered = Budget(0.3, 0.25), -1.2
        want = []
        for index in range(25):  # the front: nothing before it in the order of damage gains as much
            before = [g for g, d in zip(gains, damages, strict=True) if d < damages[index]]
            beside = [g for g, d in zip(gains, damages, strict=True) if d == damages[index]]
            want.append(gains[index] == max(beside) and all(gains[index] > g for g in before))
        assert pareto_front(list(gains), list(damages)) == want
        within = [budget.holds(d, -1.1 - f, unsteered) for d, f in zip(damages, fluencies, strict=True)]
        allowed = [i for i in range(25) if damages[i] <= 0.3 and -1.1 - fluencies[i] >= -1.5]
        ranked = sorted(allowed, key=lambda i: (damages[i], i))
        ranked.sort(key=lambda i: gains[i], reverse=True)  # stable
        assert largest_gain(list(gains), list(damages), within) == (ranked[0] if ranked else None)
    assert largest_gain([1.0], [0.0], [False]) is None
    with pytest.raises(EvaluationError, match="--max-kl -1"):
        Budget(-1)


def figures(gain, damage=0.1):
    one = lambda value: Estimate(mean=value, low=value, high=value, n=3)  # noqa: E731
    return Figures(one(gain), one(-1.0), one(damage))


class Clock:
    """Each trial takes ten seconds."""

    now = 0.0

    def __call__(self):
        return self.now

    def trial(self, point):
        self.now += 10
        return figures(point.matched, point.matched / 10)


def study_of(path, name="a", seed=0):
    return opened_study(path, name, SPACE, lambda one: (one.damage.mean - 0.1, -1.0), seed=seed)


@pytest.mark.parametrize(
    ("limits", "trials"),
    [
        ((None, 0.0, 0.0), 1),  # one in any case
        ((None, 65.0, 0.0), 6),
        ((None, 65.0, 3.0), 3),  # thirty seconds are left for what comes after
        ((4, 1000.0, 0.0), 4),
    ],
)
def test_the_search_ends_in_time(limits, trials):
    clock = Clock()
    with study_of(None) as study:
        study.run(clock.trial, SPACE.starts(load_recipe("npti")), Limits(*limits, clock), Silent())
        assert len(study.finished()) == trials
    assert clock.now == 10 * trials


def test_a_study_goes_on_where_it_stopped(tmp_path):
    path, starts = tmp_path / "a ?%.sqlite", SPACE.starts(load_recipe("npti"))
    tried = []

    def killed(point):
        tried.append(point)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return figures(0.5)

    with pytest.raises(KeyboardInterrupt), study_of(path) as study:
        study.run(killed, starts, Limits(9, 1e9), Silent())
    with study_of(path) as study:
        first = study.finished()
        assert [one.point for one in first] == starts[:2]
        study.run(lambda _: figures(0.1), starts, Limits(9, 1e9), Silent())
        study.confirm()
        points = [one.point for one in study.finished()]
    assert sorted(map(str, points[: len(starts)])) == sorted(map(str, starts))  # each once, the killed one again
    assert len(points) == len(set(points)) == 9
    with study_of(path) as study, study_of(path, "b") as other:
        assert study.finished()[:2] == first
        assert (study.confirmed, other.confirmed, other.finished()) == (1, 0, [])
        study.run(lambda _: 1 / 0, starts, Limits(9, 1e9), Silent())  # there are as many already
        assert study.failed == 1


def test_bad_studies_and_fruitless_searches(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"this is not a database, and long enough to be seen as none" * 99)
    with pytest.raises(EvaluationError, match=r"s.sqlite: not a study of trials"), study_of(path):
        pass
    assert path.read_bytes().startswith(b"this is not")
    with pytest.raises(OutputError, match="cannot be written"), study_of(tmp_path / "no" / "s.sqlite"):
        pass

    def fails(_):
        raise ProfileError("no neuron at all")

    with study_of(None) as study, pytest.raises(EvaluationError, match=r"no trial gave a rule.*no neuron at all"):
        study.run(fails, [], Limits(None, 1.0), Silent())


def test_a_full_disk_is_no_damaged_study(tmp_path, monkeypatch):
    """SQLite's own error, of a file that may not grow; afterwards the study goes on."""
    path, connect, most = tmp_path / "s.sqlite", sqlite3.connect, []

    def full(*arguments, **options):
        connection = connect(*arguments, **options)
        if most:
            connection.execute(f"PRAGMA max_page_count={most[0]}").fetchall()
        return connection

    monkeypatch.setattr(sqlite3, "connect", full)
    with study_of(path) as study:
        study.run(lambda _: figures(0.1), [], Limits(2, 1e9), Silent())
        before = study.finished()
        most.append(study._study._storage._backend.engine.raw_connection().execute("PRAGMA page_count").fetchone()[0])
    words = r"s\.sqlite: the disk is full .*goes on from the last"
    with pytest.raises(DiskFullError, match=words), study_of(path) as study:
        study.run(lambda _: figures(0.1), [], Limits(400, 1e9), Silent())
    most.clear()
    with study_of(path) as study:
        assert study.finished()[:2] == before
        study.run(lambda _: figures(0.1), [], Limits(len(study.finished()) + 1, 1e9), Silent())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("update alembic_version set version_num = 'v9.9.9'", "no longer compatible"),
        ("insert into alembic_version values ('v1.3.0.a')", "more than one head"),
        ("update study_directions set direction = 'UP'", "UP"),
        ("delete from study_directions", "other directions"),
        ("delete from studies", ""),
    ],
)
def test_studies_of_other_versions(change, said, tmp_path):
    path = tmp_path / "s.sqlite"
    with study_of(path):
        pass
    with closing(sqlite3.connect(path)) as file:
        file.execute(change)
        file.commit()
    words = rf"s.sqlite: not a study of .*of another version of optuna \(.*{said}.*; name another file$"
    with pytest.raises(EvaluationError, match=words), study_of(path):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        "update trial_user_attributes set value_json = '{}' where key = 'gain'",
        "update trial_user_attributes set value_json = replace(value_json, '0.1', '0.3') where key = 'gain'",
        "update trial_user_attributes set value_json = replace(value_json, '1', '2') where key = 'fluency'",
        "update trial_params set param_value = param_value + 0.25 where param_name = 'matched'",
        "update trial_values set value = value + 1e-9",
        "delete from trial_user_attributes where key = 'sha256'",
    ],
)
def test_damaged_trials_are_refused(damage, tmp_path):
    good = tmp_path / "good.sqlite"
    with study_of(good) as study:
        study.run(lambda _: figures(0.1), SPACE.starts(load_recipe("npti")), Limits(2, 1e9), Silent())
        assert len(study.finished()) == 2
    with sqlite3.connect(good) as database:
        assert database.execute(damage).rowcount > 0
    database.close()
    with study_of(good) as study, pytest.raises(EvaluationError, match=r"trial \d of the study is damaged"):
        study.finished()


def written(path, recipe, pole, point, base="npti", overrides=(), **more):
    about = {"fingerprint": "f" * 64, "model": 'a "model"\x7f\n', "comments": ["gain\n+1"]} | more
    plain = load_recipe(base)
    return write_recipe(path, base, plain, load_recipe(base, overrides), pole, SPACE.section(point), **about)


def test_the_recipe_file_says_what_was_picked(tmp_path, profile):
    path, overrides = tmp_path / "tuned.toml", ["identify.questions=5", "rule.slope=8"]
    points = [point for point, _ in drawn(SPACE, 12)]
    for place, point in enumerate(points):
        kept = written(path, None, "openness+", point, overrides=overrides, force=place > 0)
        assert kept == []
        read = load_recipe(str(path))
        assert (read.identify.questions, read.rule.slope, read.tuned_for) == (5, 8.0, "f" * 64)
        meant = with_section(load_recipe("npti", overrides), "openness+", SPACE.section(point)).for_pole("openness+")
        assert isinstance(meant, Recipe)
        assert (read.for_pole("openness+").rule, read.for_pole("openness+").select) == (meant.rule, meant.select)
    # another pole goes beside it, comments and all; another beginning replaces the file
    before = load_recipe(str(path)).poles["openness+"]
    assert written(path, None, "openness-", points[0], overrides=overrides, force=True) == ["openness+"]
    both = load_recipe(str(path))
    assert both.poles["openness+"] == before
    assert both.poles["openness-"] == SPACE.section(points[0])
    assert path.read_text().count("# gain +1\n") == 2
    assert written(path, None, "openness-", points[1], force=True) == []
    assert set(load_recipe(str(path)).poles) == {"openness-"}
    with pytest.raises(OutputError, match="exists already"):
        written(path, None, "openness-", points[1])


def test_a_recipe_extends_one_beside_it(tmp_path):
    (tmp_path / "sub").mkdir()
    base, point = tmp_path / "sub" / "base.toml", next(drawn(SPACE, 1))[0]
    base.write_text(
        'extends = "npti"\nname = "b"\n[poles."openness+".rule]\nslope = 3.0\nfirst_layer = 0.4\nmatched = 9.0\n'
    )
    written(tmp_path / "tuned.toml", None, "openness+", point, base=str(base))
    assert 'extends = "sub/base.toml"' in (tmp_path / "tuned.toml").read_text()
    rule = load_recipe(str(tmp_path / "tuned.toml")).for_pole("openness+").rule
    assert (rule.slope, round(rule.first_layer * LAYERS)) == (3.0, point.first)
    assert rule.gamma * rule.matched == pytest.approx(point.matched, rel=1e-5)
    with pytest.raises(RecipeError, match=r"in the way of a --set"):  # the base's own pole says otherwise
        written(tmp_path / "new.toml", None, "openness+", point, base=str(base), overrides=["rule.slope=7"])
    with pytest.raises(OutputError, match=r"ends in \.toml"):
        written(tmp_path / "tuned.txt", None, "openness+", point)
    base.write_text('extends = "npti"\nname = "b"\n[select]\nat_most = 9\n')
    with pytest.raises(RecipeError, match=r"select\.at_most=none cannot be written"):
        written(tmp_path / "new.toml", None, "openness+", point, base=str(base), overrides=["select.at_most=none"])
    assert not (tmp_path / "new.toml").exists()


def test_what_a_pole_says_is_overlaid():
    recipe = with_section(load_recipe("npti"), "openness+", PoleSection(rule={"slope": 2.0, "gamma": 1.0}))
    again = with_section(recipe, "openness+", PoleSection(rule={"gamma": 0.5})).for_pole("openness+")
    assert (again.rule.slope, again.rule.gamma) == (2.0, 0.5)
