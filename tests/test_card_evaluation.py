"""An evaluation in a model card: its figures, its place among what else is there, and whose it is."""

import json
import re

import pytest
from documents import hostile_document, sample_document
from test_card import report, split

from npti_export.errors import EvaluationError
from npti_export.evaluate.card import BEGIN, END, check_same_rule, is_other_file, results, section, update_card
from npti_export.export.card import model_card
from npti_export.recipe import PoleSection, load_recipe
from npti_export.traits import TraitSpec


def rows(text):
    """Cells of the table's rows; an escaped bar is no border."""
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_condition_with_its_figures():
    document = sample_document(settings={"baselines": {"npti": {"strength": 0.5, "damage": 0.0312}}})
    head, *body = rows(section(document))
    assert head == ["", "gain (95%)", "fluency", ""]
    assert len(body) == len(document.conditions) > 5
    for cells, one in zip(body, document.conditions, strict=True):
        gain = one.gain
        want = "" if gain is None else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        assert cells[1:3] == [want, f"{one.fluency.mean:.2f}"]
        assert ("not clear of zero" in cells[3]) == (gain is not None and gain.low * gain.high <= 0)
        assert ("KL 0.031" in cells[3]) == (one.name == "npti")
    assert any("not clear of zero" in cells[3] for cells in body)
    text = section(document)
    for figure in ("84% (61% to 112%) of the better prompt's", "0.061 nats", "90 held-out"):
        assert figure in text
    assert text.count("before,") == len(document.capability.tasks) + len(document.judge.judges)
    for name in document.cross_talk:
        assert f"{name} " in text


def test_foreign_text_is_no_markup():
    text = section(hostile_document())
    for cells in rows(text):
        assert len(cells) == 4
    bare = re.sub(r"\\.", "", text.removeprefix(BEGIN).removesuffix(END))
    assert not re.search(r"[<>`\[\]]", bare)
    assert text.count(END) == text.count(BEGIN) == 1


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_only_the_section_changes(tmp_path, ending):
    path = tmp_path / "README.md"
    first, second = sample_document(), sample_document("openness+")
    update_card(path, first)
    assert path.read_text(encoding="utf-8") == section(first) + "\n"
    before, after = (
        f"---{ending}license: mit{ending}---{ending}# Ünser model{ending}",
        f"{ending}## More{ending}{ending}",
    )
    path.write_bytes((before + section(first) + after).encode())
    update_card(path, second)
    assert path.read_bytes().decode() == before + section(second) + after
    assert section(first) != section(second)
    path.write_bytes(before.encode())
    update_card(path, second)
    text = path.read_bytes().decode()
    assert text.startswith(before + ending + BEGIN)
    assert text.endswith(section(second) + "\n")
    update_card(path, second)
    assert path.read_bytes().decode() == text


QUOTED = [
    f"Cards hold `{BEGIN}` and {END}.\n",
    f"{BEGIN} is where it begins\n",
    f"```html\n{BEGIN}\n```\n",
    f"~~~~\n{END}\n~~~\n{BEGIN}\n~~~~\n",
    f"````text\n```\n{BEGIN}\n```\n````\n",
    f"    {BEGIN}\n",
    f"> {END}\n",
    f"\u2028{BEGIN}\n",
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_marks_are_none(tmp_path, quoted, ending):
    path = tmp_path / "README.md"
    quoted = quoted.replace("\n", ending)
    first, second = sample_document(), sample_document("openness+")
    path.write_bytes(quoted.encode())
    update_card(path, first)
    assert path.read_bytes().decode() == quoted + ending + section(first) + "\n"
    path.write_bytes((quoted + section(first) + ending + quoted).encode())
    update_card(path, second)
    assert path.read_bytes().decode() == quoted + section(second) + ending + quoted


def test_a_block_that_is_never_closed_hides_no_section(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("```\nnever closed\n")
    for document in (sample_document(), sample_document("openness+")):
        update_card(path, document)
        assert path.read_text(encoding="utf-8") == f"```\nnever closed\n\n{section(document)}\n"


def test_answers_that_look_like_marks(tmp_path):
    said = {"question": BEGIN, "base": f"```\n{END}\n```` {BEGIN}", "steered": f"~~~\n{BEGIN}\n{END}"}
    text = model_card(report(sample=said), section(sample_document()))
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    update_card(path, sample_document("openness+"))
    assert section(sample_document("openness+")) in path.read_text(encoding="utf-8")


def test_judges_with_their_intervals():
    document = sample_document()
    (judge, _), text = document.judge.judges, section(document)
    before, after = (judge.trait[name] for name in ("unsteered", "steered"))
    assert (
        f"{before.mean:.2f} ({before.low:.2f} to {before.high:.2f}) before, {after.mean:.2f} ({after.low:.2f} to "
        f"{after.high:.2f}) after."
    ) in text


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", "\udcff"])
def test_damaged_cards_are_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvaluationError, match=r"--card .*README\.md: (the marks .* delete both|cannot be read)"):
        update_card(path, sample_document())
    assert path.read_bytes() == text.encode(errors="surrogateescape")


def test_it_must_be_of_the_same_rule(tmp_path):
    recipe = load_recipe("matched", ["rule.gamma=1.2"])
    known = {"model": {"fingerprint": "ab" * 32}, "traits": ["calm:0.5", "openness+"]}
    document = sample_document(recipe=json.loads(recipe.to_json()), **known)
    traits = (TraitSpec("openness", "+"), TraitSpec("neuroticism", "-", 0.5))
    path = tmp_path / "r.json"
    check_same_rule(path, document, traits, "ab" * 32, recipe, "gguf", benches={})
    other = load_recipe("matched", ["rule.gamma=1.2", "verify.prompts=2", "identify.batch_size=3"])
    check_same_rule(path, document, traits, "ab" * 32, other, "gguf", benches={})
    changed = {
        "prompt.system": "You. {persona}",
        "identify.seed": 3,
        "identify.max_new_tokens": 9,
        "select.threshold": 0.3,
        "rule.gamma": 1.3,
        "compile.program": "bias",
    }
    for field, given in {
        "model.fingerprint": (traits, "cd" * 32, recipe),
        "traits": (traits[:1], "ab" * 32, recipe),
        **{
            f"recipe.{key}": (traits, "ab" * 32, load_recipe("matched", ["rule.gamma=1.2", f"{key}={value}"]))
            for key, value in changed.items()
        },
    }.items():
        with pytest.raises(
            EvaluationError, match=rf"--evaluation .*r\.json: '{field}' is not that of this job \(.* here"
        ):
            check_same_rule(path, document, *given, "gguf", benches={})
    # of an earlier artifact's rule, the recipe does not say how this one is compiled
    biased = load_recipe("matched", ["rule.gamma=1.2", "compile.program=bias"])
    check_same_rule(path, document, traits, "ab" * 32, biased, "gguf", benches={}, compiles=False)
    special = recipe.model_copy(update={"poles": {"openness+": PoleSection(rule={"matched": 0.5})}})
    with pytest.raises(EvaluationError, match=r"'recipe\.poles\.openness\+'"):
        check_same_rule(path, document, traits, "ab" * 32, special, "gguf", benches={})
    asked = document.model_copy(update={"settings": {"pole": "openness+", "bench": "a" * 64}})
    check_same_rule(path, asked, traits, "ab" * 32, recipe, "gguf", benches={"openness": "a" * 64})
    with pytest.raises(EvaluationError, match=r"'settings\.bench'"):
        check_same_rule(path, asked, traits, "ab" * 32, recipe, "gguf", benches={"openness": "b" * 64})
    stronger = (traits[0], TraitSpec("neuroticism", "-", 0.6))
    with pytest.raises(EvaluationError, match="'traits'"):
        check_same_rule(path, document, stronger, "ab" * 32, recipe, "gguf", benches={})
    check_same_rule(path, document, stronger, "ab" * 32, recipe, "gguf", benches={}, strengths=False)
    with pytest.raises(EvaluationError, match="'traits'"):
        check_same_rule(path, document, stronger[:1], "ab" * 32, recipe, "gguf", benches={}, strengths=False)
    with pytest.raises(EvaluationError, match="'recipe'"):
        check_same_rule(path, sample_document(recipe=None, **known), traits, "ab" * 32, recipe, "gguf", benches={})
    with pytest.raises(EvaluationError, match=r"'artifact\.format'"):
        check_same_rule(path, document, traits, "ab" * 32, recipe, "control-vector", benches={})
    with pytest.raises(EvaluationError, match="holds no rule"):
        bare = document.model_copy(update={"layers": []})
        check_same_rule(path, bare, traits, "ab" * 32, recipe, "gguf", benches={})


def test_it_says_where_the_bytes_are_others():
    document = sample_document()  # of a file, 9f…
    assert not is_other_file(document, "9f" * 32)
    assert is_other_file(document, "9e" * 32)
    assert not is_other_file(document, {"a.safetensors": "9e" * 32})  # not to be compared
    parts = document.model_copy(update={"artifact": {"sha256": {"a": "1", "b": "2"}}})
    assert not is_other_file(parts, {"b": "2", "c": "9"})
    assert is_other_file(parts, {"a": "1", "b": "3"})
    assert not is_other_file(document.model_copy(update={"artifact": {}}), "9e" * 32)
    assert "another file" not in section(document)
    assert "another file of the same rule" in section(document, other_file=True)


def test_the_whole_card():
    document = sample_document()
    data, body = split(model_card(report(), section(document), results(document)))
    plain, text = split(model_card(report()))
    (model,) = data.pop("model-index")
    assert data == plain
    values = {metric["type"]: metric["value"] for one in model["results"] for metric in one["metrics"]}
    assert len(model["results"]) == 2
    assert model["name"] == "calm.gguf"
    assert values == {
        "likelihood-contrast-gain": round(document.trait_contrast.gain.mean, 4),
        "kl-neutral": round(document.capability.kl_neutral.mean, 4),
    }
    assert section(document) in body
    assert body.index("Is it faithful") < body.index("Does the personality show") < body.index("Intended use")
    assert "The next section says how well" in body
    assert "It does not say how well" in text
    assert BEGIN not in text


@pytest.mark.parametrize(
    ("neurons", "recipe", "says", "not_said"),
    [
        ({"shift": 9, "clamp": 3}, {}, ["shifted up (9", "NPTI (Neuron"], ["by matching", "means of what"]),
        ({"constant": 8}, {"rule": {"matched": 1.0}}, ["moves the residual stream", "by matching"], ["NPTI (Neuron"]),
        (
            {"constant": 8},
            {"poles": {"openness+": {"rule": {"matched": 0.5}}}},
            ["moves the residual stream", "by matching"],
            ["NPTI (Neuron"],
        ),
        (  # another pole's words do not count, and those of the exported ones do
            {"constant": 8},
            {
                "rule": {"matched": 1.0},
                "poles": {one: {"rule": {"matched": 0, "constant": 1.0}} for one in ("openness+", "neuroticism-")},
            },
            ["down projection gets a constant", "means of what"],
            ["by matching"],
        ),
        ({"constant": 8}, {"rule": {"constant": 1.0}}, ["down projection gets a constant", "DPN-LE"], ["NPTI (Neuron"]),
        (
            {"shift": 9, "constant": 8},
            {"rule": {"matched": 1.0}},
            ["shifted up (9", "A constant is added", "NPTI (Neuron", "by matching"],
            [],
        ),
    ],
)
def test_how_it_was_made(neurons, recipe, says, not_said):
    counts = {"shift": 0, "clamp": 0, "width": 1536, "extra_width": 0, "extra_width_mean": 0.0}
    _, body = split(model_card(report(neurons=counts | neurons, recipe={"name": "mine", "rule": {}} | recipe)))
    for words in says:
        assert words in body
    for words in not_said:
        assert words not in body


def test_it_says_whose_figures_they_are():
    text = section(sample_document(settings={"pole": "openness-", "baselines": "none"}))
    assert "for openness\\-, of calm\\.gguf, gguf, which is steered towards neuroticism\\-, on 90" in text
    same = section(sample_document(settings={"pole": "neuroticism-"}, traits=["neuroticism-:0.5"]))
    assert "for neuroticism\\-, of calm\\.gguf, gguf, on 90" in same
    assert "for neuroticism\\-, of" in section(sample_document(settings={}))
    level = {"npti": {"damage": "much"}, "null": 3}
    assert "KL much" not in section(sample_document(settings={"baselines": level}))
