import pytest

from npti_export.errors import RecipeError
from npti_export.models import resolve_model
from npti_export.recipe import load_recipe, select_recipe, shipped_recipes


def test_npti_has_the_papers_numbers():
    recipe = load_recipe("npti")
    assert (recipe.select.threshold, recipe.select.at_least, recipe.select.at_most) == (0.1, 0, None)
    assert (recipe.rule.slope, recipe.rule.center, recipe.rule.percentile) == (10.0, 0.15, 0.95)
    assert (recipe.identify.max_new_tokens, recipe.identify.repetition_penalty) == (500, 1.1)
    assert recipe.rule.shift
    assert recipe.rule.clamp


def test_every_shipped_recipe_loads():
    assert {"best", "npti", "smollm2-135m", "smollm2-135m-npti"} <= set(shipped_recipes())
    for name in shipped_recipes():
        assert load_recipe(name).name == name


def test_the_default_model_gets_its_tuned_recipe_and_others_the_papers():
    default = resolve_model(None).fingerprint
    assert select_recipe(None, default).name == "smollm2-135m"
    assert select_recipe(None, default, neurons=True).name == "smollm2-135m-npti"
    assert {select_recipe(None, "0" * 64, neurons=flag).name for flag in (False, True)} == {"npti"}
    assert select_recipe("npti", resolve_model(None).fingerprint).name == "npti"


def test_overrides_win_and_keep_their_types():
    recipe = load_recipe("npti", ["rule.gamma=2", "rule.clamp=false", "prompt.system=Be {persona}", "select.at_most=7"])
    assert (recipe.rule.gamma, recipe.rule.clamp, recipe.prompt.system) == (2.0, False, "Be {persona}")
    assert recipe.select.at_most == 7


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rule.gama=1", "unknown key 'rule.gama'"),
        ("gamma=1", "unknown key 'gamma'"),
        ("rule.gamma=0", "'rule.gamma'"),
        ("rule.gamma=-1", "'rule.gamma'"),
        ("rule.gamma=nan", "'rule.gamma'"),
        ("rule.gamma=inf", "'rule.gamma'"),
        ("rule.gamma=strong", "'rule.gamma'"),
        ("rule.percentile=1", "'rule.percentile'"),
        ("identify.batch_size=0", "'identify.batch_size'"),
        ("compile.clamp_units=9", "'compile.clamp_units'"),
        ("prompt.user=hello", "must contain {question}"),
        ("rule", "section.key=value"),
        ("name.foo=3", "is a single value"),
        ("verify.answer_tokens=0", "'verify.answer_tokens'"),
        ("a.b.c=1", "section.key=value"),
    ],
)
def test_bad_overrides_are_named(override, says):
    with pytest.raises(RecipeError) as error:
        load_recipe("npti", [override])
    assert says in str(error.value)


def test_a_cap_below_the_floor_is_refused_and_can_be_lifted():
    with pytest.raises(RecipeError, match="at_least = 5000 is more than at_most = 1000"):
        load_recipe("smollm2-135m-npti", ["select.at_least=5000"])
    assert load_recipe("smollm2-135m-npti", ["select.at_least=5000", "select.at_most=none"]).select.at_most is None


def test_all_faults_are_listed_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "npti"\nname = "mine"\n[rule]\ngamma = -1\nspeed = 3\n')
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert "'rule.gamma'" in str(error.value)
    assert "'rule.speed'" in str(error.value)


def test_extends_gives_only_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "npti"\nname = "mine"\n[rule]\ngamma = 0.25\n')
    recipe = load_recipe(str(path))
    assert recipe.rule.gamma == 0.25
    assert recipe.rule.slope == load_recipe("npti").rule.slope


@pytest.mark.parametrize(
    ("content", "says"),
    [("name = ", "not valid TOML"), ("extends = 3", "name of a recipe"), ('extends = "nowhere"', "not shipped")],
)
def test_broken_files(tmp_path, content, says):
    path = tmp_path / "broken.toml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=says):
        load_recipe(str(path))


def test_extends_looks_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.toml").write_text('extends = "npti"\nname = "base"\n[rule]\ngamma = 0.3\n')
    (tmp_path / "sub" / "mine.toml").write_text('extends = "base.toml"\nname = "mine"\n')
    assert load_recipe("sub/mine.toml").rule.gamma == 0.3


def test_a_circle_is_refused(tmp_path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'extends = "{two}"')
    two.write_text(f'extends = "{one}"')
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(str(one))


def test_missing_recipe_names_the_shipped_ones():
    with pytest.raises(
        RecipeError, match="best, dpn-le, matched, mean-shift, npti, npti-code, smollm2-135m, smollm2-135m-npti"
    ):
        load_recipe("nptii")
