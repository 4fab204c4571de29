"""Whole evaluations of every kind of artifact, made of one rule for one tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluations import (
    RECIPE,
    TEST,
    Told,
    bake,
    evaluated,
    job,
    plain_contrasts,
    plain_log_likelihood,
    plain_repetition,
    saved_rule,
    small_trait,
    strong_rule,
)
from families import write_tiny
from openai_stub import Stub
from reference import ReferenceLlama
from tolerances import KL_TWO_ENGINES, KV_FLOAT16

from npti_export.bench import load_bench, scoring_personas
from npti_export.errors import AdapterError, BenchError, EvaluationError, ModelError, TraitError
from npti_export.evaluate import others as evaluate_others
from npti_export.evaluate import run as evaluate_run
from npti_export.evaluate.baselines import method_rule, null_rule, scaled
from npti_export.evaluate.capability.neutral import NeutralText, kl_by_passage
from npti_export.evaluate.capability.tasks import Passage, neutral_passages
from npti_export.evaluate.contrast import contrasts, score
from npti_export.evaluate.document import Document, read_document
from npti_export.evaluate.engine import LlamaEngine
from npti_export.evaluate.judge.spec import JudgeSpec
from npti_export.evaluate.run import EvaluationJob
from npti_export.evaluate.subject import SubjectJob
from npti_export.export.control_vector import write_control_vector
from npti_export.export.metadata import steering_metadata
from npti_export.export.peft import write_adapter
from npti_export.identify.collect import message
from npti_export.job import Job
from npti_export.models import gguf_source, resolve_model
from npti_export.pipeline import run
from npti_export.progress import Silent
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec

KEYS = ("trait_contrast", "judge", "inventory", "fluency", "capability", "cross_talk", "baselines")
LIKELIHOOD = 20 * KV_FLOAT16  # of one token: logits of size four, from float16 keys and values


@pytest.fixture(scope="module")
def trait_dir(tmp_path_factory):
    return small_trait(tmp_path_factory.mktemp("traits") / "pirate")


@pytest.fixture(scope="module")
def bench(trait_dir):
    return load_bench("pirate", trait_dir)


@pytest.fixture(scope="module")
def artifacts(tiny, tiny_checkpoint, trait_dir, tmp_path_factory):
    """One rule in every format; the control vector has the constants alone."""
    folder, rule = tmp_path_factory.mktemp("artifacts"), strong_rule()
    found = {"gguf": bake(tiny, folder / "steered.gguf", saved_rule(tiny, rule))}
    directory = resolve_model(str(tiny_checkpoint))
    about = {"base": str(tiny_checkpoint), "model": directory.name, "license": "mit"}
    found["peft"] = folder / "adapter"
    found["peft"].mkdir()
    write_adapter(saved_rule(tiny, rule, **about), found["peft"])
    found["checkpoint"] = folder / "checkpoint"
    given = {"rule_from": found["peft"], "trait_dirs": (trait_dir,)}
    run(Job(traits=(), out=found["checkpoint"], format="checkpoint", **given), Silent())
    found["control-vector"] = folder / "vector.gguf"
    directions = np.random.default_rng(6).normal(0, 0.5, (2, 64)).astype(np.float32)
    metadata = steering_metadata(saved_rule(tiny, rule, base=str(tiny)), tiny)
    write_control_vector(found["control-vector"], directions, "llama", metadata)
    return found


@pytest.fixture(scope="module")
def whole(artifacts, trait_dir, tmp_path_factory):
    """All there is, of the steered GGUF: document, tokens, what was told."""
    patch, told = pytest.MonkeyPatch(), Told()
    asked = job(
        artifacts["gguf"],
        trait_dir,
        baselines=("npti", "dpn-le", "dpn-le-any", "mean-shift", "null", "fine-tuned"),
        prompted=True,
        skips=frozenset(),
        cache=tmp_path_factory.mktemp("cache"),
    )
    real = evaluate_others.identified

    def identified(*given):
        stats, told.profile = real(*given)
        return stats, told.profile

    with patch.context() as within:
        within.setattr(evaluate_others, "identified", identified)
        document, tokens = evaluated(patch, asked, told)
    return document, tokens, told


@pytest.fixture(scope="module")
def llama(tiny):
    with LlamaCppRuntime(tiny, Settings(threads=1), sequences=4, source=gguf_source(tiny)) as runtime:
        yield runtime


def test_everything_is_in_the_document(whole, tmp_path):
    document, tokens, told = whole
    raw = json.loads(document.to_json())
    assert set(KEYS) <= set(raw)
    assert Document.model_validate(raw) == document
    (tmp_path / "d.json").write_text(document.to_json(), encoding="utf-8")
    assert read_document(tmp_path / "d.json") == document
    names = [one.name for one in document.conditions]
    assert names[:4] == ["unsteered", "steered", "prompt-adjective", "prompt-persona"]
    assert set(names[4:6]) == {"steered-prompt-adjective", "steered-prompt-persona"}
    assert names[-2:] == ["unsteered-fine-tuned", "fine-tuned"]
    assert names[6:-2] == ["npti", "dpn-le-any", "mean-shift", "null"]
    assert document.settings["baselines"]["dpn-le"] == {"neurons": 0}
    assert [note for note in told.notes if note.startswith("baseline dpn-le is left out")]
    assert {one.kind for one in document.conditions} == {"base", "steered", "prompt", "baseline", "null"}
    assert set(document.baselines) == set(names[2:])
    assert set(document.inventory.traits) == set(document.cross_talk)
    assert len(document.cross_talk) == 5
    assert [task.name for task in document.capability.tasks] == ["choice", "arithmetic", "recall"]
    assert document.capability.kl_neutral.low > 0
    assert document.judge is None
    assert (document.traits, document.poles[0]["name"]) == (["pirate+"], "piratical")
    assert [(one.shift, one.clamp) for one in document.layers] == [(12, 8)] * 3
    for answer in document.answers:
        assert set(answer.answers) == set(answer.contrast) == set(names)
    assert {len(one) for one in tokens.values()} == {len(TEST)}


def test_figures_are_those_of_the_answers(whole, tiny, llama, bench):
    """Again from the tokens, in float64, and from the texts that the document shows."""
    document, tokens, _ = whole
    questions = [answer.question for answer in document.answers]
    assert sorted(questions) == sorted(text for text, _ in TEST)
    found, reference = {}, ReferenceLlama(tiny)
    for name in ("unsteered", "steered", "npti", "null", "unsteered-fine-tuned", "fine-tuned"):
        figures = next(one for one in document.conditions if one.name == name)
        assert [answer.answers[name] for answer in document.answers] == [llama.decode(one) for one in tokens[name]]
        found[name] = plain_contrasts(tiny, llama.encode, bench, questions, tokens[name], 2)
        shown = [answer.contrast[name] for answer in document.answers]
        np.testing.assert_allclose(shown, found[name], atol=LIKELIHOOD)
        assert figures.contrast.mean == pytest.approx(np.mean(shown), abs=1e-4)
        assert figures.contrast.low <= figures.contrast.mean <= figures.contrast.high
        ends = [len(one) - (len(one) < 6) for one in tokens[name]]  # only one of six tokens does not end itself
        assert figures.length.mean == np.mean(ends)
        repeated = [plain_repetition(answer.answers[name]) for answer in document.answers]
        assert figures.repetition.mean == pytest.approx(np.mean(repeated))
        plain = [
            plain_log_likelihood(reference, llama.encode(message(None, asked, RECIPE)), answer)
            for asked, answer in zip(questions, tokens[name], strict=True)
        ]
        assert figures.fluency.mean == pytest.approx(np.mean(plain), abs=LIKELIHOOD)
        assert figures.perplexity.mean == pytest.approx(np.exp(-figures.fluency.mean))
        if name not in ("unsteered", "unsteered-fine-tuned"):
            before = found["unsteered-fine-tuned" if name == "fine-tuned" else "unsteered"]
            assert figures.gain.mean == pytest.approx((found[name] - before).mean(), abs=LIKELIHOOD)
    assert np.abs(found["steered"] - found["unsteered"]).max() > 5 * LIKELIHOOD
    part = document.trait_contrast
    assert part.gain == document.conditions[1].gain
    assert part.null == next(one.gain for one in document.conditions if one.name == "null")
    for facet in ("speech", "greed"):
        own = [answer.facet == facet for answer in document.answers]
        assert part.by_facet[facet].n == 2
        gain = (found["steered"] - found["unsteered"])[own].mean()
        assert part.by_facet[facet].mean == pytest.approx(gain, abs=LIKELIHOOD)
    perplexity = document.fluency.perplexity
    assert perplexity.change.mean == pytest.approx(perplexity.steered.mean - perplexity.base.mean)


def test_the_steered_file_says_what_the_document_says(whole, artifacts, llama):
    document, tokens, _ = whole
    assert tokens["steered"] != tokens["unsteered"]
    prompts = [llama.encode(message(None, answer.question, RECIPE)) for answer in document.answers]
    with LlamaCppRuntime(artifacts["gguf"], Settings(threads=1), sequences=3) as steered:
        for name, runtime in (("unsteered", llama), ("steered", steered)):
            answers = [
                one.response
                for start in (0, 3)
                for one in runtime.generate(prompts[start : start + 3], max_new_tokens=6, repetition_penalty=1.1)
            ]
            assert answers == tokens[name]


def test_baselines_do_the_artifact_s_damage_and_fine_tuning_its_own(whole, artifacts, llama, tiny, tmp_path):
    document, tokens, told = whole
    settings = document.settings["baselines"]
    with LlamaCppRuntime(artifacts["gguf"], Settings(threads=1)) as steered:
        damage = kl_by_passage(llama, steered, neutral_passages()[:16]).mean()
    labels = {one.name: one.label for one in document.conditions}
    damages = {one.name: one.damage for one in document.conditions}
    assert damages["steered"] == pytest.approx(damage, rel=KL_TWO_ENGINES)
    for name in ("npti", "dpn-le-any", "mean-shift", "null"):
        assert settings[name]["wanted"] == pytest.approx(damage, abs=1e-5)
        assert damages[name] == pytest.approx(settings[name]["damage"], abs=1e-5)
        near = abs(damages[name] / damage - 1) < 0.15
        assert near == ("times the damage" not in labels[name])
        assert settings[name]["neurons"] > 0
    assert "times the damage" not in labels["mean-shift"]  # it has no clamps: some strength is right
    assert settings["null"]["draws"] == len(TEST)
    assert settings["null"]["neurons"] == settings_neurons(strong_rule())
    assert 0.3 < settings["null"]["strength"] < 3
    for name in ("npti", "dpn-le-any", "mean-shift"):
        strength, told_damage = settings[name]["strength"], settings[name]["damage"]
        rule = method_rule(name, told.profile, TraitSpec("pirate", "+"))
        constant = None if rule.constant is None else rule.constant * np.float32(strength)
        again = SteeringRule(rule.shift * np.float32(strength), rule.clamp, constant)
        path = bake(tiny, tmp_path / f"{name}.gguf", saved_rule(tiny, again))
        with LlamaCppRuntime(path, Settings(threads=1)) as steered:
            measured = kl_by_passage(llama, steered, neutral_passages()[:16]).mean()
        assert told_damage == pytest.approx(measured, rel=0.02), name
    assert settings["fine-tuned"]["damage"] > 0
    assert "strength" not in settings["fine-tuned"]
    label = next(one.label for one in document.conditions if one.name == "fine-tuned")
    assert "not at equal damage" in label
    assert tokens["null"] != tokens["steered"]
    assert any("fine-tuned on 6 answers" in note for note in told.notes)


def settings_neurons(rule):
    return int(((rule.shift != 0) | rule.clamp | (rule.constant != 0)).sum())


def test_chance_is_drawn_anew_for_every_few_questions(whole, tiny, artifacts, llama):
    """Each answer is that of its own draw, at the one strength, and the interval is over the draws."""
    document, tokens, _ = whole
    strength = document.settings["baselines"]["null"]["strength"]
    engine = LlamaEngine(gguf_source(tiny), llama, tiny, Settings(threads=1), RECIPE)
    for place, answer in enumerate(document.answers):
        drawn = scaled(null_rule(strong_rule(), place), strength)
        prompt = llama.encode(message(None, answer.question, RECIPE))
        with engine.steered(drawn) as steered:
            (alone,) = steered.generate([prompt], max_new_tokens=6, repetition_penalty=1.1)
        assert alone.response == tokens["null"][place]
    gains = [one.contrast["null"] - one.contrast["unsteered"] for one in document.answers]
    beyond = [one.contrast["steered"] - one.contrast["null"] for one in document.answers]
    for values, found in ((gains, document.trait_contrast.null), (beyond, document.trait_contrast.beyond_null)):
        reach = 3.182446 * np.std(values, ddof=1) / 2  # Student's t with 3 degrees of freedom; 4 draws of one question
        assert found.mean == pytest.approx(np.mean(values), abs=1e-4)
        assert found.high - found.mean == pytest.approx(reach, rel=1e-2)
        assert found.mean - found.low == pytest.approx(reach, rel=1e-2)


def test_an_adapter_for_the_response_only(tiny, tiny_checkpoint, trait_dir, tmp_path, monkeypatch):
    """A text that is read in one pass has no response: there it is steered throughout, or nothing would show."""
    found = {}
    for where in ("all", "response"):
        place = tmp_path / where
        place.mkdir()
        saved = saved_rule(tiny, strong_rule(), base=str(tiny_checkpoint))
        write_adapter(replace(saved, where=where), place)
        found[where] = evaluated(monkeypatch, job(place, trait_dir))
    (everywhere, answers), (document, others) = found["all"], found["response"]
    assert document.capability.kl_neutral == everywhere.capability.kl_neutral
    assert document.settings["capability_where"] == "all"
    assert "where" not in everywhere.settings
    assert answers["unsteered"] == others["unsteered"] != others["steered"]
    assert others["steered"] != answers["steered"]  # the prompt was left alone


def test_an_adapter_on_another_model(artifacts, make_tiny, trait_dir, monkeypatch):
    """Only when the user says so; the document names the model that was really used."""
    other = make_tiny(seed=1)
    asked = job(artifacts["peft"], trait_dir, model=other, questions=2)
    with pytest.raises(AdapterError, match="--any-model"):
        evaluate_run.evaluate(asked, Silent())
    asked = replace(asked, subject=replace(asked.subject, any_model=True))
    document, tokens = evaluated(monkeypatch, asked)
    assert document.model["fingerprint"] == gguf_source(other).fingerprint
    assert document.model["license"] is None
    assert tokens["steered"] != tokens["unsteered"]


def test_what_the_base_predicts_is_never_taken_from_the_steered_model(artifacts, trait_dir, tiny, monkeypatch):
    text = NeutralText(FakeBase(), [Passage(text="a"), Passage(text="b")], kept_bytes=100)
    with pytest.raises(EvaluationError, match="cannot be asked again"):
        text.keep()
    monkeypatch.setattr(evaluate_run, "KEPT_BYTES", 10_000)
    with pytest.raises(EvaluationError, match="cannot be asked again"):
        evaluate_run.evaluate(job(artifacts["peft"], trait_dir), Silent())


class FakeBase:
    """Predicts 20 tokens evenly, at two places a text: 80 bytes."""

    def encode_text(self, _text, *, begin=True):
        return (1, 2)

    def logits(self, tokens):
        return np.zeros((len(tokens), 20), np.float32)


@pytest.mark.parametrize("kind", ["peft", "checkpoint", "control-vector"])
def test_every_other_kind_of_artifact(artifacts, trait_dir, kind, monkeypatch, tiny):
    asked = job(artifacts[kind], trait_dir, baselines=("null",))
    document, tokens = evaluated(monkeypatch, asked)
    assert document.artifact["format"] == kind
    assert document.artifact["bytes"] > 1000
    assert tokens["steered"] != tokens["unsteered"]
    assert document.inventory is None
    assert document.capability.tasks == []
    assert document.capability.kl_neutral.low > 0.01
    assert document.settings["baselines"]["null"]["damage"] > 0
    assert document.settings["engine"] == ("llama.cpp" if kind == "control-vector" else "transformers")
    assert document.model["fingerprint"] == gguf_source(tiny).fingerprint


def test_the_formats_of_one_rule_do_the_same_damage(whole, artifacts, trait_dir, monkeypatch):
    damage = [whole[0].capability.kl_neutral.mean]
    for kind in ("peft", "checkpoint"):
        document, _ = evaluated(monkeypatch, job(artifacts[kind], trait_dir, questions=2))
        damage.append(document.capability.kl_neutral.mean)
    assert damage == pytest.approx(damage[:1] * 3, rel=KL_TWO_ENGINES)


def test_judges_cost_no_other_figure(artifacts, trait_dir, monkeypatch):
    told, calls = Told(), []
    with Stub([None] + ["401"] * 99) as stub:  # it answers when it is tried, and refuses hours later
        judges = (JudgeSpec("stub", stub.url, timeout=5, patience=5),)
        document, _ = evaluated(monkeypatch, job(artifacts["gguf"], trait_dir, judges=judges), told)
    assert document.judge is None
    assert document.trait_contrast.gain.n == 4
    (note,) = [one for one in told.notes if "judge" in one]
    assert note.startswith("no judge's scores: ")
    assert "answers 401" in note
    with Stub() as stub:
        judges = (JudgeSpec("stub", stub.url), JudgeSpec("gone", "http://127.0.0.1:1/v1", patience=0))
        monkeypatch.setattr("npti_export.evaluate.run.opened", lambda *_: calls.append(1))
        with pytest.raises(EvaluationError, match=r"--judge gone: .*cannot be reached"):
            evaluated(monkeypatch, job(artifacts["gguf"], trait_dir, judges=judges))
    assert calls == []  # said before anything is opened


def test_how_many_questions_there_are(bench):
    own = load_bench("openness")
    for given, shipped, few in ((None, evaluate_run.QUESTIONS, 4), (0, len(own.test()), 4), (3, 3, 3)):
        asked = EvaluationJob(SubjectJob(Path("model.gguf")), questions=given)
        assert evaluate_run._questions(asked, own) == own.test(shipped)
        assert len(evaluate_run._questions(asked, bench)) == few
    assert len(own.test()) > evaluate_run.QUESTIONS


def comparable(document):
    raw = json.loads(document.to_json())
    del raw["seconds"]
    for one in [*raw["conditions"], *raw["baselines"].values()]:
        del one["seconds"]
    return raw


def test_the_same_seed_gives_the_same_document(artifacts, trait_dir, monkeypatch):
    found = [
        evaluated(monkeypatch, job(artifacts["gguf"], trait_dir, baselines=("null",), seed=seed)) for seed in (0, 0, 1)
    ]
    first, again, other = (comparable(document) for document, _ in found)
    tokens = [told for _, told in found]
    assert first == again
    assert tokens[0] == tokens[1]
    for name in ("unsteered", "steered"):
        assert tokens[0][name] == tokens[2][name]
    assert tokens[0]["null"] != tokens[2]["null"]  # other random neurons
    assert first["settings"]["baselines"]["null"]["damage"] != other["settings"]["baselines"]["null"]["damage"]
    gains = [one["trait_contrast"]["gain"]["mean"] for one in (first, other)]
    assert gains[0] == pytest.approx(gains[1], abs=KV_FLOAT16)  # scored together with other answers


def test_a_model_that_bears_no_rule_is_said_to_have_no_baselines(make_tiny, trait_dir, monkeypatch):
    """A mixture of experts in a GGUF."""
    told = Told()
    asked = job(make_tiny(seed=1, experts=True), model=make_tiny(experts=True), trait=f"{trait_dir}+", questions=2,
                baselines=("npti", "mean-shift"))  # fmt: skip
    document, _ = evaluated(monkeypatch, asked, told)
    assert [one.name for one in document.conditions] == ["unsteered", "steered"]
    assert "baselines" not in document.settings
    assert any("no rule can be baked into it, so there are no baselines" in note for note in told.notes)


def test_what_does_nothing_shows_nothing(tiny, trait_dir, tmp_path, monkeypatch):
    """Honesty: a rule that is all but 0, even where its rounding changes an answer, has no gain."""
    rule = strong_rule(scale=1e-4, clamps=0)
    inert = bake(tiny, tmp_path / "inert.gguf", saved_rule(tiny, rule))
    document, _ = evaluated(monkeypatch, job(inert, trait_dir, prompted=True, baselines=("null",)))
    part = document.trait_contrast
    assert part.gain.low <= 0 <= part.gain.high
    assert abs(part.gain.mean) < LIKELIHOOD
    assert document.capability.kl_neutral.mean < 1e-5
    assert all(one.low <= 0 <= one.high for one in document.cross_talk.values())
    assert document.fluency.log_likelihood.change.low <= 0 <= document.fluency.log_likelihood.change.high


def test_cross_talk_is_towards_the_plus_pole_of_every_trait(tiny, llama, tmp_path, monkeypatch):
    """Also of the steered one, whichever way it was steered."""
    saved = saved_rule(tiny, strong_rule(), trait="extraversion-")
    document, tokens = evaluated(monkeypatch, job(bake(tiny, tmp_path / "m.gguf", saved), questions=2))
    assert document.traits == ["extraversion-"]
    assert document.cross_talk["extraversion"].mean == pytest.approx(-document.trait_contrast.gain.mean)
    questions, bench = [answer.question for answer in document.answers], load_bench("openness")
    before, after = (
        plain_contrasts(tiny, llama.encode, bench, questions, tokens[name], 1) for name in ("unsteered", "steered")
    )
    assert document.cross_talk["openness"].mean == pytest.approx((after - before).mean(), abs=LIKELIHOOD)
    assert abs(document.cross_talk["openness"].mean) > LIKELIHOOD


def test_a_gguf_of_somebody_else(tiny, make_tiny, trait_dir, tmp_path, tokenizer_fields, monkeypatch):
    """It holds no rule: base and pole are given, random neurons have nothing to match, methods still compare."""
    theirs, told = make_tiny(seed=1), Told()
    asked = job(theirs, model=tiny, trait=f"{trait_dir}-", baselines=("mean-shift", "null"))
    document, tokens = evaluated(monkeypatch, asked, told)
    assert tokens["steered"] != tokens["unsteered"]
    assert (document.traits, document.fidelity, document.layers) == (["pirate-"], {}, [])
    assert [one.name for one in document.conditions] == ["unsteered", "steered", "mean-shift"]
    assert document.trait_contrast.null is None
    assert document.recipe["name"] == "npti"
    assert document.model["fingerprint"] == gguf_source(tiny).fingerprint
    assert any("holds no rule" in note for note in told.notes)
    for given in ({"model": tiny}, {"trait": f"{trait_dir}-"}, {}):
        with pytest.raises(EvaluationError, match=r"holds no steering rule.*--trait.*--base"):
            evaluate_run.evaluate(job(theirs, **given), Silent())
    tokens = [*tokenizer_fields["tokens"][:-2], *tokenizer_fields["tokens"][:-3:-1]]
    other = write_tiny(tmp_path / "other.gguf", {**tokenizer_fields, "tokens": tokens}, "F32")
    with pytest.raises(EvaluationError, match="has other tokens than"):
        evaluate_run.evaluate(job(other, model=tiny, trait="extraversion+"), Silent())


def test_a_model_that_cannot_be_fine_tuned_is_said_so_first(make_tiny):
    mixture, told = make_tiny(experts=True), Told()
    asked = job(mixture, model=mixture, trait="extraversion+", questions=2, baselines=("fine-tuned",))
    with pytest.raises(EvaluationError, match=r"'fine-tuned': .* is a mixture of experts.*leave it out"):
        evaluate_run.evaluate(asked, told)
    assert "answer" not in told.stages


def test_a_gguf_is_compared_with_its_base_where_it_runs(artifacts, trait_dir, monkeypatch):
    """--runtime transformers scores, and bears the baselines; the file itself runs in llama.cpp, and so its base."""
    asked = job(artifacts["gguf"], trait_dir, engine="transformers", dtype="float32", baselines=("null",))
    document, tokens = evaluated(monkeypatch, asked)
    theirs, expected = evaluated(monkeypatch, job(artifacts["gguf"], trait_dir))
    assert tokens["unsteered"] == expected["unsteered"]
    assert tokens["steered"] == expected["steered"]
    assert document.settings["scorer"] == "float32"
    assert document.trait_contrast.gain.mean == pytest.approx(theirs.trait_contrast.gain.mean, abs=LIKELIHOOD)
    assert document.capability.kl_neutral.mean == pytest.approx(theirs.capability.kl_neutral.mean)


def test_refusals_come_before_any_work(artifacts, tiny, trait_dir, tmp_path, tiny_checkpoint, monkeypatch):
    def never(*_more, **_given):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("npti_export.loader.Models.fast", never)
    monkeypatch.setattr("npti_export.loader.Models.llama", never)
    gguf = artifacts["gguf"]
    for error, match, given in (
        (EvaluationError, "holds no steering rule", {"artifact": tiny}),
        (AdapterError, "there is no such file", {"artifact": tmp_path / "none.gguf"}),
        (EvaluationError, "baseline 'magic': not known", {"baselines": ("null", "magic")}),
        (EvaluationError, "steers towards pirate", {"trait": "openness+"}),
        (TraitError, "pirates", {"trait": "pirates+"}),
        (BenchError, "5 test questions asked for, the bench has 4", {"questions": 5}),
        (EvaluationError, "two tokens of an answer", {"answer_tokens": 1}),
        (EvaluationError, "one pair of personas", {"personas": 0}),
        (EvaluationError, "leave --runtime out", {"artifact": artifacts["peft"], "engine": "llama.cpp"}),
        (ModelError, "is a transformers model", {"model": tiny_checkpoint}),
        (TraitError, "--trait-dir", {"trait_dir": None}),
    ):
        asked = {"artifact": gguf, "trait_dir": trait_dir, **given}
        with pytest.raises(error, match=match):
            evaluate_run.evaluate(job(asked.pop("artifact"), asked.pop("trait_dir"), **asked), Silent())


def test_a_trait_of_one_s_own_is_named_as_the_artifact_names_it(artifacts, trait_dir, monkeypatch):
    own, _ = evaluated(monkeypatch, job(artifacts["gguf"], trait_dir, questions=2))
    other, _ = evaluated(monkeypatch, job(artifacts["gguf"], trait_dir, questions=2, trait="pirate-"))
    assert other.trait_contrast.gain.mean == pytest.approx(-own.trait_contrast.gain.mean)


def test_two_runtimes_score_alike_and_right(tiny, tiny_runtime, llama, bench):
    questions = bench.test()
    answers = [(40, 41, 42), (700, 2), tuple(range(300, 312)), (9,)]
    want = plain_contrasts(tiny, llama.encode, bench, [one.text for one in questions], answers, 3)
    for runtime in (llama, tiny_runtime):
        (found,) = score(runtime, bench, questions, [answers], RECIPE, personas=3)
        np.testing.assert_allclose(found.contrast, want, atol=LIKELIHOOD)
        np.testing.assert_array_equal(found.towards("-"), -found.contrast)
    assert np.abs(want).max() > 5 * LIKELIHOOD
    (one,) = contrasts(llama, bench, questions, [answers], RECIPE, personas=1)
    assert np.abs(one - want).max() > LIKELIHOOD  # other personas take part


def test_personas_that_score_are_of_the_pole_and_one_of_each_facet(trait_dir, tmp_path):
    from npti_export.traits import FACETS

    for trait in FACETS:
        shipped = load_bench(trait)
        for sign in "+-":
            known = {persona.text: persona.facet for persona in shipped.pole(sign)}
            chosen = scoring_personas(shipped, sign, 0)
            assert sorted(known[one.text] for one in chosen) == sorted(set(known.values()))
            assert scoring_personas(shipped, sign, 0) == chosen != scoring_personas(shipped, sign, 1)
    from own_trait import persona, write_trait

    untagged = [persona(sign, f"You are number {at} of side {sign}.") for sign in "+-" for at in range(13)]
    tags = write_trait(tmp_path / "untagged", personas=untagged)
    chosen = scoring_personas(load_bench("pirate", tags), "-", 0)
    assert len(set(chosen)) == 6
    assert all(one.text.endswith("of side -.") for one in chosen)
