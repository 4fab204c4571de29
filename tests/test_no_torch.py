"""A GGUF goes all the way without torch and transformers: they may even be missing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from jobs import QUICK, main_job

from npti_export.export.control_vector import write_control_vector
from npti_export.gguf.reader import read_gguf
from npti_export.models import gguf_source
from npti_export.profile_io import load_profile

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from npti_export.cli import main
main()
"""


def without(*arguments, environment, cwd):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def job(make_tiny, tmp_path_factory):
    import os

    folder = tmp_path_factory.mktemp("no-torch")
    environment = {**os.environ, "NPTI_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = main_job(make_tiny("Q8_0"), "m.gguf", "--report", "r.json", "--set", "verify.kl_limit_quantised=0.05")
    without(*arguments, environment=environment, cwd=folder)
    return folder, environment


def test_the_hook_works(cli_environment, tmp_path):
    program = WITHOUT.replace("from npti_export.cli import main\nmain()", "import torch")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=cli_environment)
    assert "No module named 'torch'" in done.stderr


def test_a_dial(job, make_tiny):
    folder, environment = job
    options = ["--model", make_tiny("Q8_0"), "--recipe", "npti", *QUICK, "--set", "verify.kl_limit_quantised=0.05"]
    without("dial", "--traits", "extraversion+", "--out", "persona", *options, environment=environment, cwd=folder)
    assert "extraversion+" in json.loads((folder / "persona/index.json").read_text())["poles"]


def test_the_main_job(job):
    folder, _ = job
    report = json.loads((folder / "r.json").read_text())
    assert report["fidelity"]["kl_rule_artifact"] < 0.05 * report["fidelity"]["kl_rule_base"]
    assert report["sample"]["base"] != report["sample"]["steered"]
    assert len(report["layers"]["error"]) == 3
    assert read_gguf(folder / "m.gguf").get("npti.trait") == "extraversion+"
    assert report["profiles"]["extraversion"]["dtype"].startswith("ggml")


def test_verify_inspect_and_strip(job, make_tiny):
    folder, environment = job
    verdict = json.loads(without("verify", "m.gguf", "--json", environment=environment, cwd=folder))
    assert verdict["fault"] is None
    assert len(verdict["layers"]["moved"]) == 3
    assert max(verdict["layers"]["moved"]) > 0.05
    without("inspect", "m.gguf", environment=environment, cwd=folder)
    without("strip", "m.gguf", "--out", "b.gguf", environment=environment, cwd=folder)
    assert (folder / "b.gguf").read_bytes() == make_tiny("Q8_0").read_bytes()


def test_bake_vector(job, make_tiny):
    folder, environment = job
    write_control_vector(folder / "v.gguf", np.full((2, 64), 0.2, np.float32), "llama", {})
    arguments = ["bake-vector", "v.gguf", "--out", "vectored.gguf", "--model", make_tiny("Q8_0"), "--json"]
    report = json.loads(without(*arguments, *QUICK[10:], environment=environment, cwd=folder))
    assert report["fidelity"]["kl_vector_artifact"] <= report["limit"] < report["fidelity"]["kl_vector_base"]


def test_identify(job, make_tiny):
    folder, environment = job
    arguments = ["identify", "--trait", "openness", "--out", "p.safetensors", "--model", make_tiny("Q8_0")]
    without(*arguments, "--recipe", "npti", *QUICK[:6], environment=environment, cwd=folder)
    assert load_profile(folder / "p.safetensors", gguf_source(make_tiny("Q8_0")).shape).trait == "openness"
