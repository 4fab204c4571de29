"""The llama.cpp runtime from the command line: its options, its refusals, and that it gives the same file again."""

import json

import numpy as np
import pytest
from jobs import QUICK, main_job, npti
from tolerances import GATE_LLAMACPP, QUANTILE_BIN

from npti_export.files import sha256_file
from npti_export.models import gguf_source
from npti_export.profile_io import load_profile


def profile(tiny, environment, cwd, name, *options):
    arguments = ["identify", "--trait", "extraversion", "--model", tiny, "--recipe", "npti", *QUICK[:6]]
    done = npti(*arguments, "--out", name, *options, environment=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return load_profile(cwd / name, gguf_source(tiny).shape)


def test_two_runs_from_nothing_give_the_same_bytes(finished, tiny, cli_environment, tmp_path):
    folder, _ = finished
    done = npti(*main_job(tiny, "m.gguf"), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sha256_file(tmp_path / "m.gguf") == sha256_file(folder / "model.gguf")


def test_options_do_what_they_say_and_change_nothing_else(make_tiny, cli_environment, tmp_path):
    """Another partition of the work, the same answers, and by transformers nearly the same.

    A random model's answers have near ties, which each arithmetic and processor decides in its own way: one that has
    none.
    """
    model = make_tiny(decided=True)
    plain = profile(model, cli_environment, tmp_path, "a.safetensors")
    given = ["--threads", "1", "--gpu-layers", "0", "--prompt-batch", "64", "--context", "1024"]
    other = profile(model, cli_environment, tmp_path, "b.safetensors", *given, "--no-cache")
    by_torch = ["--runtime", "transformers", "--dtype", "float32"]
    torch = profile(model, cli_environment, tmp_path, "c.safetensors", *by_torch)
    assert plain.origin["dtype"] == "ggml"
    assert torch.origin["dtype"] == "float32"
    for one in (other, torch):
        assert one.origin["tokens"] == plain.origin["tokens"]
        for ours, theirs in ((plain.p_plus, one.p_plus), (plain.p_minus, one.p_minus)):
            assert np.abs(theirs - ours).max() < 0.1  # a sign or two of some thirty
            assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.999
        # one token that falls on the other side of a bin's edge moves a quantile by a bin
        np.testing.assert_allclose(one.a95_plus, plain.a95_plus, rtol=2 * QUANTILE_BIN, atol=GATE_LLAMACPP)
    assert np.corrcoef(plain.p_minus.ravel(), plain.p_plus.ravel())[0, 1] < 0.998  # the poles differ by more than that


def test_a_given_file_runs_in_transformers_too(tiny, finished, cli_environment, tmp_path):
    """The same profile, so that both verify one rule."""
    folder, _ = finished
    more = ["--runtime", "transformers", "--dtype", "float32", "--report", "r.json"]
    arguments = main_job(tiny, "m.gguf", "--profile", folder / "p.safetensors", *more)
    done = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "r.json").read_text())
    ours = json.loads((folder / "report.json").read_text())
    assert theirs["layers"] is None
    assert ours["layers"] is not None
    assert theirs["neurons"] == ours["neurons"]
    assert theirs["fidelity"]["kl_rule_base"] == pytest.approx(ours["fidelity"]["kl_rule_base"], rel=0.15)


def test_a_base_of_another_type_than_the_model(tiny, make_tiny, cli_environment, tmp_path):
    """Identified on the float file, baked into the quantised one, whose own noise counts as noise."""
    base = make_tiny("Q8_0")
    done = npti(
        *main_job(tiny, "m.gguf", "--base", base, "--report", "r.json"), environment=cli_environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    fidelity = json.loads((tmp_path / "r.json").read_text())["fidelity"]
    assert 1e-5 < fidelity["kl_runtime_floor"] < 1e-2 < fidelity["kl_rule_base"]
    arguments = ["verify", "m.gguf", "--model", tiny, "--base", base, "--json"]
    verdict = json.loads(npti(*arguments, environment=cli_environment, cwd=tmp_path).stdout)
    assert verdict["fault"] is None
    assert verdict["fidelity"]["kl_runtime_floor"] == pytest.approx(fidelity["kl_runtime_floor"], rel=0.1)


IDENTIFY = ["identify", "--trait", "calm", "--out", "p.safetensors"]
BAD = [
    ([*IDENTIFY, "--trait", "neuroticism", "--model", "folder", "--runtime", "llama.cpp"], "llama.cpp runs GGUF files"),
    ([*IDENTIFY, "--model", "tiny.gguf", "--dtype", "float32"], "--dtype is for transformers"),
    ([*IDENTIFY, "--model", "tiny.gguf", "--device", "cpu"], "--device is for transformers"),
    ([*IDENTIFY, "--model", "folder", "--threads", "2"], "llama.cpp, which runs nothing here"),
    ([*IDENTIFY, "--model", "tiny.gguf", "--runtime", "transformers", "--context", "512"], "runs nothing here"),
    (
        ["--trait", "calm", "--out", "a", "--format", "peft", "--model", "folder", "--prompt-batch", "64"],
        "runs nothing",
    ),
    (["--trait", "calm", "--out", "m.gguf", "--model", "tiny.gguf", "--threads", "0"], "--threads"),
    (["--trait", "calm", "--out", "m.gguf", "--model", "tiny.gguf", "--context", "10"], "--context"),
    (["--trait", "calm", "--out", "m.gguf", "--model", "tiny.gguf", "--runtime", "vllm"], "--runtime"),
    ([*IDENTIFY, "--model", "tiny.gguf", "--context", "256", "--max-new-tokens", "300"], "--context 256 is too small"),
    ([*IDENTIFY, "--model", "odd.gguf"], "llama.cpp cannot load it: "),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(arguments, says, tiny, tiny_checkpoint, cli_environment, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(tiny.read_bytes())
    (tmp_path / "folder").symlink_to(tiny_checkpoint)
    # whole for us, but for a name that llama.cpp asks for
    (tmp_path / "odd.gguf").write_bytes(tiny.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_q.weird!"))
    arguments = [*arguments, *(["--questions", "4"] if "identify" in arguments else [])]
    done = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if "odd.gguf" in arguments:
        assert "blk.1.attn_k.weight" in done.stderr  # llama.cpp's own words
    else:
        assert len(done.stderr.strip().splitlines()) <= 3
    assert not (tmp_path / "p.safetensors").exists()
