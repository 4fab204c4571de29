"""``npti-export dial`` as a user meets it: a whole directory or none, one clear line for bad input."""

import json

import numpy as np
import pytest
from gguf import GGUFWriter
from jobs import QUICK, npti

from npti_export.dial.index import load_dial
from npti_export.errors import AdapterError
from npti_export.files import sha256_file

MORE = ["--recipe", "npti", *QUICK, "--threads", "1"]


@pytest.fixture(scope="module")
def wide(make_tiny):
    return make_tiny(width=128)


@pytest.fixture(scope="module")
def persona(wide, tmp_path_factory):
    """A dial of both poles of a trait and one of another, with its cache beside it."""
    folder = tmp_path_factory.mktemp("dial")
    environment = _environment(folder)
    arguments = ["--traits", "extraversion+,extraversion-, calm", "--model", wide, "--out", "persona"]
    done = npti("dial", *arguments, *MORE, environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done, environment


def _environment(folder):
    import os

    return {**os.environ, "NPTI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_directory(persona, wide, tmp_path):
    folder, done, environment = persona
    index = json.loads((folder / "persona/index.json").read_text())
    kinds = [(one.get("trait"), one["kind"]) for one in index["adapters"] if one["kind"] != "overlap"]
    poles = ("extraversion+", "extraversion-", "neuroticism-")
    assert kinds == [(pole, kind) for pole in poles for kind in ("shift", "clamp")]
    assert {one["file"] for one in index["adapters"]} | {"base.gguf", "index.json", "README.md"} == {
        path.name for path in (folder / "persona").iterdir()
    }
    for place, one in enumerate(index["adapters"]):
        assert one["id"] == place
        assert sha256_file(folder / "persona" / one["file"]) == one["sha256"]
    assert index["unsteered"] == {"bitwise": True, "kl": 0.0, "max_logit_diff": 0.0}
    assert list(index["poles"]) == list(poles)
    for one in index["poles"].values():
        assert one["fidelity"]["kl_rule_artifact"] <= one["fidelity"]["limit"] <= 1e-3
        assert one["fidelity"]["kl_rule_base"] > 100 * one["fidelity"]["kl_rule_artifact"]
    assert index["server"].startswith("llama-server -m base.gguf --lora-scaled extraversion+.shift.gguf:0,")
    assert index["server"] in done.stdout
    assert index["server"] in (folder / "persona/README.md").read_text()
    assert '"lora": [{"id": 0, "scale": 0.7}, {"id": 1, "scale": 1.0}' in done.stdout
    done = npti("strip", "persona/base.gguf", "--out", tmp_path / "b.gguf", environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.gguf").read_bytes() == wide.read_bytes()


def test_requests(persona):
    folder, _, environment = persona

    def printed(*arguments):
        done = npti("dial", "request", "persona", *arguments, environment=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert printed() == {"lora": [{"id": 0, "scale": 0.0}]}
    mixed = printed("introversion:0.4,calm")["lora"]
    assert mixed[:4] == [
        {"id": 2, "scale": 0.4},
        {"id": 3, "scale": 1.0},
        {"id": 4, "scale": 1.0},
        {"id": 5, "scale": 1.0},
    ]
    dial = load_dial(folder / "persona")
    overlaps = {one.traits: place for place, one in enumerate(dial.adapters) if one.kind == "overlap"}
    place = overlaps.get(("extraversion-", "neuroticism-"))
    assert mixed[4:] == ([] if place is None else [{"id": place, "scale": -1.0}])
    body = printed("calm", "--message", "How are you?")
    assert body["messages"] == [{"role": "user", "content": "How are you?"}]
    assert body["lora"] == [{"id": 4, "scale": 1.0}, {"id": 5, "scale": 1.0}]


def test_inspect(persona):
    folder, _, environment = persona

    def kind(path):
        done = npti("inspect", path, "--json", environment=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert kind("persona")["poles"] == "extraversion+, extraversion-, neuroticism-"
    assert kind("persona/base.gguf")["kind"] == "dial base"
    shown = kind("persona/neuroticism-.clamp.gguf")
    assert (shown["kind"], shown["npti.trait"]) == ("dial clamp", "neuroticism-")


def lora(path, alpha=None, kind="adapter"):
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", np.zeros((1, 32), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


@pytest.mark.parametrize("command", [["inspect", "."], ["dial", "request", ".", "calm:0.5"]])
def test_scales_that_a_server_would_misread(tmp_path, cli_environment, command):
    """llama.cpp multiplies by alpha over rank where there is an alpha; 0 is none."""
    entries = [{"trait": "neuroticism-", "kind": kind, "file": f"{kind}.gguf"} for kind in ("shift", "clamp")]
    index = {"npti_dial": 1, "base": "b.gguf", "mixed": 2, "adapters": entries}
    (tmp_path / "index.json").write_text(json.dumps(index))
    lora(tmp_path / "shift.gguf")

    def run():
        return npti(*command, environment=cli_environment, cwd=tmp_path)

    missing = run()
    if command[0] == "inspect":
        assert missing.returncode == 2
        assert "clamp.gguf: is missing, and is the clamp of neuroticism- here" in missing.stderr
    else:
        assert missing.returncode == 0, missing.stderr  # the server has the files
    for alpha in (None, 0.0):
        lora(tmp_path / "clamp.gguf", alpha)
        done = run()
        assert done.returncode == 0, done.stderr
    lora(tmp_path / "clamp.gguf", 16.0)
    done = run()
    assert done.returncode == 2
    assert "clamp.gguf: adapter.lora.alpha is 16.0, so llama.cpp would scale each layer by that" in done.stderr
    lora(tmp_path / "clamp.gguf", kind="model")
    done = run()
    assert done.returncode == 2
    assert "clamp.gguf: is no LoRA adapter" in done.stderr


def test_force_replaces_a_dial_and_nothing_else(persona, wide):
    folder, _, environment = persona
    again = ["--traits", "calm", "--model", wide, *MORE]
    done = npti("dial", *again, "--out", "persona", environment=environment, cwd=folder)
    assert done.returncode == 2
    assert "persona: exists already; pass --force" in done.stderr
    other = folder / "other"
    other.mkdir()
    (other / "index.json").write_text('{"npti_dial": 1}')
    done = npti("dial", *again, "--out", "other", "--force", environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {one.traits for one in load_dial(other).adapters} == {("neuroticism-",)}
    (other / "mine.txt").write_text("mine")
    done = npti("dial", *again, "--out", "other", "--force", environment=environment, cwd=folder)
    assert done.returncode == 2
    assert "holds more than an output of ours" in done.stderr


def test_an_unfaithful_dial_is_set_aside(persona, wide, tmp_path):
    *_, environment = persona
    strict = ["--set", "verify.kl_limit_float=1e-12", "--set", "verify.kl_limit_floor_ratio=1"]
    arguments = ["--traits", "calm", "--model", wide, "--out", "persona", *MORE, *strict]
    done = npti("dial", *arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 3
    assert "not delivered: neuroticism-: it does not do what the rule says" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["persona.rejected"]
    assert json.loads((tmp_path / "persona.rejected/index.json").read_text())["base"] == "base.gguf"


def test_a_split_model(make_tiny, tmp_path, persona):
    *_, environment = persona
    model = make_tiny(width=128, split=12)
    arguments = ["--traits", "calm", "--model", model, "--out", "persona", *MORE]
    done = npti("dial", *arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dial = load_dial(tmp_path / "persona")
    assert dial.base.startswith("base-00001-of-0000")
    assert (tmp_path / "persona" / dial.base).is_file()


def test_a_transformers_directory_with_its_gguf(tmp_path, persona, tiny, tiny_checkpoint):
    """Identified in torch, widened and verified in the GGUF."""
    *_, environment = persona
    arguments = ["--traits", "calm", "--model", tiny_checkpoint, "--base", tiny, "--out", "persona", *MORE]
    done = npti("dial", *arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "persona/index.json").read_text())
    assert index["poles"]["neuroticism-"]["fidelity"]["kl_runtime_floor"] < 1e-4


def test_a_quantised_first(tmp_path, persona, wide):
    *_, environment = persona
    arguments = ["--traits", "calm", "--model", wide, "--requantize", "Q8_0", "--out", "persona", *MORE]
    done = npti("dial", *arguments, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["persona"]


BAD = [
    (["--traits", "calm"], "no --out"),
    (["--out", "p"], "no --traits"),
    (["--traits", "", "--out", "p"], "--traits names no pole"),
    (["--traits", "agreablness+", "--out", "p"], "did you mean 'agreeableness+'"),
    (["--traits", "calm:0.5", "--out", "p"], "strengths are for requests; give neuroticism- alone"),
    (["--traits", "calm,neuroticism-", "--out", "p"], "given twice"),
    (["--traits", "calm", "--out", "there"], "there: exists already; pass --force"),
    (["--traits", "calm", "--out", "file"], "is a file, and this format is a directory"),
    (["--traits", "calm", "--out", "no/p"], "does not exist"),
    (["--traits", "calm", "--out", "p", "--mix", "1"], "--mix"),
    (["--traits", "calm", "--out", "p", "--model", "qwen3.gguf"], "llama.cpp loads no biases for its MLPs"),
    (["--traits", "calm", "--out", "p", "--profile", "none.safetensors"], "no such profile"),
    (["--traits", "calm", "request", "there"], "takes no options of dial"),
    (["request", "there"], "there/index.json: cannot be read"),
    (["request", "damaged"], "damaged/index.json: is not JSON"),
    (["request", "good", "openness+"], "openness+: is not on this dial, which has neuroticism-"),
    (["request", "good", "calm:-1"], "must be a number above 0"),
    (["request", "good", "calm,calm"], "given twice"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_leaves_nothing(make_tiny, tmp_path, cli_environment, arguments, message):
    for name in ("there", "damaged", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "there/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "damaged/index.json").write_text("{")
    entry = {"trait": "neuroticism-", "kind": "shift", "file": "f.gguf"}
    (tmp_path / "good/index.json").write_text(
        json.dumps({"npti_dial": 1, "base": "base.gguf", "mixed": 2, "adapters": [entry]})
    )
    (tmp_path / "qwen3.gguf").symlink_to(make_tiny(family="qwen3"))
    before = sorted(path.name for path in tmp_path.iterdir())
    done = npti("dial", *arguments, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"npti_dial": 9}, "is not the index of a dial of this version"),
        ({"base": 3}, "base: "),
        ({"adapters": []}, "adapters: are missing"),
        ({"adapters": [{"kind": "shift", "file": "f"}]}, "names no trait"),
        ({"adapters": [{"trait": "a", "kind": "other", "file": "f"}]}, "adapters.0.kind: "),
        ({"mixed": None}, "mixed: "),
        ({"base": "../b"}, "not the name of a file beside it"),
        ({"adapters": [{"trait": "a", "kind": "clamp", "file": "/tmp/f"}]}, "not the name of a file beside it"),
        ([], "is not the index"),
    ],
)
def test_damaged_indices(tmp_path, change, message):
    good = {"npti_dial": 1, "base": "b", "mixed": 2, "adapters": [{"trait": "calm", "kind": "shift", "file": "f"}]}
    (tmp_path / "index.json").write_text(json.dumps(good | change if isinstance(change, dict) else change))
    with pytest.raises(AdapterError, match=message):
        load_dial(tmp_path)


def test_help_has_examples(cli_environment, tmp_path):
    done = npti("dial", "--help", environment=cli_environment, cwd=tmp_path)
    assert "npti-export dial --traits all --out persona/" in done.stdout
    assert "request" in done.stdout
