"""Sweeps and trials in the report of another rule: it is said what they are of."""

import json

from documents import sample_document

from npti_export.evaluate.document import ParetoPoint
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.supplements import (
    AblationRecord,
    TrialRecord,
    TuningRecord,
    differs,
    steering,
    supplemented,
)
from npti_export.recipe import load_recipe
from npti_export.report_page.page import render_page


def ablation(recipe, strength=1.0):
    return AblationRecord(
        model={}, pole="neuroticism-", recipe=recipe.name, base_fluency=-1, sweeps=[], notes=[],
        settings={"strength": strength, "split": "test", "questions": 7}, steering=steering(recipe, "neuroticism-"),
    )  # fmt: skip


def test_sweeps_of_another_rule_are_said_to_be():
    recipe, other = load_recipe("npti"), load_recipe("npti", ["rule.gamma=2.5", "select.threshold=0.2"])
    document = sample_document(recipe=json.loads(recipe.to_json()), traits=["calm"])
    same = supplemented(document, None, ablation(recipe))
    assert same.settings["sweeps"] == {"recipe": "npti", "split": "test", "questions": 7}
    gamma = json.dumps(recipe.rule.gamma)
    note = f"rule.gamma 2.5 instead of {gamma}"
    found = supplemented(document, None, ablation(other)).settings["sweeps"]["note"]
    assert found == f"The sweeps' own rule is not the file's: select.threshold 0.2 instead of 0.1, {note}."
    found = supplemented(document, None, ablation(recipe, 0.5)).settings["sweeps"]["note"]
    assert found == "The sweeps' own rule is not the file's: strength 0.5 instead of 1."
    stronger = sample_document(recipe=document.recipe, traits=["openness+", "neuroticism-:0.5"])
    assert "note" not in supplemented(stronger, None, ablation(recipe, 0.5)).settings["sweeps"]
    bare = document.model_copy(update={"layers": []})
    assert "it holds none" in supplemented(bare, None, ablation(recipe)).settings["sweeps"]["note"]
    older = ablation(recipe).model_copy(update={"steering": None, "recipe": "best"})
    assert differs(older, recipe, ["calm"]) == "The sweeps' own rule is of the recipe best, the file's of npti."


def test_trials_of_which_the_file_is_none_are_said_to_be():
    value = estimate([0.1, 0.2])
    trials = [
        TrialRecord(number=at, label=str(at), select={"threshold": 0.1}, rule={"gamma": gamma}, gain=value,
                    damage=value, fluency=value, within=True)
        for at, gamma in enumerate((1.0, 2.0))
    ]  # fmt: skip

    def record(chosen):
        points = [
            ParetoPoint(label=one.label, gain=0.1, damage=0.1, fluency=-1, on_front=True, chosen=one.number == chosen)
            for one in trials
        ]
        return TuningRecord(
            model={}, pole="neuroticism-", recipe="npti", settings={"questions": 3}, base_fluency=-1, budget={},
            trials=trials, failed=0, pareto=points, confirmation=None,
        )  # fmt: skip

    recipe = load_recipe("npti", ["rule.gamma=2"])
    assert differs(record(1), recipe, ["neuroticism-"]) == ""
    assert differs(record(0), recipe, ["neuroticism-"]) == (
        "The pick of the trials is not the file's: rule.gamma 1.0 instead of 2.0."
    )
    assert differs(record(None), recipe, ["neuroticism-"]) == "No trial was picked, so the file is none of them."
    document = sample_document(recipe=json.loads(recipe.to_json()))
    page = render_page(supplemented(document, record(0), None))
    assert "The pick of the trials is not the file&#39;s: rule.gamma 1.0 instead of 2.0." in page
