"""Recipes that steer no neuron: what a kept profile holds all the same, and which settings do nothing."""

import dataclasses
import json

import numpy as np
import pytest
from jobs import npti
from own_trait import write_trait

from npti_export.bench import load_bench
from npti_export.errors import RecipeError
from npti_export.identify.profiles import Place, profile_for
from npti_export.job import Job, prepared
from npti_export.loader import RuntimeSettings, Timings
from npti_export.models import gguf_source
from npti_export.pipeline import obtain_profiles, open_models
from npti_export.progress import Silent
from npti_export.recipe import load_recipe, select_recipe
from npti_export.rule_io import SavedRule
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec

SPEC = TraitSpec("extraversion", "-")
FEW = ("identify.max_new_tokens=8", "identify.batch_size=4", "identify.matched_questions=2")


def rows(path):
    return [row for layer in json.loads(path.read_text()).values() for row in layer]


def test_identify_takes_the_neuron_recipe_of_the_default_model(tmp_path, cli_environment):
    arguments = ["--out", "Extraversion_dict.json", "--questions", "2", "--max-new-tokens", "8", "--batch-size", "4"]
    done = npti("identify", "--trait", "extraversion", *arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "match" not in done.stderr  # constants are for nothing here
    assert len(rows(tmp_path / "Extraversion_dict.json")) >= 1000
    # one that is named is taken as it is
    with prepared(Job((SPEC,), None, recipe="matched", save_profile=tmp_path / "e.safetensors")) as ready:
        assert (ready.recipe.name, ready.kept.name) == ("matched", "matched")


@pytest.mark.parametrize("name", ["Extraversion_dict.json", "e.safetensors"])
def test_a_profile_kept_by_a_job_with_constants(tmp_path, name):
    """Neurons by the neuron recipe's numbers, constants of the pole that the job needs."""
    overrides = ("identify.questions=2", "select.threshold=0.9", "rule.gamma=1.2", *FEW)
    job = Job((SPEC,), tmp_path / "m.gguf", save_profile=tmp_path / name, overrides=overrides)
    job = dataclasses.replace(job, runtime=RuntimeSettings(threads=1))
    with prepared(job) as ready, open_models(ready, Timings(), Silent(), verifies=False) as models:
        assert (ready.recipe.name, ready.kept.name) == ("smollm2-135m", "smollm2-135m-npti")
        profile = obtain_profiles(ready, models, Timings(), Silent())["extraversion"]
    assert profile.matched_plus is None
    assert np.abs(profile.matched_minus).max() > 0
    assert np.abs(profile.delta).max() > 0
    assert profile.origin["recipe"]["name"] == "smollm2-135m-npti"
    assert (tmp_path / name).is_file()
    if name.endswith(".json"):
        assert len(rows(tmp_path / name)) >= 1000  # select.at_least


def test_what_is_matched_does_not_depend_on_the_questions_of_neurons(make_tiny, tmp_path):
    source, loads = gguf_source(make_tiny()), []
    with LlamaCppRuntime(source.path, Settings(threads=1), sequences=2, source=source) as llama:
        place = Place(lambda: loads.append(1) or llama, source, "ggml", "cpu", tmp_path)
        bench, found = load_bench("extraversion"), []
        for count in (0, 5, 9):
            recipe = load_recipe("matched", [*FEW, f"identify.questions={count}"])
            found.append(profile_for(place, bench, ["-"], recipe, Silent()).matched_minus)
        assert len(loads) == 1
        fresh = dataclasses.replace(place, cache=None)
        np.testing.assert_array_equal(profile_for(fresh, bench, ["-"], recipe, Silent()).matched_minus, found[0])
        for other in ("identify.seed=1", "identify.matched_questions=3", "identify.max_new_tokens=7"):
            loads.clear()
            profile_for(place, bench, ["-"], load_recipe("matched", [*FEW, other]), Silent())
            assert len(loads) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("identify.questions=12", r"--questions \[identify.questions\]: .*steers no neuron.*matched_questions=N"),
        ("identify.until=all", r"--until \[identify.until\]: says how neurons are found"),
        ("identify.overlap=0.5", "--set identify.overlap: says how neurons are found"),
        ("identify.floor=4", "--set identify.floor: "),
        ("select.threshold=0.2", "--set select.threshold: .*leave it out, or name a recipe.*--recipe npti"),
        ("select.at_most=none", "--set select.at_most: "),
        ("rule.percentile=0.9", "--set rule.percentile: "),
        ("rule.slope=3", "--set rule.slope: "),
        ("rule.magnitude=0.9", "--set rule.magnitude: "),
        ("compile.program=bias", r"--program \[compile.program\]: says how shifts and clamps are written"),
        ("compile.layout=ragged", r"--layout \[compile.layout\]: says how"),
        ("compile.clamp_units=3", "--set compile.clamp_units: .*biases under every program"),
    ],
)
def test_settings_of_neurons_are_refused_where_none_is_steered(override, words, tiny, tmp_path):
    job = Job((SPEC,), tmp_path / "m.gguf", model=str(tiny), recipe="matched", overrides=(override,))
    with pytest.raises(RecipeError, match=words), prepared(job):
        pass
    with prepared(dataclasses.replace(job, recipe="npti")) as ready:
        assert ready.recipe == load_recipe("npti", [override])
    both = dataclasses.replace(job, overrides=("rule.shift=true", override))
    with prepared(both) as ready:  # matched and neurons
        assert ready.recipe.rule.by_neurons


def test_settings_that_do_something_there_are_taken(tiny, tmp_path):
    settings = (*FEW, "identify.seed=3", "identify.repetition_penalty=1.2", "rule.gamma=2", "rule.first_layer=0.5")
    job = Job((SPEC,), tmp_path / "m.gguf", model=str(tiny), recipe="matched", overrides=settings)
    with prepared(job) as ready:
        assert ready.recipe == load_recipe("matched", settings)
    # a kept profile has neurons, which these find
    found = (*FEW, "identify.questions=9", "identify.until=all", "select.threshold=0.2", "rule.percentile=0.9")
    with prepared(dataclasses.replace(job, overrides=found, save_profile=tmp_path / "e.safetensors")) as ready:
        assert ready.kept.identify.questions == 9
    with prepared(Job((SPEC,), tmp_path / "m.gguf")) as ready:  # recipes set what they like
        assert ready.recipe == select_recipe(None, ready.source.fingerprint)


def test_a_rule_of_constants_alone_takes_no_program(tiny, tmp_path):
    from evaluations import bake, saved_rule, strong_rule

    rule = strong_rule()
    bare = dataclasses.replace(rule, shift=np.zeros_like(rule.shift), clamp=np.zeros_like(rule.clamp))
    for name, one in (("bare.gguf", bare), ("whole.gguf", rule)):
        saved: SavedRule = saved_rule(tiny, one, trait="extraversion+")
        path = bake(tiny, tmp_path / name, saved)
        job = Job((), tmp_path / "m.gguf", rule_from=path, model=str(tiny), overrides=("compile.program=bias",))
        if one is rule:
            with prepared(job) as ready:
                assert ready.recipe.compile.program == "bias"
        else:
            words = r"--program .*bare.gguf steers no neuron.*leave it out$"
            with pytest.raises(RecipeError, match=words), prepared(job):
                pass


def test_a_small_bench_has_questions_enough_where_no_neuron_is_counted(tiny, cli_environment, tmp_path):
    """Six search questions are less than the recipe's, which are for neurons; constants take the two that are set."""
    trait = write_trait(tmp_path / "pirate")
    small = ["--set", "verify.prompts=1", "--set", "verify.answer_tokens=4", "--max-new-tokens", "4"]
    job = ["--trait", f"{trait}+", "--model", tiny, "--recipe", "matched", "--out", "m.gguf", *small]
    done = npti(*job, "--set", "identify.matched_questions=2", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = npti(*job, "--set", "identify.matched_questions=7", "--force", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "pirate: 7 search questions asked for, the bench has 6" in done.stderr


def test_the_folder_of_several_profiles_is_made_when_it_is_needed(tiny, cli_environment, tmp_path):
    job = ["identify", "--trait", "extraversion", "--trait", "openness", "--model", tiny, "--out", "profiles"]
    few = ["--questions", "2", "--max-new-tokens", "4", "--batch-size", "4"]
    refused = npti(*job, "--questions", "9999", environment=cli_environment, cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "profiles").exists()
    done = npti(*job, *few, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "profiles").iterdir())
    assert names == ["extraversion.safetensors", "openness.safetensors"]
    again = npti(*job, *few, "--set", "identify.seed=1", environment=cli_environment, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already, and is another profile; pass --force" in again.stderr
