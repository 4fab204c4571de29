"""The three formats, made from traits and from each other, verified, described and pushed."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from documents import sample_document
from hub_stub import HubStub
from jobs import npti, npti_process
from peft import PeftModel
from plain_rule import logits, plain_rule
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from npti_export.endings.checkpoint import CheckpointEnding
from npti_export.errors import (
    AdapterError,
    ArchitectureError,
    EvaluationError,
    FidelityError,
    ModelError,
    OutputError,
    RecipeError,
)
from npti_export.evaluate.card import is_other_file, section
from npti_export.gguf.reader import read_gguf
from npti_export.inspection import inspect_file
from npti_export.job import Job
from npti_export.loader import RuntimeSettings
from npti_export.models import resolve_model
from npti_export.pipeline import run, verify_artifact
from npti_export.profile import NeuronProfile
from npti_export.profile_io import save_profile
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.rule_io import ADAPTER_WEIGHTS, load_rule
from npti_export.traits import parse_trait
from npti_export.tuning import strength

IDS = torch.arange(5, 29).reshape(2, 12)
SETTINGS = (
    "select.at_least=20",
    "select.at_most=20",
    "select.threshold=0.9",
    "verify.prompts=2",
    "verify.answer_tokens=8",
)
TRAIT = (parse_trait("extraversion+"),)


@pytest.fixture(scope="module")
def profile(tiny, tmp_path_factory):
    source = resolve_model(str(tiny))
    rng = np.random.default_rng(5)
    shape = (source.shape.layers, source.shape.width)
    arrays = [rng.uniform(0.2, 0.8, shape).astype(np.float32) for _ in range(4)]
    path = tmp_path_factory.mktemp("profile") / "e.safetensors"
    save_profile(NeuronProfile("extraversion", *arrays, source.fingerprint), path, force=False)
    return path


@pytest.fixture(scope="module")
def rule(profile):
    from npti_export.profile import read_profile

    return build_rule(read_profile(profile), TRAIT[0], load_recipe("npti", SETTINGS))


def job(model, out, profile, format_name, **more):
    return Job(
        traits=TRAIT,
        out=out,
        format=format_name,
        model=str(model),
        recipe="npti",
        overrides=SETTINGS,
        profiles=(profile,),
        **more,
    )


@pytest.fixture(scope="module")
def made(tiny, tiny_checkpoint, profile, tmp_path_factory):
    """Each format once, from a GGUF or from a directory."""
    folder = tmp_path_factory.mktemp("made")
    reports = {
        name: run(job(model, folder / name, profile, format_name), Silent())
        for name, model, format_name in (
            ("gguf", tiny, "gguf"),
            ("peft", tiny_checkpoint, "peft"),
            ("checkpoint", tiny_checkpoint, "checkpoint"),
            ("checkpoint of a gguf", tiny, "checkpoint"),
        )
    }
    return folder, reports


KINDS = ["gguf", "peft", "checkpoint", "checkpoint of a gguf"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_the_rule_and_says_so(made, rule, kind):
    folder, reports = made
    report, fidelity = reports[kind], reports[kind]["fidelity"]
    assert (report["neurons"]["shift"], report["neurons"]["clamp"]) == (20, 20)
    assert 0 <= fidelity["kl_rule_artifact"] <= 1e-4 < fidelity["kl_rule_base"]
    assert report["artifact"]["format"] == kind.split()[0]
    assert report["sample"]["base"] != report["sample"]["steered"]
    saved = load_rule(folder / kind)
    assert np.array_equal(saved.rule.shift, rule.shift)
    assert np.array_equal(saved.rule.clamp, rule.clamp)
    assert saved.about.trait == "extraversion+"
    assert saved.about.fidelity["kl_rule_artifact"] == fidelity["kl_rule_artifact"]
    assert json.loads(saved.about.recipe) == report["recipe"]


def test_what_is_delivered_runs_in_stock_transformers(made, tiny_checkpoint, rule):
    folder, _ = made
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    base = logits(model, IDS)
    with plain_rule(model, rule):
        want = logits(model, IDS)
    for kind in ("checkpoint", "checkpoint of a gguf"):
        got = logits(AutoModelForCausalLM.from_pretrained(folder / kind), IDS)
        assert (got - want).abs().max() < 0.1 * (base - want).abs().max()
    assert torch.equal(logits(PeftModel.from_pretrained(model, folder / "peft"), IDS), want)


@pytest.mark.parametrize("kind", ["peft", "checkpoint"])
def test_directories_carry_a_card(made, kind):
    folder, reports = made
    text = (folder / kind / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert {"npti", "extraversion"} <= set(front["tags"])
    assert "KeyError: 'NPTI'" in text or kind != "peft"
    assert f"{reports[kind]['fidelity']['limit']:.2g}".rstrip("0") in text or "1e-04" in text or "0.0001" in text


@pytest.mark.parametrize("target", ["gguf", "peft", "checkpoint"])
@pytest.mark.parametrize("kind", ["gguf", "peft", "checkpoint"])
def test_every_format_from_every_other(made, tiny, rule, kind, target, tmp_path):
    folder, _ = made
    model = str(tiny) if (kind, target) in (("peft", "gguf"), ("checkpoint", "gguf")) else None
    again = Job(traits=(), out=tmp_path / "out", format=target, rule_from=folder / kind, model=model)
    report = run(again, Silent())
    assert report["fidelity"]["kl_rule_artifact"] <= 1e-4 < report["fidelity"]["kl_rule_base"]
    assert np.array_equal(load_rule(tmp_path / "out").rule.shift, rule.shift)
    if kind == target == "peft":
        assert (tmp_path / "out" / ADAPTER_WEIGHTS).read_bytes() == (folder / "peft" / ADAPTER_WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_measures_the_same_again(made, kind):
    folder, reports = made
    asked = Job(traits=(), out=None, format=kind.split()[0], rule_from=folder / kind)
    verdict = verify_artifact(asked, Silent())
    assert verdict["fault"] is None
    assert verdict["fidelity"]["kl_rule_artifact"] == pytest.approx(
        reports[kind]["fidelity"]["kl_rule_artifact"], abs=1e-7
    )
    assert verdict["fidelity"]["kl_rule_base"] == pytest.approx(reports[kind]["fidelity"]["kl_rule_base"], rel=1e-3)


def test_verify_notices_a_changed_artifact(made, tiny_checkpoint, tmp_path):
    """The unsteered model with the rule's file beside it, and a checkpoint with one bias missing."""
    folder, _ = made
    inert = tmp_path / "inert"
    shutil.copytree(tiny_checkpoint, inert)
    shutil.copy(folder / "checkpoint" / "npti.json", inert)
    verdict = verify_artifact(Job(traits=(), out=None, format="checkpoint", rule_from=inert), Silent())
    assert "does not do what the rule says" in verdict["fault"]
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    deaf = tmp_path / "deaf"
    shutil.copytree(folder / "checkpoint", deaf)
    (deaf / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    verdict = verify_artifact(Job(traits=(), out=None, format="checkpoint", rule_from=deaf), Silent())
    assert "does not do what the rule says" in verdict["fault"]


def test_an_adapter_for_the_response_only(tiny_checkpoint, profile, tmp_path):
    report = run(job(tiny_checkpoint, tmp_path / "r", profile, "peft", where="response"), Silent())
    assert report["fidelity"]["kl_rule_artifact"] < 1e-9 < report["fidelity"]["kl_rule_base"]
    assert json.loads((tmp_path / "r" / "adapter_config.json").read_text())["where"] == "response"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    base = logits(model, IDS)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "r"), IDS), base)


def test_an_unfaithful_checkpoint_is_not_delivered(tiny_checkpoint, profile, tmp_path, monkeypatch):
    compiled = CheckpointEnding.compile

    def sabotage(self, saved, progress):
        return compiled(self, replace(saved, rule=replace(saved.rule, shift=saved.rule.shift * 3)), progress)

    monkeypatch.setattr(CheckpointEnding, "compile", sabotage)
    for name in ("out.rejected", "out.rejected-2"):  # what is there is never replaced
        with pytest.raises(FidelityError, match=rf"it is kept as .*{name}$"):
            run(job(tiny_checkpoint, tmp_path / "out", profile, "checkpoint"), Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rejected", "out.rejected-2"]


def test_refused_at_once(made, tiny, tiny_checkpoint, default_model, profile, tmp_path):
    folder, _ = made
    qwen3 = tmp_path / "qwen3"
    shutil.copytree(tiny_checkpoint, qwen3)
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    with pytest.raises(ArchitectureError, match=r"of qwen3 cannot be written.*--format peft"):
        run(job(qwen3, tmp_path / "x", profile, "checkpoint"), Silent())
    (qwen3 / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ArchitectureError, match="SiLU"):
        run(job(qwen3, tmp_path / "x", profile, "checkpoint"), Silent())
    with pytest.raises(OutputError, match="steer every position"):
        run(job(tiny, tmp_path / "x", profile, "gguf", where="response"), Silent())
    with pytest.raises(ModelError, match="is steered already"):
        run(job(folder / "gguf", tmp_path / "x", profile, "peft"), Silent())
    with pytest.raises(AdapterError, match="holds no rule"):
        run(Job(traits=(), out=tmp_path / "x", format="peft", rule_from=profile), Silent())
    with pytest.raises(AdapterError, match=r"holds no steering rule \(npti.rule\)"):
        run(Job(traits=(), out=tmp_path / "x", format="peft", rule_from=tiny), Silent())
    with pytest.raises(AdapterError, match="is for 3 layers of 96 neurons"):
        run(Job(traits=(), out=tmp_path / "x", rule_from=folder / "peft", model=str(default_model)), Silent())
    assert not (tmp_path / "x").exists()


def test_a_model_of_the_same_name_in_the_working_directory(tiny, make_tiny, profile, tmp_path, monkeypatch):
    """transformers looks for a bare GGUF name in the working directory first."""
    other = make_tiny(seed=1)
    monkeypatch.chdir(tmp_path)
    shutil.copy(other, tmp_path / tiny.name)
    report = run(job(tiny, tmp_path / "out", profile, "gguf"), Silent())
    assert report["fidelity"]["kl_runtime_floor"] < 1e-4


def test_directories_that_are_not_ours(made, tiny_checkpoint, profile, tmp_path):
    folder, _ = made
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all I have")
    for force in (False, True):
        with pytest.raises(OutputError, match="exists already" if not force else "more than an output of ours"):
            run(job(tiny_checkpoint, precious, profile, "peft", force=force), Silent())
    assert (precious / "thesis.txt").read_text() == "all I have"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        run(job(tiny_checkpoint, tmp_path / "file", profile, "peft", force=True), Silent())
    mine = tmp_path / "mine"
    shutil.copytree(folder / "peft", mine)
    (mine / "merges.txt").write_text("x")  # of an earlier output of another kind
    with pytest.raises(OutputError, match="pass --force"):
        run(job(tiny_checkpoint, mine, profile, "peft"), Silent())
    run(job(tiny_checkpoint, mine, profile, "peft", force=True), Silent())
    assert not (mine / "merges.txt").exists()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="more than an output of ours"):
        run(job(tiny_checkpoint, mine, profile, "peft", force=True), Silent())
    (mine / "notes.txt").unlink()
    assert oct(mine.stat().st_mode & 0o777) == oct(0o777 & ~umask())
    with pytest.raises(OutputError, match="is an input of this very job"):
        run(Job(traits=(), out=mine, format="peft", rule_from=mine, force=True), Silent())


def test_outputs_that_hold_inputs_or_each_other(made, tiny_checkpoint, profile, tmp_path):
    folder, _ = made
    place = tmp_path / "place"
    shutil.copytree(folder / "peft", place)
    shutil.copy(profile, place / "p.safetensors")
    with pytest.raises(OutputError, match="or holds one"):
        run(job(tiny_checkpoint, place, place / "p.safetensors", "peft", force=True), Silent())
    with pytest.raises(OutputError, match="or holds another"):
        run(job(tiny_checkpoint, place, profile, "peft", force=True, report=place / "r.json"), Silent())
    assert (place / "p.safetensors").is_file()


def test_an_earlier_artifact_keeps_what_it_is(made, tiny, tiny_checkpoint, profile, tmp_path):
    """Positions, base id and identity travel with the rule; a place on this machine stays out of a GGUF."""
    folder, _ = made
    run(job(tiny_checkpoint, tmp_path / "r", profile, "peft", where="response"), Silent())
    run(Job(traits=(), out=tmp_path / "again", format="peft", rule_from=tmp_path / "r", base_id="org/tiny"), Silent())
    again = load_rule(tmp_path / "again")
    assert (again.where, again.about.base) == ("response", "org/tiny")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    with pytest.raises(OutputError, match="steers the response only"):
        run(Job(traits=(), out=tmp_path / "x", format="checkpoint", rule_from=tmp_path / "r"), Silent())
    run(
        Job(
            traits=(), out=tmp_path / "g", rule_from=tmp_path / "r", where="all", model=str(tiny_checkpoint), base=tiny
        ),
        Silent(),
    )
    assert load_rule(tmp_path / "g").about.base is None
    assert str(tiny_checkpoint).encode() not in (tmp_path / "g").read_bytes()
    with pytest.raises(RecipeError, match="the rule is there already"):
        run(
            Job(traits=(), out=tmp_path / "x", format="peft", rule_from=folder / "peft", overrides=("rule.gamma=0.3",)),
            Silent(),
        )


def test_any_model(made, tiny_checkpoint, tmp_path):
    """A rule on another model of the same shape is refused, and with the flag becomes that model's."""
    folder, _ = made
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    asked = Job(traits=(), out=tmp_path / "x", format="peft", rule_from=folder / "peft", model=str(other))
    with pytest.raises(AdapterError, match="--any-model"):
        run(asked, Silent())
    run(replace(asked, any_model=True), Silent())
    about = load_rule(tmp_path / "x").about
    assert about.fingerprint == resolve_model(str(other)).identity
    assert (about.model, about.base) == ("other", str(other))
    model = AutoModelForCausalLM.from_pretrained(other)
    base = logits(model, IDS)
    assert not torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "x"), IDS), base)
    verdict = verify_artifact(
        Job(traits=(), out=None, format="peft", rule_from=folder / "peft", model=str(other), any_model=True), Silent()
    )
    assert verdict["fault"] is None


def test_files_beside_the_models_own(tiny_checkpoint, profile, rule, tmp_path):
    """The same weights for another program, and an adapter, lie in the directory; a card says the licence."""
    crowded = tmp_path / "crowded"
    shutil.copytree(tiny_checkpoint, crowded)
    save_file({"layers.0.feed_forward.w1": torch.zeros(2, 2)}, crowded / "consolidated.safetensors")
    save_file({"base_model.x": torch.zeros(2)}, crowded / "adapter_model.safetensors")
    (crowded / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    report = run(job(crowded, tmp_path / "out", profile, "checkpoint"), Silent())
    assert report["model"]["license"] == "mit"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    (crowded / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 96, '
        '"hidden_size": 64, "rms_norm_eps": "x"}'
    )
    with pytest.raises(ModelError, match="transformers does not accept it"):
        run(job(crowded, tmp_path / "y", profile, "checkpoint"), Silent())


def umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_inspect(made):
    folder, _ = made
    adapter = inspect_file(folder / "peft")
    assert (adapter["kind"], adapter["trait"], adapter["shifted"], adapter["clamped"]) == (
        "PEFT adapter",
        "extraversion+",
        20,
        20,
    )
    assert inspect_file(folder / "checkpoint")["kind"] == "steered checkpoint"
    header = inspect_file(folder / "gguf")
    assert header["npti.rule"].endswith("bytes")
    assert read_gguf(folder / "gguf").get("npti.rule") is not None


def test_pushed_to_the_hub(tiny, tiny_checkpoint, profile, tmp_path, cli_environment):
    """The whole command against a local stub of the Hub: an adapter directory and a GGUF with its card."""
    common = ["--trait", "extraversion+", "--recipe", "npti", "--profile", profile]
    common += [part for setting in SETTINGS for part in ("--set", setting)]
    with HubStub() as hub:
        environment = {**cli_environment, **hub.environment()}
        environment.pop("HF_HUB_OFFLINE")
        for out, model, more in (
            ("calm", tiny_checkpoint, ["--format", "peft"]),
            ("calm.gguf", tiny, []),
        ):
            document = evaluation_of(model, "peft" if more else "gguf")
            (tmp_path / "r.json").write_text(document.to_json(), encoding="utf-8")
            more += ["--evaluation", "r.json"]
            done = npti_process(
                *common, "--model", model, "--out", out, *more, "--push-to-hub", f"alice/{out}",
                environment=environment, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "pushed" in done.stdout
        stored = {name: hub.files(f"alice/{name}") for name in ("calm", "calm.gguf")}
        done = npti_process(
            *common, "--model", tiny, "--out", "b.gguf", "--push-to-hub", "alice/b", "--evaluation", "r.json",
            "--gamma", "0.9", environment=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2
        assert "'recipe.rule.gamma' is not that of this job (1.4 there, 0.9 here)" in done.stderr
        done = npti_process(
            *common, "--model", tiny, "--out", "b.gguf", "--push-to-hub", "someone-else/b",
            environment=environment, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
        assert not (tmp_path / "b.gguf").exists()
    for path in (tmp_path / "calm").iterdir():
        assert stored["calm"][path.name] == path.read_bytes()
    assert stored["calm.gguf"]["calm.gguf"] == (tmp_path / "calm.gguf").read_bytes()
    assert b"llama" in stored["calm.gguf"]["README.md"]
    assert section(document, other_file=True).encode() in stored["calm.gguf"]["README.md"]  # its SHA-256 is made up
    for files in stored.values():
        assert b"Does the personality show" in files["README.md"]
        assert b"model-index" in files["README.md"]


def test_the_same_job_writes_the_same_bytes(tiny, profile, tmp_path, monkeypatch):
    """So that an evaluation of a file that is made again is one of that file; and what it is not is said early."""
    asked = replace(job(tiny, tmp_path / "a.gguf", profile, "gguf"), runtime=RuntimeSettings(threads=1))
    again = replace(asked, out=tmp_path / "b.gguf")
    first, second = (run(one, Silent())["artifact"]["sha256"] for one in (asked, again))
    assert first == second
    document, path = evaluation_of(tiny, "gguf"), tmp_path / "r.json"
    assert not is_other_file(document.model_copy(update={"artifact": {"sha256": first}}), second)
    stronger = replace(again, overrides=(*SETTINGS, "rule.gamma=1.1"), out=tmp_path / "c.gguf")
    other = run(stronger, Silent())["artifact"]["sha256"]
    assert is_other_file(document.model_copy(update={"artifact": {"sha256": first}}), other)
    # --gamma auto settles the strength, and nothing else: what differs beside it is known before the search
    path.write_text(document.to_json(), encoding="utf-8")
    monkeypatch.setattr(strength, "opened", lambda *_: pytest.fail("a search begins"))
    for field, changed in (
        ("recipe.identify.seed", replace(asked, overrides=(*SETTINGS, "identify.seed=4"))),
        ("recipe.compile.program", replace(asked, overrides=(*SETTINGS, "compile.program=bias"))),
        ("traits", replace(asked, traits=(parse_trait("extraversion-"),))),
    ):
        published = replace(changed, out=tmp_path / "d.gguf", push_to="alice/d", evaluation=path)
        with pytest.raises(EvaluationError, match=rf"--evaluation .*r\.json: '{field}' is not that of this job \("):
            strength.with_strengths(published, Silent())


def evaluation_of(model, kind):
    """As `evaluate` would have written it for the job above."""
    return sample_document(
        "extraversion+",
        artifact={"path": "calm", "format": kind, "bytes": 9, "sha256": "0" * 64},
        model={"name": "tiny", "fingerprint": resolve_model(str(model)).fingerprint, "id": None, "license": None},
        recipe=json.loads(load_recipe("npti", SETTINGS).to_json()),
    )


def test_the_verify_command(made, cli_environment):
    folder, _ = made
    done = npti("verify", "checkpoint", "--json", environment=cli_environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fault"] is None
    done = npti("verify", "checkpoint", "--set", "verify.kl_limit_float=1e-12", environment=cli_environment, cwd=folder)
    assert done.returncode == 3
    assert "not faithful" in done.stdout
