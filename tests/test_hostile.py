"""What no file may make us do: run code, leave its folder, take memory for what it only claims."""

import ast
import json
import re
import shutil
import struct
from pathlib import Path

import fuzz_seeds
import numpy as np
import pytest
from fuzz_targets import TARGETS
from test_structure import FILES, PACKAGE

from npti_export.chat_template import check_template
from npti_export.dial.index import load_dial
from npti_export.errors import AdapterError, ModelError, NptiError
from npti_export.gguf.shards import named_shards, read_model, shard_paths
from npti_export.models import resolve_model, weight_files
from npti_export.rule_io import base_name

RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle",
    "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pandas.read_pickle",
    "numpy.load", "np.load", "subprocess.getoutput", "runpy.run_path",
}  # fmt: skip
OUTSIDE = ["../x", "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:\\x", "a\0b", "~/x", "./x"]


def named(node):
    """``a.b.c`` of a call's function; methods of values have no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def test_nothing_of_ours_runs_what_it_reads():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Call):
                names = [named(node.func)]
                shell = [one for one in node.keywords if one.arg == "shell"]
                names += ["eval"] * any(
                    not (isinstance(one.value, ast.Constant) and not one.value.value) for one in shell
                )
            elif isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{one.name}" for one in node.names)]
            found += [
                f"{path}:{node.lineno}: {one}" for one in names if one in RUNS_CODE or one.split(".")[0] in {"pickle"}
            ]
    # re.compile, model.eval() and their like are methods, and no names of these
    assert found == []


def test_that_the_search_finds_what_it_looks_for():
    tree = ast.parse("import torch\ntorch.load('x')\neval('1')\nmodel.eval()\nre.compile('x')")
    calls = [named(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert {one for one in calls if one in RUNS_CODE} == {"torch.load", "eval"}


def test_code_that_comes_with_a_model_is_never_run_unasked():
    """Wherever ``trust_remote_code`` has a default it is False, and nobody passes True."""
    seen = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = []
            if isinstance(node, ast.FunctionDef):
                plain = node.args.posonlyargs + node.args.args
                given = dict(
                    zip(
                        [one.arg for one in plain[len(plain) - len(node.args.defaults) :]],
                        node.args.defaults,
                        strict=True,
                    )
                )
                only = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                given |= {one.arg: value for one, value in only if value}
                values = [value for name, value in given.items() if "trust" in name]
            elif isinstance(node, ast.AnnAssign) and "trust" in ast.unparse(node.target) and node.value is not None:
                values = [node.value]
            elif isinstance(node, ast.Call):
                passed = [one.value for one in node.keywords if one.arg and "trust" in one.arg]
                assert not any(isinstance(one, ast.Constant) and one.value is not False for one in passed), path
                continue
            for value in values:
                seen += 1
                assert isinstance(value, ast.Constant), path
                assert value.value is False, path
    assert seen >= 2


def test_the_command_line_does_not_trust_either():
    from npti_export.cli.root import cli

    commands = [cli, *cli.commands.values()]
    flags = [one for command in commands for one in command.params if one.name == "trust_remote_code"]
    assert len(flags) >= 3
    assert not any(one.default is True for one in flags)
    assert all(one.is_flag for one in flags)


@pytest.fixture
def model_folder(tmp_path):
    TARGETS["weight-index"].prepare(tmp_path)
    assert resolve_model(str(tmp_path)).shape.layers == 2
    return tmp_path


@pytest.mark.parametrize("place", OUTSIDE)
def test_an_index_of_weights_stays_in_its_folder(model_folder, place):
    index = model_folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = next(iter(whole["weight_map"]))
    for file in {place, f"{place}/model.safetensors" if place else ""}:
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | {name: file}}))
        with pytest.raises(NptiError, match=r"no file beside it|damaged"):
            resolve_model(str(model_folder))


def test_an_index_that_names_nothing(model_folder):
    (model_folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(NptiError, match="names no file of weights"):
        weight_files(model_folder)


@pytest.mark.parametrize("place", [*OUTSIDE, "$(id).gguf", "a b.gguf", "-x.gguf", "a;b.gguf", "a,b.gguf", "x.gguf\n"])
def test_a_dial_names_files_beside_its_index(tmp_path, place):
    """The names also stand in the command lines that we print."""
    (data,) = TARGETS["dial"].prepare(tmp_path)
    for change in ({"base": place}, {"base": f"{place}.gguf"} if place in OUTSIDE[:3] else {"base": place}):
        (tmp_path / "index.json").write_text(json.dumps(json.loads(data) | change))
        with pytest.raises(AdapterError, match="is not the name of a file beside it"):
            load_dial(tmp_path)
    (tmp_path / "index.json").write_bytes(data)
    assert load_dial(tmp_path).poles == ("openness+", "extraversion-")


@pytest.mark.parametrize("change", [{"mixed": 0}, {"mixed": -1}, {"mixed": 10**9}])
def test_a_dial_mixes_a_few_poles(tmp_path, change):
    (data,) = TARGETS["dial"].prepare(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(json.loads(data) | change))
    with pytest.raises(AdapterError, match="mixed is"):
        load_dial(tmp_path)


@pytest.mark.parametrize("recorded", ["../../etc/cron.d/x", "/etc/passwd", "a/../../b.gguf"])
def test_the_name_of_a_base_has_no_folder(tmp_path, recorded):
    fuzz_seeds.write_base(tmp_path / "base.gguf")
    fuzz_seeds.steer(tmp_path / "base.gguf", tmp_path / "steered.gguf")
    file = fuzz_seeds.take_apart((tmp_path / "steered.gguf").read_bytes())
    text = recorded.encode()
    file.entry(b"npti.base.name").raw = struct.pack("<Q", len(text)) + text
    (tmp_path / "evil.gguf").write_bytes(file.encode())
    assert base_name(read_model(tmp_path / "evil.gguf")) == Path(recorded).name


def test_parts_of_a_split_model_lie_beside_the_first(tmp_path):
    """Their names come from the first one's; nothing in a file says where they are."""
    first = tmp_path / "m-00001-of-00003.gguf"
    assert [one.parent for one in named_shards(first)] == [tmp_path] * 3
    assert [one.parent for one in shard_paths(tmp_path / "out.gguf", 3)] == [tmp_path] * 3
    source = (PACKAGE / "gguf" / "shards.py").read_text(encoding="utf-8")
    assert "/" not in source.partition("def _named")[2].partition("return ")[2].splitlines()[0]


@pytest.mark.parametrize("count", [2**31, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["tensors", "keys"])
def test_a_header_that_claims_much_is_refused_before_anything_is_allocated(tmp_path, what, count):
    import tracemalloc

    fuzz_seeds.write_base(tmp_path / "base.gguf")
    file = fuzz_seeds.take_apart((tmp_path / "base.gguf").read_bytes())
    file.counts[what] = count
    (tmp_path / "evil.gguf").write_bytes(file.encode())
    tracemalloc.start()
    try:
        with pytest.raises(NptiError):
            read_model(tmp_path / "evil.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_adapter_that_claims_much_is_refused_before_anything_is_allocated(tmp_path):
    """One wide tensor and many narrow ones would be as many wide layers."""
    import tracemalloc

    from safetensors.numpy import save

    from npti_export.rule_io import load_rule

    (config,) = TARGETS["adapter-config"].prepare(tmp_path)
    few = {f"x.{number}.y": np.zeros(1, np.float32) for number in range(5000)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(few | {"x.5000.y": np.zeros(100_000, np.float32)}))
    claims = json.loads(config) | {"layers": 5000, "width": 100_000}
    (tmp_path / "adapter_config.json").write_text(json.dumps(claims))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="5000 layers of 100000 neurons"):
            load_rule(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_base_that_an_adapter_names_is_not_opened(tmp_path):
    """``base_model_name_or_path`` is a name for people and for PEFT: reading the rule reads no other file."""
    (config,) = TARGETS["adapter-config"].prepare(tmp_path)
    from npti_export.rule_io import load_rule

    for place in OUTSIDE:
        changed = json.loads(config) | {"base_model_name_or_path": place}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        assert load_rule(tmp_path).rule.shift.shape == (2, 64)


def test_a_template_in_a_file_of_weights_is_checked_by_both_runtimes():
    for name in ("llamacpp/chat.py", "loading.py"):
        source = (PACKAGE / "runtimes" / name).read_text(encoding="utf-8")
        assert "check_template(" in source
    assert check_template("", "x") is None


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 1.5), ("hidden_size", True), ("intermediate_size", "64")]
)
def test_sizes_are_whole_numbers(tiny_checkpoint, tmp_path, name, value):
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match="is no whole number"):
        resolve_model(str(folder))


@pytest.fixture
def loaded_folder(tmp_path):
    """loaded_folder(file, change) -> a tiny model's folder with one of its JSON files changed, opened in a runtime."""
    from npti_export.runtimes.transformers import TransformersRuntime

    def make(file, change):
        TARGETS["loaded-config"].prepare(tmp_path)
        path = tmp_path / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return TransformersRuntime(resolve_model(str(tmp_path)), device="cpu", dtype="float32")

    return make


@pytest.mark.parametrize("token", ["</s>", [1, "</s>"], 1.0, True, {"a": 1}])
def test_a_token_that_ends_answers_is_a_number(loaded_folder, token):
    with pytest.raises(ModelError, match=r"eos_token_id .*not the number of a token|cannot load it"):
        loaded_folder("generation_config.json", lambda whole: whole | {"eos_token_id": token})


@pytest.mark.parametrize(
    "more",
    [{"num_beams": 3}, {"min_length": "x"}, {"suppress_tokens": [5, 6]}, {"eos_token_id": [-1, 2**70]}, {"top_k": []}],
)
def test_answers_are_greedy_whatever_a_model_says(loaded_folder, more):
    """Beams, forbidden tokens and the like would be answers that llama.cpp does not give."""
    ask = {"max_new_tokens": 4, "repetition_penalty": 1.1}
    wanted = loaded_folder("config.json", lambda whole: whole).generate([(5, 6, 7), (9,)], **ask)
    runtime = loaded_folder("generation_config.json", lambda whole: whole | more)
    assert runtime.generate([(5, 6, 7), (9,)], **ask) == wanted
    assert runtime.model.generation_config.to_dict().items() >= {"bos_token_id": 0}.items()  # written with a checkpoint


def test_a_tokenizer_of_another_model(loaded_folder):
    def change(whole):
        del whole["model"]["vocab"]["ar"]
        return whole | {"model": whole["model"] | {"vocab": whole["model"]["vocab"] | {"ar": 5000}}}

    with pytest.raises(ModelError, match="its tokenizer gives token 5000, and the model has 300"):
        loaded_folder("tokenizer.json", change).encode([{"role": "user", "content": "How are you?"}])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model_max_length": "9"}, "cannot load it"),
        ({"chat_template": "{{ 'x\ud800' }}"}, "makes of a question is no text"),
        ({"chat_template": "{{ '' }}"}, "makes nothing of a question"),
    ],
)
def test_a_tokenizer_that_fails_in_use(loaded_folder, tmp_path, more, says):
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)

    def change(whole):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        return whole | more

    with pytest.raises(ModelError, match=says):
        loaded_folder("tokenizer_config.json", change).encode([{"role": "user", "content": "How are you?"}])


@pytest.mark.parametrize("rope", [{"rope_type": "64", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": "x"}])
def test_a_configuration_that_makes_no_model(tmp_path, rope):
    from npti_export.endings.checkpoint import CheckpointEnding
    from npti_export.recipe import load_recipe

    TARGETS["checkpoint-config"].prepare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ModelError, match=r"config\.json"):
        CheckpointEnding(resolve_model(str(tmp_path)), lambda: None, load_recipe("npti"), None)


def test_an_adapter_that_peft_does_not_take(tmp_path):
    (config,) = TARGETS["peft-config"].prepare(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(config) | {"task_type": "POETRY"}))
    with pytest.raises(AdapterError, match=r"PEFT cannot load it: .Invalid task type"):
        TARGETS["peft-config"].read(tmp_path / "adapter_config.json")


def test_a_home_that_nobody_has(monkeypatch):
    from npti_export.benches import bench_folder
    from npti_export.errors import TraitError
    from npti_export.export.convert import find_converter

    monkeypatch.setenv("LLAMA_CPP_DIR", "~nobody-is-called-so/llama.cpp")
    with pytest.raises(ModelError, match=r"LLAMA_CPP_DIR is '~nobody-is-called-so/llama.cpp'"):
        find_converter(None)
    with pytest.raises(TraitError, match="neither a trait nor a folder"):
        bench_folder("~nobody-is-called-so/pirate")


def test_a_shard_of_another_model_is_asked_again(tmp_path):
    """Its checksum is right, and what it holds cannot be added to what is there."""
    from fuzz_targets.kept import shard_of, some_stats

    TARGETS["shard"].prepare(tmp_path)
    (tmp_path / "s.safetensors").write_bytes(shard_of(some_stats(1, width=6)))
    TARGETS["shard"].read(tmp_path / "s.safetensors")


def test_a_shard_of_a_level_that_cannot_be(tmp_path):
    """A tree of so many levels has more batches than memory has room for their number."""
    from npti_export.identify.shards import Node, Shards

    for name in ("999999999999-0", "0-9999999999", "٣-1", "1-2"):
        (tmp_path / f"{name}.{'0' * 64}.safetensors").touch()
    assert Shards(tmp_path).found() == {Node(1, 2)}


@pytest.mark.parametrize("batches", [-1, True, 1.0, None, "2"])
def test_batches_that_nobody_can_have_finished(tmp_path, batches):
    from fuzz_targets.kept import NARROW, some_stats

    from npti_export.identify.collect import resume
    from npti_export.progress import Silent
    from npti_export.stats import save_stats

    save_stats(tmp_path / "s.safetensors", some_stats(1), {"batches": batches})
    stats, done = resume(tmp_path / "s.safetensors", NARROW, Silent())
    assert (done, stats.plus.tokens) == (0, 0)


@pytest.mark.parametrize(
    "identity",
    [[], {"type": "user", "auth": "x"}, {"type": "user", "orgs": [1]}, {"type": "user", "auth": {"accessToken": [1]}}],
)
def test_a_mirror_of_the_hub_may_say_anything(monkeypatch, identity):
    from types import SimpleNamespace

    from npti_export.export import hub

    monkeypatch.setattr(hub, "_api", lambda repository: SimpleNamespace(whoami=lambda: identity))
    hub.check_repository("owner/name")


def test_an_index_that_names_a_tensor_by_no_text(model_folder):
    from npti_export.export.convert import plan_conversion

    index = model_folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    file = next(iter(whole["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"model.x\ud800": file}}))
    with pytest.raises(ModelError, match="is damaged"):
        plan_conversion(resolve_model(str(model_folder)), ("c.py",), trust_remote_code=False)


def test_weights_with_odd_names_and_shapes_make_no_checkpoint(tmp_path):
    _, *odd = TARGETS["checkpoint-weights"].prepare(tmp_path)
    assert len(odd) == 4
    for data in odd:
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"is in none|is unknown to a llama|no matrix"):
            TARGETS["checkpoint-weights"].read(tmp_path / "model.safetensors")


def test_a_model_without_one_of_its_weights_is_not_run(tmp_path):
    """Transformers would draw them at random."""
    from safetensors.numpy import load_file, save_file

    from npti_export.runtimes.transformers import TransformersRuntime

    TARGETS["loaded-weights"].prepare(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        left = {one: values for one, values in tensors.items() if one != name}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"tensor {re.escape(name)} is in none of its files"):
            TransformersRuntime(resolve_model(str(tmp_path)), device="cpu", dtype="float32")
