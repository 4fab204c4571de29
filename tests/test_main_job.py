"""The main job on the real default model, short."""

import json
import os
import subprocess
import sys

import pytest

from npti_export.files import sha256_file

# Enough for the rule to mean something; the README's numbers come from the full recipe.
SHORT = ["--set", "identify.matched_questions=12", "--max-new-tokens", "32", "--set", "verify.prompts=2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    arguments = ["--trait", "introversion", "--out", "model.gguf", "--report", "report.json", *SHORT]
    done = subprocess.run(
        [sys.executable, "-c", "from npti_export.cli import main; main()", *arguments],
        env={**os.environ, "NPTI_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "report.json").read_text()), done.stdout


def test_it_moves_the_model_and_is_faithful(job):
    _, report, _ = job
    fidelity = report["fidelity"]
    assert report["trait"] == "extraversion-"
    assert report["recipe"]["name"] == "smollm2-135m"
    assert fidelity["kl_rule_artifact"] <= fidelity["limit"] == max(5e-3, 2 * fidelity["kl_runtime_floor"])
    # two answers are few: which tokens are nearly tied there is up to the processor's rounding
    assert fidelity["kl_rule_base"] > 3 * fidelity["kl_rule_artifact"]
    neurons = report["neurons"]
    assert (neurons["shift"], neurons["clamp"], neurons["extra_width"]) == (0, 0, 0)  # biases, and nothing else
    assert neurons["constant"] > 10_000
    assert fidelity["top1"] > 0.8  # measured 0.88 on one core, over 0.9 on two


def test_stock_llama_cpp_chats_with_it(job):
    from llama_cpp import Llama

    folder, report, _ = job
    model = Llama(str(folder / "model.gguf"), n_ctx=512, verbose=False)
    messages = [{"role": "user", "content": report["sample"]["question"]}]
    answer = model.create_chat_completion(messages, max_tokens=24, temperature=0.0)["choices"][0]["message"]["content"]
    model.close()
    assert len(answer.split()) > 5
    assert report["sample"]["base"] != report["sample"]["steered"]


def test_strip_restores_the_package_s_file(job, default_model):
    folder, report, _ = job
    from npti_export.export.gguf import strip

    assert strip(folder / "model.gguf", folder / "base.gguf", force=False) == report["artifact"]["base_sha256"]
    assert sha256_file(folder / "base.gguf") == sha256_file(default_model)


def test_the_summary_shows_both_answers(job):
    _, report, output = job
    assert report["sample"]["question"].split()[0] in output
    assert "base" in output
    assert "steered" in output
