"""Programs from the command line: what they cost in the file, what they keep, and what is refused."""

import json

import pytest
from gguf import GGUFReader
from jobs import QUICK, main_job, npti
from tolerances import KL_EXACT_FITTED

from npti_export.files import sha256_file
from npti_export.gguf.reader import mlp_widths, read_gguf

CALIBRATION = ["--set", "compile.calibration_tokens=200"]
THREE = ["--set", "compile.clamp_units=3"]


def job(tiny, tmp_path, environment, program, *more):
    done = npti(
        *main_job(tiny, "m.gguf", "--program", program, "--report", "r.json", "--force", *CALIBRATION, *more),
        environment=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "r.json").read_text())


def stripped(tmp_path, environment):
    done = npti("strip", "m.gguf", "--out", "back.gguf", "--force", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return sha256_file(tmp_path / "back.gguf")


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_biases_alone_change_no_weight(kind, make_tiny, tmp_path, cli_environment):
    tiny = make_tiny(kind)
    report = job(tiny, tmp_path, cli_environment, "bias")
    fidelity = report["fidelity"]
    assert fidelity["kl_rule_artifact"] < fidelity["limit"] < fidelity["kl_rule_base_file"]
    assert report["neurons"]["extra_width"] == 0
    assert mlp_widths(read_gguf(tmp_path / "m.gguf")) == mlp_widths(read_gguf(tiny))
    before = {one.name: one.data.tobytes() for one in GGUFReader(tiny).tensors}
    after = {one.name: one.data.tobytes() for one in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: after[name] for name in before} == before
    assert {name.split(".", 2)[2] for name in set(after) - set(before)} == {"ffn_gate.bias", "ffn_down.bias"}
    assert stripped(tmp_path, cli_environment) == sha256_file(tiny)
    assert report["program"]["kind"] == "bias"
    assert report["program"]["steps"][0]["name"] == "rule written out"
    done = npti("verify", "m.gguf", "--model", tiny, "--json", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fidelity"]["kl_rule_artifact"] == pytest.approx(
        fidelity["kl_rule_artifact"], rel=0.05
    )


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_budget_lies_between_biases_and_the_whole_rule(kind, make_tiny, tmp_path, cli_environment):
    tiny = make_tiny(kind)
    units = THREE if kind == "F32" else []
    programs = ("exact", "budget:40%", "bias")
    found = {program: job(tiny, tmp_path, cli_environment, program, *units) for program in programs}
    assert stripped(tmp_path, cli_environment) == sha256_file(tiny)
    widths = [report["neurons"]["extra_width"] for report in found.values()]
    assert widths == sorted(widths, reverse=True)
    assert widths[1:] == [32, 0]
    errors = [report["program"]["steps"][-1]["error"] for report in found.values()]
    assert errors == sorted(errors)
    kls = [report["fidelity"]["kl_rule_artifact"] for report in found.values()]
    assert kls[0] < kls[2]
    assert kls[1] < kls[2]
    if kind == "F32":
        assert kls[0] < KL_EXACT_FITTED


def test_fidelity_is_bought_at_the_least_width(tiny, tmp_path, cli_environment):
    report = job(tiny, tmp_path, cli_environment, "kl:0.02")
    assert report["neurons"]["extra_width"] <= 64
    assert report["fidelity"]["kl_rule_artifact"] < 0.04  # other questions than those that judged
    done = npti(
        *main_job(tiny, "n.gguf", "--program", "kl:1e-12", *CALIBRATION), environment=cli_environment, cwd=tmp_path
    )
    assert (done.returncode, (tmp_path / "n.gguf").exists()) == (2, False)
    assert "written out in full" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--program", "budget:5%"], "neurons come in blocks of 32 in this file"),
        (["--program", "best"], "exact, bias, lowrank:R"),
        (["--program", "bias", "--format", "peft"], "--program says what extra neurons may cost"),
    ],
)
def test_impossible_programs_are_refused(tiny, tmp_path, cli_environment, options, message):
    done = npti(*main_job(tiny, "m.gguf", *options, *CALIBRATION), environment=cli_environment, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "m.gguf").exists()) == (2, False)
    assert message in " ".join(done.stderr.split())
    assert "identify" not in done.stderr  # before any work
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["compile"], ["--format", "checkpoint", "--out", "c"]], ids=lambda one: one[0])
def test_a_budget_too_small_for_a_block_is_refused_before_any_work(tiny, tmp_path, cli_environment, command):
    job = ["--trait", "extraversion+", "--model", tiny, "--recipe", "npti", "--program", "budget:5%"]
    done = npti(*command, *job, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "which is 33% of its 96; take budget:33.4% or bias" in " ".join(done.stderr.split())
    assert "identify" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_compile_explains_and_measures(tiny, tmp_path, cli_environment):
    rule = ["--trait", "extraversion+", "--model", tiny, "--recipe", "npti", *QUICK, *CALIBRATION, *THREE]
    programs = ["--program", "exact", "--program", "bias", "--program", "lowrank:8"]
    done = npti("compile", *rule, *programs, "--measure", "--json", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["width"], found["block"]) == (96, 32)
    assert [one["program"] for one in found["programs"]] == ["exact", "bias", "lowrank:8"]
    kls = {one["program"]: one["kl"] for one in found["programs"]}
    assert kls["exact"] < kls["lowrank:8"] < kls["bias"]
    assert kls["exact"] < KL_EXACT_FITTED
    done = npti("compile", *rule, "--explain", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("exact", "rule written out", "clamps fitted to their gates", "predicted error"):
        assert text in done.stdout
    assert not list(tmp_path.glob("*.gguf"))


def test_the_same_job_gives_the_same_bytes(tiny, tmp_path, cli_environment):
    digests = set()
    for _ in range(2):
        job(tiny, tmp_path, cli_environment, "budget:40%")
        digests.add(sha256_file(tmp_path / "m.gguf"))
    assert len(digests) == 1
