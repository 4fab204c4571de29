"""Tuning and ablations on a tiny model: figures against plain passes, what is asked when, and what is written."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import random_rule
from documents import sample_document
from fuzz_targets import TARGETS
from jobs import QUICK, npti
from plain_rule import plain_rule
from rich.console import Console
from tolerances import KV_FLOAT16

from npti_export.bench import load_bench
from npti_export.errors import BenchError, EvaluationError, ProfileError, RecipeError
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.capability.tasks import Passage
from npti_export.evaluate.conditions import Test
from npti_export.evaluate.contrast import contrasts
from npti_export.evaluate.delivery import _supplements
from npti_export.evaluate.engine import TorchEngine
from npti_export.evaluate.prompts import prompts
from npti_export.evaluate.run import EvaluationJob
from npti_export.evaluate.subject import SubjectJob
from npti_export.evaluate.supplements import read_ablation, read_tuning, supplemented
from npti_export.identify import profiles
from npti_export.job import Job, prepared
from npti_export.loader import RuntimeSettings
from npti_export.models import resolve_model
from npti_export.profile import NeuronProfile
from npti_export.profile_io import save_profile
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule, build_rule
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec
from npti_export.tuning import strength, tune
from npti_export.tuning.ablate import STRENGTHS, AblationJob, ablate, variations
from npti_export.tuning.budget import Budget
from npti_export.tuning.delivery import deliver_ablation, deliver_tuning
from npti_export.tuning.opening import METHODS, ModelJob, opened
from npti_export.tuning.recipe_file import check_recipe_path
from npti_export.tuning.search import opened_study
from npti_export.tuning.space import Space
from npti_export.tuning.trial import Measure, other_passages, search_questions, trial_passages

SPEC = TraitSpec("extraversion", "-")
FEW = ("identify.questions=4", "identify.max_new_tokens=6", "identify.batch_size=8", "identify.matched_questions=3")
WIDE = Budget(50, 50)
SHORT = {"questions": 3, "answer_tokens": 5, "personas": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("identified")


@pytest.fixture
def subject(tiny, cache):
    return ModelJob(SPEC, str(tiny), "npti", FEW, runtime=RuntimeSettings(threads=1), cache=cache)


def job(subject, tmp_path, trials=3, **more):
    defaults = {"test_questions": 2, "budget": WIDE, "storage": tmp_path / "study.sqlite"}
    return tune.TuneJob(subject, trials=trials, **(SHORT | defaults | more))


def log_softmax(logits):
    return torch.log_softmax(logits.double(), -1)


def likelihood(model, prompt, answer):
    with torch.inference_mode():
        rows = log_softmax(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0])
    return float(rows[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).mean())


def test_figures_of_a_trial_against_plain_passes(tiny_runtime):
    bench, recipe, model = load_bench("extraversion"), load_recipe("npti", FEW), tiny_runtime.model
    rule = random_rule(tiny_runtime.source.shape.layers, tiny_runtime.source.shape.width)
    questions, passages = bench.search(3), [Passage(text="Rivers run to the sea."), Passage(text="Bread is baked.")]
    measure = Measure(TorchEngine(tiny_runtime), Test(bench, "-", questions, recipe, 5, 1), passages)
    found = measure.rule(rule)
    prompts = [tiny_runtime.encode(chat(None, one.text)) for one in questions]
    ask = lambda: tiny_runtime.generate(prompts, max_new_tokens=5, repetition_penalty=1.1)  # noqa: E731
    before, texts = ask(), [torch.tensor([tiny_runtime.encode_text(one.text)]) for one in passages]
    with torch.inference_mode():
        ours = [log_softmax(model(input_ids=text).logits[0]) for text in texts]
        with plain_rule(model, rule):
            after, others = ask(), [log_softmax(model(input_ids=text).logits[0]) for text in texts]
    damage = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(ours, others, strict=True)]
    personas = {sign: tune_personas(bench, sign, recipe) for sign in "+-"}

    def contrast(answers):
        values = []
        for place, (question, one) in enumerate(zip(questions, answers, strict=True)):
            under = {
                sign: tiny_runtime.encode(chat(texts[place % len(texts)], question.text))
                for sign, texts in personas.items()
            }
            values.append(likelihood(model, under["-"], one.response) - likelihood(model, under["+"], one.response))
        return np.mean(values)

    assert found.gain.mean == pytest.approx(contrast(after) - contrast(before), abs=1e-4)
    fluency = np.mean([likelihood(model, *pair) for pair in zip(prompts, (one.response for one in after), strict=True)])
    assert found.fluency.mean == pytest.approx(fluency, abs=1e-4)
    assert found.damage.mean == pytest.approx(np.mean(damage), rel=1e-2)
    assert found.damage.n == 2
    assert (np.array([one.response for one in before]) != np.array([one.response for one in after])).any()
    assert found.gain.high - found.gain.low > 1e-2 < found.damage.mean


def tune_personas(bench, sign, recipe):
    from npti_export.bench import scoring_personas

    return [recipe.prompt.system.replace("{persona}", one.text) for one in scoring_personas(bench, sign, 0)]


def test_questions_are_apart():
    bench, recipe = load_bench("openness"), load_recipe("npti", ["identify.matched_questions=20"])
    for count in (1, 32, len(bench.split("search")) - 20):
        found = search_questions(bench, recipe, count)
        assert len(set(found)) == count
        assert not set(found) & set(bench.search(20))
        assert all(one.split == "search" for one in found)
        assert found == search_questions(bench, recipe, count)
    for bad in (0, count + 1):
        with pytest.raises(BenchError, match="search questions asked for"):
            search_questions(bench, recipe, bad)
    assert not {one.text for one in trial_passages()} & {one.text for one in other_passages()}


def test_nothing_is_chosen_by_test_questions(subject, tmp_path, monkeypatch):
    bench, events = load_bench("extraversion"), []
    encode, pick = LlamaCppRuntime.encode, tune.largest_gain

    def spy(self, messages):
        events.append(messages[-1]["content"])
        return encode(self, messages)

    monkeypatch.setattr(LlamaCppRuntime, "encode", spy)
    monkeypatch.setattr(tune, "largest_gain", lambda *all: events.append(None) or pick(*all))
    tuned = tune.tune(job(subject, tmp_path), Silent())
    held_out = {one.text for one in bench.split("test")}
    picked = events.index(None)
    assert picked > 10
    assert not held_out & set(events[:picked])
    assert held_out & set(events[picked:]) == {one.text for one in bench.test(2)}
    assert {one.text for one in search_questions(bench, tuned.recipe, 3)} <= set(events[:picked])
    told = tuned.record.confirmation
    assert [one.name for one in told.conditions] == ["unsteered", "steered", "prompt-persona"]
    assert [one.contrast.n for one in told.conditions] == [2] * 3
    assert told.kl_neutral.n == len(other_passages())
    assert told.within  # WIDE
    base, steered, _ = told.conditions
    loss = (base.fluency.mean - steered.fluency.mean) / abs(base.fluency.mean)
    kept = dataclasses.replace(WIDE, max_kl=told.kl_neutral.mean * 1.01, max_fluency_loss=max(loss, 0) + 1e-3)
    assert kept.holds(told.kl_neutral.mean, steered.fluency.mean, base.fluency.mean)
    # a pick that keeps the budget on what it was picked by, and not on the text that no trial saw
    again = job(subject, tmp_path, budget=Budget(told.kl_neutral.mean * 0.999, 50))
    monkeypatch.setattr(tune, "largest_gain", lambda *_: picked_place(tuned.record))
    told = tune.tune(again, Silent()).record.confirmation
    assert not told.within
    assert told.kl_neutral.mean > again.budget.max_kl


def picked_place(record):
    return next(place for place, one in enumerate(record.pareto) if one.chosen)


def test_a_tuned_recipe_gives_the_rule_that_was_picked(subject, tmp_path):
    asked, out, path = job(subject, tmp_path, trials=5), tmp_path / "t.toml", tmp_path / "t.json"
    console = Console(record=True, width=200, file=(tmp_path / "printed").open("w"))
    record = deliver_tuning(asked, console, Silent(), out=out, json_path=path)
    assert read_tuning(path) == record
    assert len(record.trials) == len(record.pareto) == 5
    gains, damages = [one.gain.mean for one in record.trials], [one.damage.mean for one in record.trials]
    (chosen,) = [place for place, one in enumerate(record.pareto) if one.chosen]
    assert gains[chosen] == max(gains)
    assert [(one.gain, one.damage) for one in record.pareto] == list(zip(gains, damages, strict=True))
    with opened(subject, Silent()) as at:
        profile, trial = at.whole_profile(METHODS), record.trials[chosen]
        values = [f"rule.{key}={str(value).lower()}" for key, value in trial.rule.items()]
        values += [f"select.{key}={value}" for key, value in trial.select.items()]
        want, got = (
            build_rule(profile, SPEC, one) for one in (load_recipe("npti", [*FEW, *values]), load_recipe(str(out)))
        )
        assert trial.rule["shift"] or trial.rule["clamp"] or trial.rule["constant"] or trial.rule["matched"]
        for name in ("shift", "clamp"):
            np.testing.assert_array_equal(getattr(want, name), getattr(got, name))
        assert (want.constant is None) == (got.constant is None)
        if want.constant is not None:
            np.testing.assert_array_equal(want.constant, got.constant)
        test = Test(at.bench, "-", search_questions(at.bench, at.recipe, 3), at.recipe, 5, 1)
        again = Measure(at.engine(), test, trial_passages()).rule(got)
    assert again.gain == trial.gain
    assert again.damage.mean == pytest.approx(trial.damage.mean, abs=1e-6)
    printed = console.export_text()
    assert "picked" in printed
    assert trial.label in printed
    assert "Persona prompt" in printed
    assert "budget     kept by both of these" in printed
    # more of the same go on in the same study, and the test questions' earlier use is told
    more = tune.tune(dataclasses.replace(asked, trials=6), Silent()).record
    assert more.trials[:5] == record.trials
    assert len(more.trials) == 6
    assert (record.confirmation.before, more.confirmation.before) == (0, 1)
    other = tune.tune(dataclasses.replace(asked, trials=1, answer_tokens=4), Silent()).record
    assert len(other.trials) == 1  # of other questions or lengths: another study in the same file
    # an evaluation takes it, where it is of the same model and pole
    assert supplemented(sample_document(recipe=None), record, None).pareto == record.pareto


def test_no_trial_within_the_budget(subject, tmp_path):
    asked = job(subject, tmp_path, trials=1, budget=Budget(0.0, 0.0), storage=None)
    console = Console(file=(tmp_path / "printed").open("w"))
    with pytest.raises(EvaluationError, match=r"none of 1 trials keeps the budget.*no recipe was written"):
        deliver_tuning(asked, console, Silent(), out=tmp_path / "t.toml", json_path=tmp_path / "t.json")
    record = read_tuning(tmp_path / "t.json")
    assert not (tmp_path / "t.toml").exists()
    assert record.confirmation is None
    assert [one.chosen for one in record.pareto] == [False]
    assert list((subject.cache / "tune").glob("extraversion--*.sqlite"))


def test_methods_that_are_left_out_are_neither_identified_nor_tried(subject, tmp_path, monkeypatch):
    def identifies(*_, **__):
        raise AssertionError("a neuron is identified")

    asked = job(subject, tmp_path, trials=4, methods=("matched",))
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "collect", identifies)
        record = tune.tune(asked, Silent()).record
    assert [one.label.split()[0] for one in record.trials] == ["matched"] * 4
    assert record.confirmation is not None
    unconfirmed = tune.tune(dataclasses.replace(asked, confirm=False), Silent()).record
    assert (unconfirmed.confirmation, unconfirmed.pareto) == (None, record.pareto)
    assert {(one.rule["shift"], one.rule["clamp"], one.rule["constant"]) for one in record.trials} == {
        (False, False, 0.0)
    }
    assert max(one.gain.mean for one in record.trials) != 0
    neurons = tune.tune(job(subject, tmp_path, trials=3, methods=("neurons",)), Silent()).record
    assert all(one.rule["matched"] == one.rule["constant"] == 0 for one in neurons.trials)
    assert neurons.settings["study"] != record.settings["study"]
    for bad in ((), ("neurons", "prompts")):
        with pytest.raises(EvaluationError, match=r"--methods .*: give one or more of neurons, mean, matched"):
            tune.tune(job(subject, tmp_path, methods=bad), Silent())


def test_models_without_means_or_matched_constants(subject, monkeypatch):
    notes = []

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    def fails(*_):
        raise ProfileError("does not follow")

    with opened(subject, Noting()) as at:
        monkeypatch.setattr(profiles, "match", fails)
        monkeypatch.setattr(profiles, "_read", lambda _: None)
        profile = at.whole_profile(METHODS)
        assert profile.matched_minus is None
        assert profile.mean_minus is not None
        assert any("tuned without matched constants" in one for one in notes)


def flipped(module, monkeypatch):
    """Scores the same answers towards the other pole, so that every gain changes its sign."""
    monkeypatch.setattr(module, "Test", lambda bench, sign, *more: Test(bench, "+" if sign == "-" else "-", *more))


def test_what_moves_the_answers_away_is_no_pick(subject, tmp_path, monkeypatch):
    asked = job(subject, tmp_path, trials=1, methods=("matched",), storage=None)
    asked = dataclasses.replace(asked, subject=dataclasses.replace(subject, cache=None))
    (trial,) = tune.tune(asked, Silent()).record.trials
    with monkeypatch.context() as patch:
        if trial.gain.mean > 0:
            flipped(tune, patch)
        console = Console(record=True, width=200, file=(tmp_path / "printed").open("w"))
        words = r"none of 1 trials within the budget .* moves the answers towards extraversion-; the best, trial 0 "
        words += r"\(matched .*\), gains -0\.\d+ at KL .*no recipe was written"
        with pytest.raises(EvaluationError, match=words):
            deliver_tuning(asked, console, Silent(), out=tmp_path / "t.toml", json_path=tmp_path / "t.json")
    record = read_tuning(tmp_path / "t.json")
    assert record.trials[0].gain.mean == pytest.approx(-abs(trial.gain.mean))
    assert record.trials[0].within
    assert record.confirmation is None  # no test question is spent on it
    assert not (tmp_path / "t.toml").exists()
    assert "picked" not in console.export_text()
    # a strength alone, likewise
    auto = Job((SPEC,), None, model=subject.model, recipe="matched", overrides=FEW[1:], runtime=subject.runtime)
    how = strength.Auto(WIDE, minutes=0, questions=3, answer_tokens=5)
    with monkeypatch.context() as patch:
        for _ in range(2):  # one of the two signs is negative
            try:
                strength.with_strengths(auto, Silent(), how)
            except EvaluationError as error:
                words = r"no strength within .* the best, 1 times the recipe's, gains -0\.\d+ at KL"
                assert re.search(words, str(error))
                break
            flipped(strength, patch)
        else:
            pytest.fail("a gain below 0 is taken")


def test_two_runs_of_one_study(subject, tmp_path):
    path, space = tmp_path / "study.sqlite", Space(3, 288)
    told = {"seed": 0}
    with opened_study(path, "calm abc", space, lambda _: (0, 0), **told):
        words = r"study.sqlite: another run is making trials .*\(calm, .*--storage"
        with (
            pytest.raises(EvaluationError, match=words),
            opened_study(path, "calm abc", space, lambda _: (0, 0), **told),
        ):
            pass
        with opened_study(path, "calm def", space, lambda _: (0, 0), **told) as other:  # another one in the same file
            assert other.finished() == []
    with opened_study(path, "calm abc", space, lambda _: (0, 0), **told) as again:
        assert again.finished() == []
    # what tune itself does while another one is at work
    asked = job(subject, tmp_path, trials=1, methods=("matched",), confirm=False)
    study = f"extraversion- {tune.tune(asked, Silent()).record.settings['study']}"
    words = r"another run is making trials of this study \(extraversion-, "
    with opened_study(path, study, space, lambda _: (0, 0), **told), pytest.raises(EvaluationError, match=words):
        tune.tune(dataclasses.replace(asked, trials=2), Silent())


def test_a_mixture_of_experts_has_no_constants(subject, make_tiny, tmp_path, cli_environment):
    notes, path = [], make_tiny(experts=True)

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    with opened(dataclasses.replace(subject, model=str(path)), Noting()) as at:
        assert at.methods(METHODS) == ("neurons",)
        assert at.methods(("neurons",)) == ("neurons",)
        (note,) = notes
        assert re.match(r"tuned without mean, matched: .* is a mixture of experts", note)
    with opened(subject, Noting()) as at:
        assert at.methods(METHODS) == METHODS
    for methods in ("mean", "matched", "mean,matched"):
        few = ["--trait", "calm", "--methods", methods, "--model", path]
        done = npti("tune", *few, environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert f"--methods {methods.replace(',', ', ')}: " in line
        assert "mixture of experts" in line
        assert line.endswith("give --methods neurons")


def test_sweeps_are_of_the_rules_that_they_say(subject, tmp_path):
    recipe = ["rule.matched=0.5", "select.at_least=6", "select.at_most=6"]
    varied = dataclasses.replace(subject, overrides=(*FEW, *recipe))
    path = tmp_path / "a.json"
    console = Console(record=True, width=160, file=(tmp_path / "printed").open("w"))
    record = deliver_ablation(AblationJob(varied, **SHORT), console, Silent(), json_path=path)
    assert read_ablation(path) == record
    points = {sweep.setting: {one.value: one for one in sweep.points} for sweep in record.sweeps}
    assert list(points) == ["gamma", "threshold", "parts", "prompt"]
    assert list(points["prompt"]) == ["adjective", "persona"]
    assert list(points["gamma"]) == pytest.approx([1.4 * factor for factor in STRENGTHS])
    assert list(points["parts"]) == ["shift only", "clamp only", "matched only", "all"]
    assert any("prompt tokens" in note for note in record.notes)
    assert "clamp only" in console.export_text()
    rows = {
        ("gamma", 0.7): (0.5, []),
        ("threshold", 0.15): (1, ["select.threshold=0.15", "select.at_least=0", "select.at_most=none"]),
        ("parts", "clamp only"): (1, ["rule.shift=false", "rule.matched=0"]),
        ("parts", "all"): (1, []),
    }
    with opened(varied, Silent()) as at:
        profile = at.profile(at.recipe)
        test = Test(at.bench, "-", search_questions(at.bench, at.recipe, 3), at.recipe, 5, 1)
        measure = Measure(at.engine(), test, trial_passages())
        for (setting, value), (factor, changes) in rows.items():
            spec, changed = TraitSpec("extraversion", "-", factor), load_recipe("npti", [*FEW, *recipe, *changes])
            figures = measure.rule(build_rule(profile, spec, changed))
            point = points[setting][value]
            assert (point.gain, point.fluency) == (figures.gain, figures.fluency)
            assert point.kl_neutral.mean == pytest.approx(figures.damage.mean, abs=1e-6)
        base = measure.base.towards("-")
        for how, point in points["prompt"].items():
            asked = prompts(at.engine().base, at.bench, test.questions, "-", at.recipe, how)
            told = at.engine().base.generate(asked, max_new_tokens=5, repetition_penalty=1.1)
            texts = [one.response for one in told]
            (plus,) = contrasts(at.engine().base, at.bench, test.questions, [texts], at.recipe, personas=1)
            assert point.gain.mean == pytest.approx((-plus - base).mean(), abs=20 * KV_FLOAT16)
            assert point.kl_neutral is None
    measured = [one.kl_neutral for sweep in points.values() for one in sweep.values() if one.kl_neutral]
    assert len({one.mean for one in measured}) > 8
    assert supplemented(sample_document(recipe=None), None, record).sweeps == record.sweeps


def test_gamma_auto_takes_the_best_strength_within_the_budget(subject, tiny, monkeypatch):
    subject = dataclasses.replace(subject, recipe="mean-shift")
    asked = Job((SPEC,), None, model=str(tiny), recipe="mean-shift", overrides=FEW, runtime=subject.runtime)
    asked = dataclasses.replace(asked, cache=subject.cache)
    sweep = ablate(AblationJob(subject, questions=3, answer_tokens=5, personas=2), Silent()).sweeps[0]
    by_value = {one.value / 2: one for one in sweep.points}  # of the recipe's gamma, 2
    limit = sorted(one.kl_neutral.mean for one in sweep.points)[3]
    want = max((one for one in sweep.points if one.kl_neutral.mean <= limit), key=lambda one: one.gain.mean)
    how = strength.Auto(Budget(limit + 1e-6, 50), questions=3, answer_tokens=5)
    (found,) = strength.with_strengths(asked, Silent(), how).traits
    assert by_value[found.strength].gain.mean == pytest.approx(want.gain.mean)
    assert by_value[found.strength].kl_neutral.mean <= limit
    seconds = iter(range(0, 9999, 100))
    quick = dataclasses.replace(how, budget=WIDE, minutes=3, clock=lambda: next(seconds))
    two = (TraitSpec("extraversion", "-", 0.5), TraitSpec("extraversion", "+"))
    with monkeypatch.context() as patch:  # a random model's + is scored towards -, where its answers happen to move
        patch.setattr(strength, "Test", lambda bench, _, *more: Test(bench, "-", *more))
        found = strength.with_strengths(dataclasses.replace(asked, traits=two), Silent(), quick).traits
    assert found == two  # the time is up after the recipe's own
    with pytest.raises(EvaluationError, match=r"no strength of extraversion- from 1 to 1 times .* keeps the budget"):
        strength.with_strengths(asked, Silent(), dataclasses.replace(how, budget=Budget(0, 0), minutes=0))


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_gamma_auto_measures_several_poles_together(subject, tiny, monkeypatch):
    """Each keeps the budget alone; their sum does not, before all are weakened."""
    poles = (TraitSpec("extraversion", "-"), TraitSpec("openness", "+", 1.5))
    subject = dataclasses.replace(subject, recipe="mean-shift")
    asked = Job(poles, None, model=str(tiny), recipe="mean-shift", overrides=FEW, runtime=subject.runtime)
    asked = dataclasses.replace(asked, cache=subject.cache)
    monkeypatch.setattr(
        strength, "_best", lambda _at, _profile, measure, *_: (1.0, measure.figures(measure.base, None))
    )
    told, damages = Told(), {}
    with opened(subject, Silent()) as at:
        text = NeutralText(at.engine().base, trial_passages())
        text.keep()
        shape = at.source.shape.layers, at.source.shape.width
        rules = []
        for spec in poles:
            with opened(dataclasses.replace(subject, trait=spec), Silent()) as other:
                rules.append(build_rule(other.profile(other.recipe), spec, other.recipe).constant)
        for share in strength.SHARES:
            constant = (share * sum(rules)).astype(np.float32)
            moved = SteeringRule(np.zeros(shape, np.float32), np.zeros(shape, np.bool_), constant)
            with at.engine().steered(moved) as runtime:
                damages[share] = float(text.kl(runtime).mean())
    how = strength.Auto(Budget((damages[0.85] + damages[0.7]) / 2, 50), questions=3, answer_tokens=5)
    found = strength.with_strengths(asked, told, how).traits
    assert [one.strength for one in found] == pytest.approx([0.7, 1.05])
    assert any("all together at 0.7 of these strengths: extraversion- " in note for note in told.notes)
    loose = dataclasses.replace(how, budget=Budget(2 * damages[1.0], 50))
    assert strength.with_strengths(asked, told, loose).traits == poles
    tight = dataclasses.replace(how, budget=Budget(damages[0.5] / 2, 50))
    with pytest.raises(EvaluationError, match=r"together the poles do not keep the budget .* not even at 0\.5"):
        strength.with_strengths(asked, told, tight)


def test_gamma_auto_keeps_the_recipe_that_a_published_profile_needs(tmp_path, monkeypatch):
    """Of the default model, whose own recipe needs constants, which such a file does not hold."""
    source, rng = resolve_model(None), np.random.default_rng(7)
    shape = (source.shape.layers, source.shape.width)
    fields = [rng.uniform(0, 1, shape).astype(np.float32) for _ in range(4)]
    path = tmp_path / "Extraversion_dict.json"
    save_profile(NeuronProfile("extraversion", *fields, None), path, force=False, threshold=0.9)
    asked = Job((SPEC,), tmp_path / "m.gguf", profiles=(path,), runtime=RuntimeSettings(threads=1))
    how = strength.Auto(WIDE, minutes=0, questions=2, answer_tokens=4)
    tried = []
    monkeypatch.setattr(strength, "build_rule", lambda *all: tried.append(all) or build_rule(*all))
    try:
        chosen = strength.with_strengths(asked, Silent(), how)
    except EvaluationError:  # these neurons are random: one of the two signs gains
        flipped(strength, monkeypatch)
        chosen = strength.with_strengths(asked, Silent(), how)
    assert {recipe.name for *_, recipe in tried} == {"smollm2-135m-npti"}
    assert chosen == asked  # at strength 1
    with prepared(chosen) as ready:
        assert ready.recipe.name == "smollm2-135m-npti"
        rule = build_rule(ready.profiles["extraversion"], *chosen.traits, ready.recipe)
    assert min(rule.shifted, rule.clamped) > 100  # of those in the file
    assert rule.constant is None


def test_which_tokens_are_steered_in_transformers(subject):
    asked = dataclasses.replace(subject, runtime=RuntimeSettings(engine="transformers"), recipe="mean-shift")
    record = ablate(AblationJob(asked, split="test", **SHORT), Silent())
    (sweep,) = [one for one in record.sweeps if one.setting == "prompt tokens"]
    everywhere, answer = sweep.points
    (one,) = [point for point in record.sweeps[0].points if point.value == 2.0]
    assert (everywhere.value, everywhere.gain) == ("steered", one.gain)
    assert answer.value == "left alone"
    assert answer.fluency != everywhere.fluency
    assert answer.kl_neutral is None
    assert record.settings["split"] == "test"
    assert [note.split(":")[0] for note in record.notes] == ["threshold", "parts"]


def test_rows_of_an_ablation():
    rows, notes = variations(load_recipe("npti", ["rule.constant=1"]))
    assert [row.value for row in rows if row.setting == "parts"] == ["shift only", "clamp only", "constant only", "all"]
    assert notes == []
    rows, notes = variations(load_recipe("matched"))
    assert {row.setting for row in rows} == {"gamma"}
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--trait", "calm:0.5"], "the strength is what is looked for; name the pole alone, neuroticism-"),
        (["tune", "--trait", "calm", "--minutes", "0"], "--minutes 0.0: give a number above 0"),
        (["tune", "--trait", "calm", "--max-kl", "-1"], "--max-kl -1.0: give a number that is not negative"),
        (["tune", "--trait", "calm", "--out", "t.txt"], "t.txt: a recipe's name ends in .toml"),
        (["tune", "--trait", "calm", "--out", "t.toml", "--recipe", "t.toml"], "t.toml: is named twice"),
        (["tune", "--trait", "calm", "--questions", "9999"], "9999 search questions asked for"),
        (["tune", "--trait", "calm", "--test-questions", "9999"], "9999 test questions asked for"),
        (["tune", "--trait", "calm", "--set", "rule.gama=1"], "unknown key 'rule.gama'"),
        (["ablate", "--trait", "calm", "--split", "test", "--questions", "9999"], "9999 test questions asked for"),
        (["ablate", "--trait", "calm", "--json", "no/a.json"], "does not exist; create it first"),
        (["--trait", "calm", "--gamma", "strong", "--out", "m.gguf"], "'strong' is neither a number nor auto"),
        (["evaluate", "m.gguf", "--pareto", "none.json"], "none.json: cannot be read (No such file or directory)"),
        (["evaluate", "m.gguf", "--sweeps", "t.json"], "t.json: not what npti-export ablate --json of this version"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tiny, tmp_path, cli_environment):
    (tmp_path / "t.json").write_text('{"kind": "tuning"}')
    model = [] if arguments[0] == "evaluate" else ["--model", tiny]
    done = npti(*arguments, *model, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json"]


def test_on_the_command_line(tiny, tmp_path, cli_environment, monkeypatch):
    """Tune, use the recipe, and evaluate the file with the trials; then the main job with --gamma auto."""

    def run(*arguments):
        done = npti(*arguments, environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    few = ["--model", tiny, *(one for text in FEW for one in ("--set", text)), "--threads", "1"]
    wide = ["--questions", "2", "--test-questions", "2", "--answer-tokens", "4", "--max-kl", "50"]
    wide += ["--max-fluency-loss", "50", "--personas", "1"]
    printed = run("tune", "--trait", "calm", *few, *wide, "--trials", "2", "--out", "t.toml", "--json", "t.json")
    assert "wrote t.toml" in printed
    automatic = functools.partial(strength.Auto, WIDE, questions=2, answer_tokens=4)
    monkeypatch.setattr(strength, "Auto", automatic)
    verified = ["--model", tiny, *QUICK[6:], "--set", "verify.answer_tokens=4", "--threads", "1"]
    run("--trait", "calm", "--recipe", "t.toml", *verified, "--gamma", "auto", "--out", "m.gguf", "--report", "r.json")
    (pole,) = json.loads((tmp_path / "r.json").read_text())["traits"]
    assert float(pole.partition(":")[2] or 1) in strength.STRENGTHS
    subject, trials = SubjectJob(tmp_path / "m.gguf"), tmp_path / "t.json"
    tuning, ablation = _supplements(EvaluationJob(subject), trials, None, Silent())
    assert (len(tuning.pareto), ablation) == (2, None)
    for key, value, message in (("pole", "openness-", "is of openness-, and"), ("model", {"name": "x"}, "model .x.")):
        trials.write_text(json.dumps(json.loads(tuning.to_json()) | {key: value}))
        with pytest.raises(EvaluationError, match=message):
            _supplements(EvaluationJob(subject), trials, None, Silent())


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trial_values SET value_type = '~'",
        "UPDATE trials SET state = 'LOST'",
        "UPDATE trial_params SET distribution_json = '{}'",
        "UPDATE study_user_attributes SET value_json = '[]'",
    ],
)
def test_a_study_that_optuna_reads_late(tmp_path, damage):
    """It opens, and what is wrong shows when its trials are asked for."""
    import sqlite3

    (data,) = TARGETS["study"].prepare(tmp_path)
    (tmp_path / "s.sqlite").write_bytes(data)
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        assert database.execute(damage).rowcount > 0
    with pytest.raises(EvaluationError, match=r"s\.sqlite: not a study of trials, damaged|trial \d+ of the study is"):
        TARGETS["study"].read(tmp_path / "s.sqlite")


@pytest.mark.parametrize(
    ("old", "new"), [("at_least", "at_last"), ("gamma = 1.5", "gamma = "), ("}", ""), ("gamma = 1.5", "gamma = -1")]
)
def test_an_edited_recipe_that_cannot_be_read_is_not_written_on(tmp_path, old, new):
    """It would be no recipe with another pole's paragraph added, either; what else it says stays as it is."""
    (data,) = TARGETS["tuned"].prepare(tmp_path)
    path = tmp_path / "tuned.toml"
    path.write_text(data.decode().replace(old, new, 1))
    edited = path.read_bytes()
    assert edited != data
    with pytest.raises(RecipeError, match=r"tuned\.toml.*mend that file, or choose another name"):
        check_recipe_path(path, force=True)
    with pytest.raises(RecipeError, match=r"tuned\.toml"):
        TARGETS["tuned"].read(path)
    assert path.read_bytes() == edited
    path.write_text("# mine\n")
    check_recipe_path(path, force=True)  # of another kind: replaced as a whole
