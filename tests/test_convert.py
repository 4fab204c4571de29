"""Transformers directories made GGUF by an existing converter; the one here is tiny_converter.py, a real one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFReader
from imatrix import sums_for, write_gguf
from jobs import COMMAND, main_job, npti

from npti_export.base_file import check_request, made_base, plan_base
from npti_export.errors import ArchitectureError, DiskFullError, ModelError, OutputError
from npti_export.export.convert import SCRIPT, VARIABLE, convertible, find_converter, float_name, plan_conversion
from npti_export.gguf.imatrix import read_imatrix
from npti_export.gguf.reader import read_gguf
from npti_export.loader import Timings
from npti_export.models import gguf_source, resolve_model
from npti_export.progress import Silent

TINY_CONVERTER = Path(__file__).with_name("tiny_converter.py")


@pytest.fixture
def converter(tmp_path_factory):
    return Path(shutil.copy(TINY_CONVERTER, tmp_path_factory.mktemp("llama.cpp") / SCRIPT))


@pytest.fixture
def no_converter(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.fixture
def model(tiny_checkpoint, tmp_path_factory):
    """A copy of the tiny checkpoint to be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("models") / "Tiny-Instruct"))


def planned(directory, converter, kind=None, trust=False, imatrix=None):
    source = resolve_model(str(directory))
    return plan_base(source, None, converter=converter, requantize=kind, trust_remote_code=trust, imatrix=imatrix)


def test_the_converted_file_is_the_model_that_the_directory_was_made_of(converter, tiny, tiny_checkpoint, tmp_path):
    with made_base(planned(tiny_checkpoint, converter), tmp_path / "o.gguf", Silent(), Timings()) as path:
        assert path.parent.parent == tmp_path
        assert path.name == f"{tiny_checkpoint.name}-F32.gguf"
        found = {one.name: one.data.copy() for one in GGUFReader(path).tensors}
    expected = {one.name: one.data for one in GGUFReader(tiny).tensors}
    assert expected.keys() <= found.keys() <= expected.keys() | {"output.weight"}
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    assert not any(tmp_path.iterdir())


def make(plan, folder):
    with made_base(plan, folder / "o.gguf", Silent(), Timings()) as path:
        raise AssertionError(f"{path} was made all the same")


def saved_as(directory, convert):
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file({name: convert(name, values) for name, values in load_file(file).items()}, file, {"format": "pt"})


def test_sixteen_bits_stay_what_they_are(converter, model, tmp_path):
    import torch

    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        saved_as(model, lambda name, values, dtype=dtype: values.to(dtype))
        plan = planned(model, converter)
        assert plan.origin.outtype == short
        with made_base(plan, tmp_path / "o.gguf", Silent(), Timings()) as path:
            assert path.name == f"Tiny-Instruct-{short.upper()}.gguf"
            tensor = read_gguf(path).require_tensor("blk.0.ffn_up.weight")
            raw = np.fromfile(path, np.uint16, tensor.nbytes // 2, offset=tensor.offset)
        from safetensors.torch import load_file

        weights = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert np.array_equal(raw, weights.flatten().view(torch.int16).numpy().view(np.uint16))


def test_a_mixture_becomes_float32_and_other_types_are_the_converter_s_choice(model, no_converter):
    import torch

    def outtype():
        return plan_conversion(resolve_model(str(model)), ("converter",), trust_remote_code=False).outtype

    saved_as(model, lambda name, values: values if "norm" in name else values.to(torch.bfloat16))
    assert outtype() == "bf16"  # norms are float32 in every GGUF
    saved_as(model, lambda name, values: values.to(torch.float16) if "up_proj" in name else values)
    assert outtype() == "f32"
    saved_as(model, lambda name, values: values.to(torch.int8) if "up_proj" in name else values)
    plan = plan_conversion(resolve_model(str(model)), ("converter",), trust_remote_code=False)
    assert plan.outtype == "auto"
    assert float_name(plan) == "Tiny-Instruct.gguf"


def test_it_is_found_by_option_then_variable_then_path(converter, no_converter, monkeypatch, tmp_path):
    with pytest.raises(ModelError, match=r"was not found: git clone.*--converter.*LLAMA_CPP_DIR.*--base.*peft"):
        find_converter(None)
    there = tmp_path / SCRIPT
    shutil.copy(converter, there)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="was not found"):
        find_converter(None)  # not executable, so not a command
    there.chmod(0o755)
    assert find_converter(None) == (sys.executable, str(there))
    monkeypatch.setenv(VARIABLE, str(converter.parent))
    assert find_converter(None) == (sys.executable, str(converter))
    assert find_converter(there) == (sys.executable, str(there))
    assert find_converter(tmp_path) == (sys.executable, str(there))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=rf"nowhere/{SCRIPT}: the environment variable LLAMA_CPP_DIR leads there"):
        find_converter(None)


def test_a_package_manager_s_script_runs_in_its_own_interpreter(tmp_path, no_converter):
    """Homebrew writes its own Python into the first line, Nix a wrapper in shell; both are run as they are."""
    for name, first in ((SCRIPT, "#!/opt/own/bin/python3"), ("llama-convert-hf-to-gguf", "#!/bin/sh")):
        script = tmp_path / name
        script.write_text(f"{first}\n")
        script.chmod(0o755)
        assert find_converter(script) == (str(script),)
        script.chmod(0o644)
    assert find_converter(tmp_path / SCRIPT) == (sys.executable, str(tmp_path / SCRIPT))
    with pytest.raises(ModelError, match=r"neither a .py file nor executable"):
        find_converter(tmp_path / "llama-convert-hf-to-gguf")


def test_a_script_without_the_folder_that_belongs_to_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", ModuleType("sentencepiece"))
    sys.modules["sentencepiece"].__spec__ = ModuleSpec("sentencepiece", None)
    script = tmp_path / SCRIPT
    script.write_text("#!/usr/bin/env python3\nfrom conversion import ModelBase\n")
    with pytest.raises(ModelError, match="lacks the folder conversion"):
        find_converter(script)
    (tmp_path / "conversion").mkdir()
    (tmp_path / "link.py").symlink_to(script)
    for path in (script, tmp_path / "link.py"):
        assert find_converter(path) == (sys.executable, str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        find_converter(script)


FAULTS = [
    ("import sys; print('tokenizer is odd'); sys.exit('cannot map tensor x')", r"cannot map tensor x \(exit code 1\)"),
    ("raise ValueError('no such layer')", r"ValueError: no such layer \(exit code 1\)"),
    ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
    ("print('done nothing')", r"done nothing \(exit code 0\)"),
]


@pytest.mark.parametrize(("program", "says"), FAULTS)
def test_what_a_failed_converter_said_last(program, says, tiny_checkpoint, tmp_path):
    script = tmp_path / SCRIPT
    script.write_text(program + "\n")
    with pytest.raises(ModelError, match=says):
        make(planned(tiny_checkpoint, script), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]


def test_a_file_of_another_model_is_refused(make_tiny, tiny_checkpoint, tmp_path):
    script = tmp_path / SCRIPT
    script.write_text(f"import shutil, sys\nshutil.copy({str(make_tiny(seed=3))!r}, sys.argv[-1])\n")
    with pytest.raises(ModelError, match="is not the same model"):
        make(planned(tiny_checkpoint, script), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]


def test_code_that_the_converter_would_run_needs_the_user_s_word(converter, model):
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    with pytest.raises(ModelError, match=r"tokenizer_config.json: names code of its own.*--trust-remote-code"):
        planned(model, converter)
    assert planned(model, converter, trust=True).origin.outtype == "f32"


def test_what_could_not_be_baked_is_refused_before_it_is_converted(converter, model, no_converter):
    import torch

    config = json.loads((model / "config.json").read_text())
    for change, error, says in (
        ({"model_type": "qwen3"}, ArchitectureError, "for qwen3, so no rule can be baked.*take --format peft"),
        ({"hidden_act": "gelu"}, ArchitectureError, "its activation is gelu"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        for named in (converter, None):  # nobody is sent for a converter in vain
            with pytest.raises(error, match=says):
                planned(model, named)
    (model / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.bias is a bias of an MLP"):
        planned(model, converter)


def test_room_for_the_float_file_too(converter, tiny_checkpoint, tmp_path, monkeypatch):
    elements = 3 * (64 * 96 * 3 + 64 * 64 * 3) + 1024 * 64
    tied = json.loads((tiny_checkpoint / "config.json").read_text())["tie_word_embeddings"]
    elements += 0 if tied else 1024 * 64
    assert planned(tiny_checkpoint, converter).nbytes == 2 * 4 * elements
    quantised = planned(tiny_checkpoint, converter, "Q8_0")
    assert quantised.nbytes == 4 * elements + elements * 34 // 32
    free = quantised.nbytes - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(free + 1, 1, free))
    with pytest.raises(DiskFullError, match="only"), made_base(quantised, tmp_path / "o.gguf", Silent(), Timings()):
        raise AssertionError("was made all the same")
    assert not any(tmp_path.iterdir())


def test_a_converter_with_nothing_to_convert(converter, tiny):
    with pytest.raises(OutputError, match="--base brings one"):
        check_request("dir", tiny, converter, None)
    with pytest.raises(OutputError, match="is a GGUF; leave it out"):
        plan_base(gguf_source(tiny), read_gguf(tiny), converter=converter, requantize=None, trust_remote_code=False)


def test_what_needs_a_converter(tiny, model):
    assert convertible(str(model))
    for other in (None, str(tiny), "org/name:file.gguf", "nowhere.gguf", str(model.parent), "~nobody/x"):
        assert not convertible(other), other
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert convertible(str(model))  # its steered file is written as llama
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    assert not convertible(str(model))  # refused for that, whether or not there is a converter


@pytest.mark.parametrize("model", ["here", "org/name"])
def test_none_is_said_at_once_and_before_weights_are_downloaded(model, tiny_checkpoint, cli_environment, tmp_path):
    cached = tmp_path / "hub" / "models--org--name"  # of the repository, there is nothing but the configuration
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    shutil.copy(tiny_checkpoint / "config.json", cached / "snapshots" / ("0" * 40))
    if model == "here":
        model = tiny_checkpoint
    environment = {**cli_environment, "PATH": "/nonexistent", "HF_HOME": str(tmp_path)}
    environment.pop(VARIABLE, None)
    program = "import atexit, sys; from npti_export.cli import main; "
    program += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    arguments = ["--trait", "calm", "--model", str(model), "--out", "o.gguf"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"llama.cpp's {SCRIPT}, which was not found" in done.stderr
    assert done.stdout == "False\n"  # what takes seconds to import was not
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_the_whole_job_from_a_directory(converter, model, cli_environment, tmp_path):
    """Converted, quantised, baked, verified; identified in what is baked, so the same weights elsewhere are known."""
    arguments = main_job(model, "model.gguf", "--requantize", "Q8_0", "--report", "report.json")
    environment = {**cli_environment, VARIABLE: str(converter.parent)}
    done = npti(*arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model.gguf", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"]["convert"] > 0
    assert report["seconds"]["quantise"] > 0
    assert report["fidelity"]["kl_rule_base"] > 2 * report["fidelity"]["kl_rule_artifact"]
    made = read_gguf(tmp_path / "model.gguf")
    assert made.get("npti.base.name") == "Tiny-Instruct-Q8_0.gguf"
    assert made.get("npti.model.fingerprint") == resolve_model(str(model)).fingerprint

    moved = model.rename(model.with_name("elsewhere"))
    arguments = main_job(moved, "again.gguf", "--requantize", "Q8_0", "--converter", converter)
    again = npti(*arguments, environment=cli_environment, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from 3 finished batches" in again.stderr


def test_an_importance_matrix_for_what_is_converted(converter, tiny, tiny_checkpoint, tmp_path):
    """One of other sizes is refused before the conversion; one that is wrong about the rest, after it."""
    sums = sums_for(read_gguf(tiny))

    def matrix(**change):
        return read_imatrix(write_gguf(tmp_path / "m.gguf", sums | change))

    with made_base(
        planned(tiny_checkpoint, converter, "Q4_0", imatrix=matrix()), tmp_path / "o", Silent(), Timings()
    ) as q:
        assert read_gguf(q).get("quantize.imatrix.entries_count") == len(sums)
        weighed = {one.name: one.data.copy() for one in GGUFReader(q).tensors}
    with made_base(planned(tiny_checkpoint, converter, "Q4_0"), tmp_path / "o", Silent(), Timings()) as q:
        plain = {one.name: one.data.copy() for one in GGUFReader(q).tensors}
    assert not np.array_equal(plain["blk.1.ffn_up.weight"], weighed["blk.1.ffn_up.weight"])
    wrong = np.ones((1, 32), np.float32), np.ones(1)
    with pytest.raises(ModelError, match=r"blk.2.ffn_down.weight: 32 columns, not 96"):
        planned(tiny_checkpoint, converter, "Q4_0", imatrix=matrix(**{"blk.2.ffn_down.weight": wrong}))
    plan = planned(tiny_checkpoint, converter, "Q4_0", imatrix=matrix(**{"blk.2.attn_output.weight": wrong}))
    with (
        pytest.raises(ModelError, match=r"blk.2.attn_output.weight: 32 columns, not 64"),
        made_base(plan, tmp_path / "o", Silent(), Timings()),
    ):
        raise AssertionError("was made all the same")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_kill_while_it_converts_ends_the_converter_and_leaves_nothing(model, cli_environment, tmp_path):
    script = tmp_path / SCRIPT
    started = tmp_path / "started"
    script.write_text(
        "import os, sys, time\nopen(sys.argv[-1], 'w').write('half')\n"
        f"open({str(started)!r} + '.part', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(started)!r} + '.part', {str(started)!r})\ntime.sleep(600)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    arguments = [*COMMAND, *map(str, main_job(model, "o.gguf", "--converter", script))]
    process = subprocess.Popen(arguments, env=cli_environment, cwd=out, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not started.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(out.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert not any(out.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
