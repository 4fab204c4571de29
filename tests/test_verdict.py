"""What the verdict may say, and of which pole: named for what was judged, and never surer than the figures."""

import pytest
from documents import change, near, sample_document

from npti_export.evaluate.document import CapabilityPart, Estimate, Task
from npti_export.report_page import tables
from npti_export.report_page.page import render_page
from npti_export.report_page.verdict import FEWEST, findings, summary


def judged_by(pole, **changes):
    document = sample_document(questions=0, **changes)
    return document.model_copy(update={"settings": document.settings | {"pole": pole}})


def with_gain(document, gain):
    part = document.trait_contrast.model_copy(update={"gain": gain, "null": None})
    return document.model_copy(update={"trait_contrast": part})


def test_sentences_name_the_judged_pole():
    same = judged_by("neuroticism-")
    assert findings(same)[0].question == "Does the personality show?"
    assert "Judged by" not in render_page(same)
    assert summary(with_gain(same, near(0.001))) == "The file does not show neuroticism−."

    opposite = judged_by("neuroticism+")
    assert summary(with_gain(opposite, near(0.001))) == "The file does not show neuroticism+."
    assert summary(opposite).startswith("Neuroticism+ shows, the model stays fluent")
    shows = findings(opposite)[0]
    assert shows.question == "Does neuroticism+ show?"
    aside = "Judged by neuroticism+, and the file steers towards neuroticism−."
    assert shows.detail.startswith(aside)
    assert aside in render_page(opposite)
    assert "The wanted pole is neuroticism+." in tables.contrast(opposite).note
    assert aside in tables.overview([same, opposite]).rows[1][0].note

    assert summary(judged_by("neuroticism-", traits=["calm:0.5"])).startswith("The personality shows")
    assert summary(judged_by("neuroticism-", traits=["calm:0.5"], poles=[])).startswith("The personality shows")
    both = [{"pole": "neuroticism-"}, {"pole": "openness+"}]
    several = judged_by("openness+", traits=["neuroticism-:0.5", "openness+"], poles=both)
    words = "Judged by openness+, one of the poles that the file steers towards: neuroticism-:0.5 and openness+."
    assert findings(several)[0].detail.startswith(words)
    assert summary(with_gain(several, near(-0.09))) == "The file does not show openness+."


def skills(*scores):
    tasks = [Task(name=f"task {at}", source="own", metric="accuracy", score=one) for at, one in enumerate(scores)]
    part = CapabilityPart(kl_neutral=near(0.06, 0.01), tasks=tasks)
    return sample_document(questions=0).model_copy(update={"capability": part})


def test_skills_are_kept_only_where_no_loss_can_hide():
    kept, unsure = change(0.5, 0.5, 0.09), change(0.5, 0.49, 0.12)
    assert unsure.change.high > 0
    assert unsure.change.low < -0.1
    found = findings(skills(kept, kept))[2]
    assert (found.level, found.answer) == ("good", "Yes")
    found = findings(skills(kept, unsure))[2]
    assert (found.level, found.answer) == ("unknown", "Not settled")
    assert "a loss of 10% or more is not ruled out: task 1 (−13% to +12%, 90 questions)" in found.detail
    assert summary(skills(kept, unsure)) == (
        "The personality shows, the model stays fluent, whether it keeps its skills is not settled, and the file does "
        "what the rule says."
    )
    assert findings(skills(change(0.5, 0.3, 0.05), unsure))[2].level == "bad"
    moved = skills(kept, unsure).capability.model_copy(update={"kl_neutral": near(0.3)})
    found = findings(skills().model_copy(update={"capability": moved}))[2]
    assert (found.level, found.answer) == ("unknown", "Not settled")
    assert "over 0.1" in found.detail


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1])
def test_few_questions_settle_nothing(count):
    sure = Estimate(mean=0.2, low=0.19, high=0.21, n=count)
    for gain in (sure, sure.model_copy(update={"mean": -0.2, "low": -0.21, "high": -0.19})):
        document = with_gain(sample_document(questions=0), gain)
        found = findings(document)[0]
        assert (found.level, found.answer) == ("unknown", "Too few questions")
        assert ("1 question:" if count == 1 else f"{count} questions:") in found.detail
        assert summary(document).startswith("Whether the personality shows cannot be told from so few questions, ")
    enough = sure.model_copy(update={"n": FEWEST})
    assert findings(with_gain(sample_document(questions=0), enough))[0].level == "good"

    few = change(0.5, 0.1, 0.0, count)
    found = findings(skills(few))[2]
    assert (found.level, found.answer) == ("unknown", "Too few questions")
    assert findings(skills(few, change(0.5, 0.5, 0.02)))[2].answer == "Not settled"

    document = sample_document(questions=0)
    likelihood = change(-1.17, -1.18, 0.0, count)
    part = document.fluency.model_copy(update={"log_likelihood": likelihood})
    short = document.model_copy(update={"fluency": part})
    assert findings(short)[1].level == "unknown"
    assert summary(short).startswith("The personality shows, the model keeps its skills")


def test_the_fewest_are_those_whose_signs_chance_gives_too_seldom():
    """All of n values on one side of zero: by chance, with either sign, 2 / 2**n."""
    assert 2 / 2**FEWEST < 0.05 <= 2 / 2 ** (FEWEST - 1)
