"""The command line as a user meets it: one clear line for bad input, exit codes, and nothing left behind."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from jobs import QUICK, main_job, npti, npti_process

from npti_export.files import sha256_file
from npti_export.gguf.reader import read_gguf
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime


def test_help_is_quick_because_it_imports_nothing_heavy():
    program = (
        "import sys; from npti_export.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'numpy', 'rich', 'pydantic', 'gguf', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--trait" in done.stdout
    assert "identify" in done.stdout


def test_no_arguments_shows_help(cli_environment, tmp_path):
    done = npti(environment=cli_environment, cwd=tmp_path)
    assert "--trait POLE" in done.stdout


def test_traits_lists_poles_and_everyday_names(cli_environment, tmp_path):
    done = npti("traits", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0
    assert "neuroticism-" in done.stdout
    assert "calm" in done.stdout
    assert "self-discipline" in done.stdout


BAD = [
    (["--trait", "agreablness+", "--out", "o.gguf"], "did you mean 'agreeableness+'"),
    (["--trait", "calm"], "no --out"),
    (["--out", "o.gguf"], "no --trait"),
    (["--trait", "calm", "--out", "o.gguf", "--gamma", "0"], "'rule.gamma'"),
    (["--trait", "calm", "--out", "o.gguf", "--gamma", "nan"], "'rule.gamma'"),
    (["--trait", "calm", "--out", "o.gguf", "--gamma", "-1"], "'rule.gamma'"),
    (["--trait", "calm", "--out", "o.gguf", "--gamma", "x"], "--gamma"),
    (["--trait", "calm", "--out", "o.gguf", "--set", "rule.gama=1"], "unknown key 'rule.gama'"),
    (["--trait", "calm", "--out", "o.gguf", "--recipe", "nope"], "not shipped; there are best, dpn-le"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "none.gguf"], "none.gguf"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "cut.gguf"], "truncated"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "text.gguf"], "not a GGUF file"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "empty"], "no config.json"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "nobody/nothing-here"], "nor to be had from the hub"),
    (["--trait", "calm", "--out", "o.gguf", "--bench", "bench"], "questions.jsonl: is empty"),
    (["--trait", "calm", "--recipe", "npti", "--out", "o.gguf", "--questions", "9999"], "9999 search questions asked"),
    (["--trait", "calm", "--out", "o.gguf", "--questions", "9999"], "smollm2-135m steers no neuron; leave it out"),
    (["--trait", "calm", "--out", "there.gguf"], "there.gguf: exists already; pass --force"),
    (["--trait", "calm", "--out", "no/o.gguf"], "does not exist"),
    (["--trait", "calm", "--out", "o.gguf", "--profile", "none.safetensors"], "no such profile"),
    (["--trait", "calm", "--trait", "calm", "--out", "o.gguf"], "given twice"),
    (["--trait", "calm", "--out", "o.gguf", "--device", "gpu"], "--device"),
    (["--trait", "calm", "--out", "o.gguf", "--report", "there.gguf"], "there.gguf: exists already"),
    (["--frobnicate"], "--frobnicate"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "~nobody-here/x"], "not a usable path"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "x" * 300], "xxx"),
    (["--trait", "calm", "--out", "o" * 300 + ".gguf"], "longer than 255"),
    (["--trait", "calm", "--out", "o.gguf", "--model", "foo/bar--baz"], "foo/bar--baz"),
    (["--trait", "calm", "--out", "o.gguf", "--report", "o.gguf"], "named for two outputs"),
    (["--trait", "calm", "--out", "tiny.gguf", "--model", "tiny.gguf", "--force"], "is an input of this very job"),
    (["--trait", "calm", "--out", "o.gguf", "--set", "verify.prompts=9999"], "9999 test questions asked for"),
    (["--trait", "calm", "--out", "o.gguf", "--save-profile", "p.txt"], "change the suffix"),
    (["identify", "--trait", "calm", "--out", "foo.json"], "like the published files"),
    (["identify", "--trait", "calm", "--out", "Openness_dict.json"], "after openness"),
    (["--gamma", "2", "traits"], "after its name"),
    (["--gamma", "2"], "no --trait"),
    (
        [
            "--trait",
            "calm",
            "--out",
            "o.gguf",
            "--runtime",
            "transformers",
            "--device",
            "cuda:77",
            "--model",
            "tiny.gguf",
        ],
        "--device cuda:77",
    ),
    (["identify", "--trait", "calm", "--out", "p.txt"], "p.txt"),
    (["inspect", "none.gguf"], "none.gguf"),
    (["inspect", "text.gguf"], "neither a GGUF nor a profile"),
    (["strip", "tiny.gguf", "--out", "o.gguf"], "nothing to strip"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(arguments, says, cli_environment, tmp_path, tiny):
    data = tiny.read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data)
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.gguf").write_text("hello, I am no model")
    (tmp_path / "there.gguf").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bench").mkdir()
    for name in ("personas", "questions"):
        (tmp_path / "bench" / f"{name}.jsonl").write_text("")
    line = '{"pole": "%s", "facet": "anxiety", "text": "You are."}\n'
    (tmp_path / "bench" / "personas.jsonl").write_text(line % "+" + line % "-")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("npti-export: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "precious"


@pytest.mark.parametrize(("arguments", "says"), [BAD[0], BAD[10]])
def test_a_process_of_its_own_says_the_same(arguments, says, cli_environment, tmp_path, tiny):
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:9000])
    here = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    done = npti_process(*arguments, environment=cli_environment, cwd=tmp_path)
    assert says in done.stderr
    assert (done.returncode, done.stdout, done.stderr) == (here.returncode, here.stdout, here.stderr)


def test_the_report_says_everything(finished, tiny):
    folder, done = finished
    report = json.loads((folder / "report.json").read_text())
    artifact, fidelity = report["artifact"], report["fidelity"]
    assert report["trait"] == "extraversion+"
    assert report["gamma"] == 1.4
    assert (report["neurons"]["shift"], report["neurons"]["clamp"]) == (20, 20)
    assert 0 <= fidelity["kl_rule_artifact"] <= 1e-4 < fidelity["kl_rule_base"]
    assert 0 <= fidelity["kl_runtime_floor"] <= 1e-4
    assert fidelity["top1"] > 0.95
    assert 0 < fidelity["max_logit_diff"] < 1
    assert {"identify", "rule", "write", "verify", "total"} <= set(report["seconds"])
    assert report["seconds"]["total"] >= sum(report["seconds"][key] for key in ("identify", "write", "verify"))
    assert report["peak_rss_mb"] > 100
    assert artifact["sha256"] == sha256_file(folder / "model.gguf")
    assert artifact["base_sha256"] == sha256_file(tiny)
    assert artifact["bytes"] == (folder / "model.gguf").stat().st_size
    assert report["recipe"]["select"]["at_least"] == 20
    assert report["sample"]["base"] != report["sample"]["steered"]
    assert "NaN" not in (folder / "report.json").read_text()
    assert "faithful" in done.stdout
    assert "wrote" in done.stdout


def test_the_file_says_where_it_came_from(finished, tiny):
    folder, _ = finished
    header = read_gguf(folder / "model.gguf")
    report = json.loads((folder / "report.json").read_text())
    assert header.get("npti.trait") == "extraversion+"
    assert header.get("npti.base.sha256") == sha256_file(tiny)
    assert json.loads(header.get("npti.recipe")) == report["recipe"]
    assert header.get("npti.fidelity.kl_rule_artifact") == report["fidelity"]["kl_rule_artifact"]


def test_inspect_and_strip(finished, tiny, cli_environment):
    folder, _ = finished
    shown = npti("inspect", "model.gguf", "--json", environment=cli_environment, cwd=folder)
    assert json.loads(shown.stdout)["npti.trait"] == "extraversion+"
    profile = npti("inspect", "p.safetensors", environment=cli_environment, cwd=folder)
    assert "extraversion" in profile.stdout
    assert "6048" not in profile.stdout
    stripped = npti("strip", "model.gguf", "--out", "base.gguf", environment=cli_environment, cwd=folder)
    assert stripped.returncode == 0, stripped.stderr
    assert (folder / "base.gguf").read_bytes() == tiny.read_bytes()


def test_a_saved_profile_gives_the_same_file(finished, tiny, cli_environment, tmp_path):
    folder, _ = finished
    done = npti(
        *main_job(tiny, "again.gguf", "--profile", folder / "p.safetensors"), environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.gguf").read_bytes() == (folder / "model.gguf").read_bytes()


def test_a_published_profile_works_and_another_models_is_refused(finished, tiny, make_tiny, cli_environment, tmp_path):
    folder, _ = finished
    quick = ["--set", "select.at_least=20", "--model", tiny, "--recipe", "npti", *QUICK[:8]]
    done = npti(
        "identify",
        "--trait",
        "extraversion",
        "--out",
        "Extraversion_dict.json",
        *quick,
        environment=cli_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "Extraversion_reversed_dict.json").is_file()
    done = npti(
        *main_job(tiny, "m.gguf", "--profile", "Extraversion_dict.json"), environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    other = make_tiny(seed=1)
    done = npti(
        *main_job(other, "n.gguf", "--profile", folder / "p.safetensors"), environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "made from another model" in done.stderr
    done = npti(
        *main_job(other, "n.gguf", "--profile", folder / "p.safetensors", "--any-model"),
        environment=cli_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_two_traits_compose(finished, tiny, cli_environment, tmp_path):
    done = npti(
        *main_job(tiny, "m.gguf", "--trait", "calm:0.5", "--report", "r.json"),
        environment=cli_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["trait"] == "extraversion+ neuroticism-:0.5"
    assert report["traits"] == ["extraversion+", "neuroticism-:0.5"]
    assert 20 <= report["neurons"]["shift"] <= 40
    assert report["fidelity"]["kl_rule_artifact"] <= 1e-4 < report["fidelity"]["kl_rule_base"]


def test_an_unfaithful_file_is_kept_aside(finished, tiny, cli_environment, tmp_path):
    folder, _ = finished
    impossible = ["--set", "verify.kl_limit_float=1e-30", "--set", "verify.kl_limit_floor_ratio=1"]
    impossible += ["--set", "compile.clamp_units=3"]
    done = npti(
        *main_job(tiny, "m.gguf", "--profile", folder / "p.safetensors", *impossible),
        environment=cli_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    assert "does not do what the rule says" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"m.gguf.rejected"}


def test_a_transformers_directory_bakes_into_a_gguf_of_the_same_model(tiny, tiny_checkpoint, cli_environment, tmp_path):
    plain = main_job(tiny_checkpoint, "m.gguf")
    done = npti(*plain, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "--base FILE.gguf" in done.stderr
    done = npti(*plain, "--base", tiny, "--report", "r.json", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fidelity = json.loads((tmp_path / "r.json").read_text())["fidelity"]
    assert fidelity["kl_rule_artifact"] <= 1e-4 < fidelity["kl_rule_base"]
    assert np.isfinite(fidelity["kl_runtime_floor"])


def test_a_base_of_another_model_is_refused(tiny, make_tiny, cli_environment, tmp_path):
    done = npti(*main_job(tiny, "m.gguf", "--base", make_tiny(seed=1)), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not the same model" in done.stderr


def test_progress_is_told_of_every_question_of_its_own_stage(tiny, tiny_runtime):
    """The model is loaded before the bar of the questions begins."""
    from npti_export.bench import load_bench
    from npti_export.identify.profiles import Place, identified
    from npti_export.models import gguf_source
    from npti_export.recipe import load_recipe

    class Told:
        def __init__(self):
            self.stages = []

        def start(self, stage, total):
            self.stages.append([stage, 0, total])

        def advance(self, steps, tokens=0):
            self.stages[-1][1] += steps

        def note(self, text):
            pass

    told = Told()

    def load():
        told.start("load", 1)
        told.advance(1)
        return tiny_runtime

    recipe = load_recipe("npti", ["identify.questions=6", "identify.max_new_tokens=4", "identify.batch_size=4"])
    bench = load_bench("openness")
    identified(Place(load, gguf_source(tiny), "float32", "cpu", None), bench, recipe, told)
    assert told.stages == [["load", 1, 1], ["identify openness", 6, 6]]


def test_a_question_too_long_for_the_sample_costs_only_the_sample(finished, tiny, cli_environment, tmp_path):
    folder, _ = finished
    persona = '{"pole": "%s", "facet": "trust", "text": "You are."}\n'
    question = '{"split": "%s", "facet": "trust", "topic": "work", "text": "%s"}\n'
    bench = tmp_path / "bench"
    bench.mkdir()
    facet = "friendliness"
    (bench / "personas.jsonl").write_text((persona % "+" + persona % "-").replace("trust", facet))
    # room for the question and the few tokens of an answer that are verified, not for those of a sample
    with LlamaCppRuntime(tiny) as runtime:
        text = next(
            text for count in itertools.count() if len(runtime.encode(chat(None, text := "why " * count))) > 200
        )
    questions = question % ("search", "Why?") + question % ("test", text)
    (bench / "questions.jsonl").write_text(questions.replace("trust", facet))
    arguments = main_job(tiny, "m.gguf", "--profile", folder / "p.safetensors", "--bench", bench)
    done = npti(
        *[*arguments, "--context", "256", "--set", "verify.prompts=1", "--report", "r.json"],
        environment=cli_environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "no sample answers" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["sample"] is None
    assert (tmp_path / "m.gguf").is_file()
