"""Control vectors and constants as biases of a GGUF: exact in stock llama.cpp, and every fault said up front."""

import json
import math

import numpy as np
import pytest
from gguf import GGUFWriter
from jobs import npti
from reference import ReferenceLlama, kl
from safetensors.numpy import save_file
from test_bake import TOKENS, llama_logits, tiny_of
from test_constants import ConstantLlama
from tolerances import KL_TINY_FLOAT, KL_TINY_QUANTISED_OTHERS

from npti_export.bake_vector import VectorJob, bake_vector
from npti_export.errors import AdapterError, FidelityError, NptiError
from npti_export.export.control_vector import write_control_vector
from npti_export.export.gguf import strip
from npti_export.files import sha256_file
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.gguf.residual import residual_scale
from npti_export.gguf.shards import read_model, shard_paths
from npti_export.inspection import inspect_file
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.rule_io import load_rule
from npti_export.runtimes.llamacpp.context import Settings

QUICK = ("verify.prompts=2", "verify.answer_tokens=6")


def bake(vector, out, model, **more):
    job = VectorJob(vector, out, str(model), overrides=QUICK, settings=Settings(threads=1), **more)
    return bake_vector(job, Silent())


def random_directions(layers, hidden, size=0.3, seed=0):
    return np.random.default_rng(seed).normal(0, size, (layers - 1, hidden)).astype(np.float32)


@pytest.fixture
def vector(tmp_path):
    """A control vector for the tiny model."""
    write_control_vector(tmp_path / "v.gguf", random_directions(3, 64), "llama", {})
    return tmp_path / "v.gguf"


class DirectedLlama(ReferenceLlama):
    """The float64 reference with a direction added to the residual stream behind each layer but the first."""

    def __init__(self, path, directions):
        super().__init__(path)
        self.directions = directions

    def logits(self, tokens):
        x = self.tensors["token_embd.weight"][list(tokens)] * self.embedding
        nothing = np.zeros(1 << 12)
        for layer in range(self.layers):
            if f"blk.{layer}.ffn_norm.weight" not in self.tensors:
                continue
            x = x + self.residual * self.attention(self.norm(x, f"blk.{layer}.attn_norm.weight"), layer)
            normed = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            width = self.tensors[f"blk.{layer}.ffn_gate.weight"].shape[0]
            x = x + self.residual * self.mlp(normed, layer, nothing[:width], nothing[:width], None)
            if layer:
                x = x + self.directions[layer - 1]
        return self.norm(x, "output_norm.weight") @ self.tensors["token_embd.weight"].T / self.logit


def check(base, folder, directions, report, limit, reference_of=DirectedLlama):
    """The baked file against float64, its weights against the base's, and the base out of it again."""
    out = folder / "o.gguf"
    want, plain = reference_of(base, directions).logits(TOKENS), ReferenceLlama(base).logits(TOKENS)
    error = kl(want, llama_logits(out))
    assert error < limit
    assert kl(want, plain) > max(0.02, 4 * error)
    assert report["fidelity"]["kl_vector_artifact"] <= report["limit"] < report["fidelity"]["kl_vector_base"]
    assert read_gguf(out).get("npti.fidelity.kl_vector_base") == pytest.approx(report["fidelity"]["kl_vector_base"])
    assert mlp_widths(read_gguf(out)) == mlp_widths(read_gguf(base))
    assert strip(out, folder / "base.gguf", force=False) == sha256_file(base)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q2_K", "IQ1_M", "NVFP4"])
def test_every_type_keeps_its_bytes(make_tiny, tmp_path, kind):
    base = tiny_of(make_tiny, kind)
    header = read_gguf(base)
    layers, hidden = header.get("llama.block_count"), header.get("llama.embedding_length")
    directions = random_directions(layers, hidden)
    write_control_vector(tmp_path / "v.gguf", directions / 2, "llama", {})
    report = bake(tmp_path / "v.gguf", tmp_path / "o.gguf", base, scale=2.0)
    check(base, tmp_path, directions, report, KL_TINY_FLOAT if kind in ("F32", "BF16") else KL_TINY_QUANTISED_OTHERS)
    steered, old, new = read_gguf(tmp_path / "o.gguf"), base.read_bytes(), (tmp_path / "o.gguf").read_bytes()
    for tensor in header.tensors:
        now = steered.by_name[tensor.name]
        assert new[now.offset : now.offset + now.nbytes] == old[tensor.offset : tensor.offset + tensor.nbytes]
    added = [name for name in steered.by_name if name not in header.by_name]
    assert added == [f"blk.{layer}.ffn_down.bias" for layer in range(1, layers)]
    assert report["vector"]["layers"] == layers - 1


@pytest.mark.parametrize("family", ["granite", "minicpm", "mistral3", "qwen2", "deci"])
def test_every_family_that_bakes(make_tiny, tmp_path, family):
    base, directions = make_tiny(family=family), random_directions(3, 64)
    write_control_vector(tmp_path / "v.gguf", directions, family, {})
    report = bake(tmp_path / "v.gguf", tmp_path / "o.gguf", base)
    check(base, tmp_path, directions, report, KL_TINY_FLOAT)


def test_an_older_minicpm_that_does_not_say_its_scale(make_tiny, tmp_path):
    """llama.cpp takes one that depends on the number of layers."""
    base = tmp_path / "old.gguf"
    data = make_tiny(family="minicpm").read_bytes()
    base.write_bytes(data.replace(b"minicpm.residual_scale", b"minicpm.residual_other"))
    assert residual_scale(read_gguf(base)) == pytest.approx(1.4 / math.sqrt(3))
    directions = random_directions(3, 64)
    write_control_vector(tmp_path / "v.gguf", directions, "minicpm", {})
    report = bake(tmp_path / "v.gguf", tmp_path / "o.gguf", base)
    assert report["fidelity"]["kl_vector_artifact"] < KL_TINY_FLOAT < report["fidelity"]["kl_vector_base"]
    found = read_gguf(tmp_path / "o.gguf").by_name["blk.1.ffn_down.bias"]
    bias = np.frombuffer((tmp_path / "o.gguf").read_bytes()[found.offset :][:256], np.float32)
    np.testing.assert_allclose(bias, directions[0] * math.sqrt(3) / 1.4, rtol=1e-6)


def test_a_base_with_down_biases_of_its_own(make_tiny, tmp_path, vector):
    base = make_tiny(biases=("ffn_down", "ffn_gate"))
    report = bake(vector, tmp_path / "o.gguf", base)
    check(base, tmp_path, random_directions(3, 64), report, KL_TINY_FLOAT)


def test_layers_without_an_mlp_take_no_direction(make_tiny, tmp_path):
    """Nor does llama.cpp add one there."""
    base = make_tiny(family="deci", width=(96, 0, 64, 32), layers=4)
    directions = random_directions(4, 64)
    write_control_vector(tmp_path / "v.gguf", directions, "deci", {})
    report = bake(tmp_path / "v.gguf", tmp_path / "o.gguf", base)
    assert report["vector"]["layers"] == 2
    check(base, tmp_path, directions, report, KL_TINY_FLOAT)
    directions[[1, 2]] = 0
    write_control_vector(tmp_path / "none.gguf", directions, "deci", {})
    with pytest.raises(NptiError, match="none of its directions is for a layer that has an MLP"):
        bake(tmp_path / "none.gguf", tmp_path / "x.gguf", base)


def test_a_split_model(make_tiny, tmp_path, vector):
    base = make_tiny(split=7)
    count = len(read_model(base).parts)
    report = bake(vector, tmp_path / "o.gguf", base)
    first = shard_paths(tmp_path / "o.gguf", count)[0]
    want = DirectedLlama(make_tiny(), random_directions(3, 64)).logits(TOKENS)
    assert kl(want, llama_logits(first)) < KL_TINY_FLOAT
    assert kl(want, ReferenceLlama(make_tiny()).logits(TOKENS)) > 0.02
    assert len(report["artifact"]["sha256"]) == count
    strip(first, tmp_path / "b.gguf", force=False)
    for was, now in zip(read_model(base).parts, shard_paths(tmp_path / "b.gguf", count), strict=True):
        assert now.read_bytes() == was.path.read_bytes()


def test_a_vector_as_repeng_writes_it(tiny, tmp_path):
    """By gguf-py: the model_type of transformers as hint, layers in descending order, not all of them."""
    directions = random_directions(3, 64)
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.2", directions[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    directions[0] = 0
    report = bake(tmp_path / "v.gguf", tmp_path / "o.gguf", tiny, scale=-1.0)
    check(tiny, tmp_path, -directions, report, KL_TINY_FLOAT)


def constants(folder, fingerprint=None):
    """The same constant in both formats: ``[3, 96]`` float32, a fifth of it not zero."""
    rng = np.random.default_rng(0)
    values = (rng.normal(0, 0.5, (3, 96)) * (rng.random((3, 96)) < 0.2)).astype(np.float32)
    about = {} if fingerprint is None else {"fingerprint": fingerprint}
    save_file({"constant": values}, folder / "c.safetensors", metadata=about)
    rows = [[int(layer), int(neuron), float(values[layer, neuron])] for layer, neuron in np.argwhere(values)]
    (folder / "c.json").write_text(json.dumps({"layers": 3, "width": 96, "constant": rows, **about}))
    return values


def test_constants_in_both_formats(tiny, tmp_path):
    values = constants(tmp_path, gguf_source(tiny).fingerprint)
    report = bake(tmp_path / "c.json", tmp_path / "o.gguf", tiny, scale=1.5)
    assert (report["vector"]["kind"], report["vector"]["layers"]) == ("constant", 3)
    check(
        tiny,
        tmp_path,
        (values.astype(float) * 1.5).astype(np.float32),
        report,
        KL_TINY_FLOAT,
        lambda path, constant: ConstantLlama(path, constant),
    )
    bake(tmp_path / "c.safetensors", tmp_path / "o2.gguf", tiny, scale=1.5)
    one, two = read_gguf(tmp_path / "o.gguf"), read_gguf(tmp_path / "o2.gguf")
    for layer in range(3):
        name = f"blk.{layer}.ffn_down.bias"
        places = [(path.by_name[name].offset, path.path.read_bytes()) for path in (one, two)]
        assert len({data[offset : offset + 256] for offset, data in places}) == 1


def test_the_default_model_from_the_command_line(default_model, tmp_path, cli_environment):
    """The real one, with its own chat template: verified, described, and its base back by SHA-256."""
    write_control_vector(tmp_path / "v.gguf", random_directions(30, 576, 0.2), "llama", {})
    settings = [argument for value in QUICK for argument in ("--set", value)]
    run = lambda *arguments: npti(*arguments, environment=cli_environment, cwd=tmp_path)  # noqa: E731
    done = run("bake-vector", "v.gguf", "--out", "o.gguf", "--json", "--threads", "1", *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["fidelity"]
    assert 0 < found["kl_vector_artifact"] <= report["limit"] == 2 * found["kl_runtime_floor"]
    assert found["kl_vector_base"] > 10 * found["kl_vector_artifact"]
    assert report["artifact"]["sha256"] == sha256_file(tmp_path / "o.gguf")
    assert report["artifact"]["bytes"] < default_model.stat().st_size + 29 * (4 * 576 + 64) + 2000
    done = run("strip", "o.gguf", "--out", "b.gguf")
    assert done.returncode == 0, done.stderr
    assert sha256_file(tmp_path / "b.gguf") == sha256_file(default_model)
    about = inspect_file(tmp_path / "o.gguf")
    assert (about["npti.vector.kind"], about["npti.vector.name"]) == ("control vector", "v.gguf")
    with pytest.raises(AdapterError, match="holds a baked vector and no rule"):
        load_rule(tmp_path / "o.gguf")
    done = run("bake-vector", "v.gguf", "--model", "o.gguf", "--out", "x.gguf")
    assert done.returncode == 2
    assert "is steered already" in done.stderr
    done = run("bake-vector", "v.gguf", "--out", "p.gguf", "--threads", "1", *settings)
    assert done.returncode == 0, done.stderr
    assert "faithful" in done.stdout
    assert (tmp_path / "p.gguf").read_bytes() == (tmp_path / "o.gguf").read_bytes()


def test_a_vector_that_is_lost_in_the_noise(tiny, tmp_path):
    """Nothing could prove that such a file does anything."""
    write_control_vector(tmp_path / "v.gguf", random_directions(3, 64, 1e-9), "llama", {})
    with pytest.raises(FidelityError, match=r"nothing proves that it does anything.*kept as .*o.gguf.rejected"):
        bake(tmp_path / "v.gguf", tmp_path / "o.gguf", tiny)
    assert not (tmp_path / "o.gguf").exists()
    assert read_gguf(tmp_path / "o.gguf.rejected").get("npti.vector.kind") == "control vector"


def test_a_file_that_does_something_else_is_not_delivered(tiny, tmp_path, vector, monkeypatch):
    """Biases of half the size: caught by the comparison with llama.cpp's own call."""
    monkeypatch.setattr("npti_export.bake_vector.residual_scale", lambda _: 2.0)
    with pytest.raises(FidelityError, match=r"away from its base with llama\.cpp's own"):
        bake(vector, tmp_path / "o.gguf", tiny)
    assert not (tmp_path / "o.gguf").exists()


def write_json(path, **changes):
    path.write_text(json.dumps({"layers": 3, "width": 96, "constant": [[0, 1, 0.5]], **changes}))


def faulty_vectors(folder):
    """name of a file -> what is said of it"""
    ones = np.ones((2, 64), np.float32)
    write = lambda name, values, hint="llama", **more: write_control_vector(  # noqa: E731
        folder / name, values, hint, more
    )
    write("wide.gguf", np.ones((2, 128), np.float32))
    write("long.gguf", np.ones((5, 64), np.float32))
    write("nan.gguf", np.full((2, 64), np.nan, np.float32))
    write("zero.gguf", 0 * ones)
    write("hint.gguf", ones, "gemma2")
    write("made.gguf", ones, "llama", **{"model.fingerprint": "f" * 64})
    writer = GGUFWriter(folder / "half.gguf", "controlvector")
    writer.add_tensor("direction.1", ones[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write("first.gguf", ones)
    data = (folder / "first.gguf").read_bytes()
    (folder / "first.gguf").write_bytes(data.replace(b"direction.1", b"direction.0"))
    (folder / "cut.gguf").write_bytes(data[: len(data) // 2])
    (folder / "text.txt").write_text("hello")
    save_file({"shift": ones}, folder / "name.safetensors")
    save_file({"constant": ones.astype(np.float16)}, folder / "half.safetensors")
    save_file({"constant": ones}, folder / "shape.safetensors")
    save_file({"constant": np.full((3, 96), np.inf, np.float32)}, folder / "inf.safetensors")
    save_file({"constant": np.ones((3, 96), np.float32)}, folder / "other.safetensors", {"fingerprint": "e" * 64})
    (folder / "cut.safetensors").write_bytes((folder / "shape.safetensors").read_bytes()[:50])
    (folder / "cut.json").write_text('{"layers": 3')
    (folder / "list.json").write_text("[]")
    write_json(folder / "key.json", more=1)
    write_json(folder / "size.json", layers=0)
    write_json(folder / "huge.json", layers=500, width=1 << 23)
    write_json(folder / "beyond.json", constant=[[3, 0, 1.0]])
    write_json(folder / "twice.json", constant=[[0, 1, 1.0], [0, 1, 2.0]])
    write_json(folder / "text.json", constant=[[0, 1, "1"]])
    write_json(folder / "print.json", fingerprint=5)
    write_json(folder / "zero.json", constant=[])
    write_json(folder / "large.json", constant=[[0, 1, 10**400]])
    write_json(folder / "narrow.json", width=95)
    (folder / "nan.json").write_text('{"layers": 3, "width": 96, "constant": [[0, 0, NaN]]}')
    return {
        "wide.gguf": "does not fit a model of 3 layers of size 64",
        "long.gguf": "does not fit a model",
        "first.gguf": r"direction.0 .* does not fit a model",
        "nan.gguf": "not finite",
        "zero.gguf": "zero.gguf: all its values are zero at --scale 1",
        "hint.gguf": r"for a model of 'gemma2', and .* is one of llama; .* --any-model",
        "made.gguf": r"was made for another model \(fingerprint 'ffffffffffff'…\) .* --any-model",
        "half.gguf": "direction.1 is not F32",
        "cut.gguf": "truncated|lies outside",
        "text.txt": "is no vector; give a control vector",
        "none.gguf": "none.gguf: cannot be read",
        "name.safetensors": "holds 'shift', not one tensor called constant",
        "half.safetensors": r"constant is float16 \(2, 64\), not a float32 matrix",
        "shape.safetensors": "is for 2 layers of 64 neurons, and .* has 3 of 96",
        "inf.safetensors": "not finite",
        "other.safetensors": "was made for another model",
        "cut.safetensors": "cut.safetensors: is damaged",
        "cut.json": "cut.json: cannot be read",
        "list.json": "is not an object of layers, width, constant",
        "key.json": "is not an object of layers, width, constant",
        "size.json": "layers and width are 0 and 96",
        "huge.json": "layers and width are 500 and 8388608",
        "beyond.json": r"\[3, 0, 1.0\] is not \[layer, neuron, value\] of 3 layers of 96",
        "twice.json": r"\[0, 1, 2.0\] is not .* each named once",
        "text.json": r"\[0, 1, '1'\] is not",
        "print.json": "fingerprint is not a text",
        "zero.json": "all its values are zero",
        "large.json": "not finite",
        "narrow.json": "is for 3 layers of 95 neurons",
        "nan.json": "not finite",
        "tiny.gguf": "is not a control vector",
    }


def test_faulty_vectors_are_refused_in_one_sentence(tiny, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    faults = faulty_vectors(folder)
    (folder / "tiny.gguf").write_bytes(tiny.read_bytes())
    for name, message in faults.items():
        with pytest.raises(NptiError, match=message) as fault:
            bake(folder / name, tmp_path / "o.gguf", tiny)
        assert fault.value.exit_code == 2, name
        assert name in str(fault.value)
        assert "\n" not in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_what_is_said_to_be_for_another_model_can_be_used_all_the_same(tiny, tmp_path):
    faulty_vectors(tmp_path)
    for name in ("hint.gguf", "made.gguf", "other.safetensors"):
        report = bake(tmp_path / name, tmp_path / f"{name}.out", tiny, any_model=True)
        assert report["fidelity"]["kl_vector_base"] > 0.02


def test_models_that_take_no_vector(make_tiny, tiny_checkpoint, tmp_path, vector):
    for model, message in (
        (make_tiny(family="qwen3"), r"no MLP biases for qwen3, so a vector cannot be baked .* \(--control-vector\)"),
        (make_tiny(family="gemma2"), "no MLP biases for gemma2"),
        (tiny_checkpoint, "is a transformers model, and vectors are baked into a GGUF"),
    ):
        with pytest.raises(NptiError, match=message) as fault:
            bake(vector, tmp_path / "o.gguf", model)
        assert fault.value.exit_code == 2
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["v.gguf", "--out", "there.gguf"], "exists already"),
        (["v.gguf"], "--out"),
        (["v.gguf", "--out", "o.gguf", "--scale", "0"], "all its values are zero at --scale 0"),
        (["v.gguf", "--out", "o.gguf", "--scale", "nan"], "not finite at --scale nan"),
        (["v.gguf", "--out", "o.gguf", "--scale", "1e60"], "not finite at --scale 1e+60"),
        (["v.gguf", "--out", "o.gguf", "--scale", "much"], "--scale"),
        (["v.gguf", "--out", "o.gguf", "--set", "verify.prompt=1"], "unknown key"),
    ],
    ids=str,
)
def test_bad_input_on_the_command_line(tiny, tmp_path, vector, cli_environment, arguments, says):
    (tmp_path / "there.gguf").write_text("precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = npti("bake-vector", *arguments, "--model", tiny, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_text() == "precious"
