"""Files with a width for each layer: the uniform file's logits bit for bit, in fewer bytes, and the way back."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_rule
from gguf import GGUFReader
from jobs import main_job, npti
from llama_server import started
from reference import ReferenceLlama, kl
from test_bake import TOKENS, WIDE, llama_logits
from tolerances import KL_TINY_FLOAT

from npti_export.base_file import check_layout
from npti_export.compiler.exact import compile_exact
from npti_export.compiler.program import DenseUnits, MLPProgram
from npti_export.errors import ArchitectureError, GGUFError, ModelError
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import sha256_file
from npti_export.gguf.cursor import ARRAY, INT32, UINT32
from npti_export.gguf.reader import KeyValue, mlp_widths, read_gguf
from npti_export.gguf.shards import named_shards, read_model, shard_paths
from npti_export.models import resolve_model
from npti_export.rule import SteeringRule

# Neurons shifted and clamped in each layer, and the neurons that these become where a clamp takes five. llama.cpp sums
# floats in steps of up to 64 and what is left over one by one (ggml_vec_dot_f32), so widths that are no multiple of 64
# are rounded in another order; hence 64 and 128, not 32.
FEW, NONE, MANY = (10, 8), (0, 0), (60, 12)
ADDED = [64, 0, 128]
WIDTH = 128
K_QUANTS = {"hidden": 256, "width": 512}
PLACES = {
    "tied embedding": {},
    "attention biases": {"attention_biases": True},
    "MLP biases": {"biases": ("ffn_gate", "ffn_up", "ffn_down")},
    "rope_freqs": {"rope_freqs": True},
    "qwen2": {"family": "qwen2"},
    "head sizes": {"keys": (("attention.key_length", 16), ("attention.value_length", 16))},
    "a window that llama ignores": {"keys": (("attention.sliding_window", 4),)},
    "an array of equal widths": {"width": (WIDTH,) * 3},
    "large alignment": {"alignment": 256},
    "half floats": {"kind": "F16"},
    "bfloat16": {"kind": "BF16"},
}


def rule_of(width, counts, seed=0):
    """So many shifts and clamps in each layer."""
    rng = np.random.default_rng(seed)
    shift, clamp = np.zeros((len(counts), width), np.float32), np.zeros((len(counts), width), bool)
    for layer, (shifts, clamps) in enumerate(counts):
        chosen = rng.permutation(width)
        shift[layer, chosen[:shifts]] = rng.uniform(0.2, 1.5, shifts)
        clamp[layer, chosen[shifts : shifts + clamps]] = True
    return SteeringRule(shift, clamp)


def bake(base_path, out, rule, layout):
    base = read_model(base_path)
    check_base(base, layout)
    digests = [sha256_file(part.path) for part in base.parts]
    plan = plan_bake(base, compile_exact(rule, 5), {"trait": "calm"}, digests, layout)
    write_bake(plan, out)
    return plan


def one_by_one(path):
    """Logits of llama.cpp decoding a token at a time, by other kernels than a prompt's."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for token in TOKENS:
        llama.eval([token])
    return llama.scores[: len(TOKENS)].copy()


def both(base, folder, rule):
    """The base baked uniform and ragged, the ragged file stripped; returns the ragged file."""
    paths = {layout: folder / f"{layout}.gguf" for layout in ("uniform", "ragged")}
    plans = {layout: bake(base, path, rule, layout) for layout, path in paths.items()}
    assert paths["ragged"].stat().st_size == plans["ragged"].nbytes < plans["uniform"].nbytes
    uniform, ragged = map(llama_logits, paths.values())
    np.testing.assert_array_equal(ragged, uniform)
    np.testing.assert_array_equal(*map(one_by_one, paths.values()))
    assert kl(ragged, llama_logits(base)) > 0.02
    strip(paths["ragged"], folder / "stripped.gguf", force=False)
    assert (folder / "stripped.gguf").read_bytes() == base.read_bytes()
    return paths["ragged"]


@pytest.mark.parametrize("place", PLACES)
def test_logits_are_those_of_the_uniform_file(make_tiny, tmp_path, place):
    base = make_tiny(**{"width": WIDTH, **PLACES[place]})
    out = both(base, tmp_path, rule_of(WIDTH, (FEW, NONE, MANY)))
    header = read_gguf(out)
    assert header.architecture == "deci"
    assert mlp_widths(header) == [WIDTH + added for added in ADDED]
    assert not [entry.key for entry in header.keys if entry.key.startswith(("llama.", "qwen2."))]
    if "biases" not in PLACES[place]:
        assert "blk.0.ffn_gate.bias" in header.by_name
        assert "blk.1.ffn_gate.bias" not in header.by_name


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_ragged_file_is_the_rule(make_tiny, tmp_path, kind):
    """Against the reference, not only against the uniform file."""
    base = make_tiny(kind, width=WIDTH)
    rule = rule_of(WIDTH, (FEW, NONE, MANY))
    reference, out = ReferenceLlama(base), tmp_path / "ragged.gguf"
    bake(base, out, rule, "ragged")
    want = reference.logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, llama_logits(out))
    limit = KL_TINY_FLOAT if kind == "F32" else 0.1 * kl(want, reference.logits(TOKENS))
    assert error < limit < kl(want, reference.logits(TOKENS))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL"])
def test_blocks_of_32(make_tiny, tmp_path, kind):
    base = make_tiny(kind)
    out = both(base, tmp_path, rule_of(96, ((3, 4), NONE, (30, 11))))
    assert mlp_widths(read_gguf(out)) == [96 + 32, 96, 96 + 96]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256(make_tiny, tmp_path, kind):
    base = make_tiny(kind, **K_QUANTS)
    out = both(base, tmp_path, rule_of(512, (FEW, NONE, (100, 40))))
    assert mlp_widths(read_gguf(out)) == [512 + 256, 512, 512 + 512]


@pytest.mark.parametrize("kind", [kind for kind in WIDE if kind not in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")] + ["MXFP4"])
def test_corrections_are_kept(make_tiny, tmp_path, kind):
    """Below four bits padding works: each layer keeps as much of it as the uniform file has use for."""
    base = make_tiny(kind, **K_QUANTS)
    out = both(base, tmp_path, rule_of(512, ((120, 20), NONE, (300, 40)), seed=1))
    first, none, _ = (width - 512 for width in mlp_widths(read_gguf(out)))
    assert first >= 220 + 220  # each unit and what quantising lost of it
    assert none == 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K"])
def test_units_of_their_own(make_tiny, tmp_path, kind):
    """They stand at the end of the columns, behind idle ones, which are cut out."""
    base, rng = make_tiny(kind, **K_QUANTS), np.random.default_rng(0)
    copying = compile_exact(rule_of(512, (FEW, NONE, (200, 40))), 5)

    def with_own(layer, count):
        up, down = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((count, 256), (256, count)))
        return replace(layer, dense=DenseUnits(np.full(count, 0.5, np.float32), up, down))

    layers = [with_own(layer, count) for layer, count in zip(copying.layers, (20, 7, 300), strict=True)]
    program, paths = MLPProgram(512, tuple(layers)), [tmp_path / layout for layout in ("uniform", "ragged")]
    for path in paths:
        write_bake(plan_bake(read_gguf(base), program, {}, sha256_file(base), path.name), path)
    uniform, ragged = map(llama_logits, paths)
    np.testing.assert_array_equal(ragged, uniform)
    assert kl(ragged, llama_logits(base)) > 0.02
    widths = [mlp_widths(read_gguf(path)) for path in paths]
    assert widths[1][1] <= widths[1][0] < widths[1][2] <= widths[0][2] == widths[0][0]
    strip(paths[1], tmp_path / "stripped", force=False)
    assert (tmp_path / "stripped").read_bytes() == base.read_bytes()


def test_each_layer_is_filled_up_to_its_own_block(make_tiny, tmp_path):
    """As in the mixtures of types that llama.cpp makes, where a layer that fits no superblock has another type."""
    base = make_tiny("Q4_K", **K_QUANTS, kinds=(("blk.0.ffn_down.weight", "Q8_0"),))
    out = both(base, tmp_path, rule_of(512, (FEW, NONE, (5, 5))))
    assert mlp_widths(read_gguf(out)) == [512 + 64, 512, 512 + 256]


def test_rope_factors_still_count(make_tiny, tmp_path):
    """They are a tensor that a runtime could leave out without a word: the same model without them says otherwise."""
    rule, logits = rule_of(WIDTH, (FEW, NONE, MANY)), []
    for factors in (True, False):
        out = tmp_path / f"{factors}.gguf"
        bake(make_tiny(width=WIDTH, rope_freqs=factors), out, rule, "ragged")
        logits.append(llama_logits(out))
    assert kl(*logits) > 1e-3


@pytest.mark.parametrize("steering", [(FEW, FEW, FEW), (NONE, NONE, NONE)], ids=["alike", "none"])
def test_equal_widths_keep_the_architecture(make_tiny, tmp_path, steering):
    base, rule = make_tiny(width=WIDTH), rule_of(WIDTH, steering)
    for layout in ("uniform", "ragged"):
        bake(base, tmp_path / layout, rule, layout)
    assert (tmp_path / "ragged").read_bytes() == (tmp_path / "uniform").read_bytes()
    assert read_gguf(tmp_path / "ragged").architecture == "llama"


@pytest.mark.parametrize("width", [WIDTH, (96, 64, 128)], ids=str)
def test_a_deci_base_stays_one(make_tiny, tmp_path, width):
    base = make_tiny(family="deci", width=width)
    rule = rule_of(64, (FEW, NONE, (33, 5)))
    rule = SteeringRule(*(np.pad(one, ((0, 0), (0, WIDTH - 64))) for one in (rule.shift, rule.clamp)))
    for layout in ("uniform", "ragged"):
        bake(base, tmp_path / layout, rule, layout)
    header = read_gguf(tmp_path / "ragged")
    assert header.architecture == "deci"
    old = mlp_widths(read_gguf(base))
    assert mlp_widths(header) == [old[0] + 64, old[1], old[2] + 64]
    if isinstance(width, tuple):
        assert (tmp_path / "ragged").read_bytes() == (tmp_path / "uniform").read_bytes()
    else:
        np.testing.assert_array_equal(llama_logits(tmp_path / "ragged"), llama_logits(tmp_path / "uniform"))
    strip(tmp_path / "ragged", tmp_path / "stripped", force=False)
    assert (tmp_path / "stripped").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_split_files(make_tiny, tmp_path, family):
    base = make_tiny("Q8_0", family=family, split=6, width=WIDTH)
    rule, count = rule_of(WIDTH, (FEW, NONE, MANY)), len(named_shards(base))
    first = {layout: shard_paths(tmp_path / f"{layout}.gguf", count)[0] for layout in ("uniform", "ragged")}
    for layout, path in first.items():
        bake(base, path, rule, layout)
    np.testing.assert_array_equal(llama_logits(first["ragged"]), llama_logits(first["uniform"]))
    strip(first["ragged"], tmp_path / "stripped.gguf", force=False)
    for old, new in zip(named_shards(base), shard_paths(tmp_path / "stripped.gguf", count), strict=True):
        assert old.read_bytes() == new.read_bytes()


def test_the_default_model(default_model, tmp_path):
    """All its layers differ in width, as they do under the rules of its recipe."""
    counts = [(5 + 3 * layer, 2 * (layer % 10)) for layer in range(30)]
    out = both(default_model, tmp_path, rule_of(1536, counts))
    assert len(set(mlp_widths(read_gguf(out)))) > 3
    old = {tensor.name: tensor for tensor in GGUFReader(default_model).tensors}
    for tensor in GGUFReader(out).tensors:
        if tensor.name in old and "ffn_" not in tensor.name:
            np.testing.assert_array_equal(tensor.data, old[tensor.name].data)


def test_llamacpps_own_server_takes_it(make_tiny, tmp_path):
    """As xllamacpp brings it, which is another version of llama.cpp."""
    base, rule = make_tiny(width=WIDTH), rule_of(WIDTH, (FEW, NONE, MANY))
    answers = []
    for layout in ("uniform", "ragged", None):
        path = base if layout is None else tmp_path / f"{layout}.gguf"
        if layout is not None:
            bake(base, path, rule, layout)
        with started(path) as ask:
            answers.append(ask("How was your day?"))
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("family", ["mistral3", "granite", "minicpm"])
def test_families_that_deci_cannot_say(make_tiny, family):
    base = read_gguf(make_tiny(family=family))
    check_base(base)
    with pytest.raises(ArchitectureError, match=f"all that {family} computes; it works for llama, deci, qwen2"):
        check_base(base, "ragged")


def test_mixtures_are_refused_for_what_they_are(make_tiny):
    with pytest.raises(ArchitectureError, match="its MLPs are experts"):
        check_base(read_gguf(make_tiny(experts=True)), "ragged")


def test_directories_are_judged_before_they_are_converted(tiny_checkpoint):
    source = resolve_model(str(tiny_checkpoint))
    check_layout(source, None, "ragged")
    granite = replace(source, model_type="granite")
    check_layout(granite, None, "uniform")
    with pytest.raises(ArchitectureError, match="all that granite computes"):
        check_layout(granite, None, "ragged")


def altered(base, key, raw):
    """The header with another value for a key, or with one more."""
    keys = [entry for entry in base.keys if entry.key != key]
    return replace(base, keys=(*keys, KeyValue(key, raw, 0)))


def array(kind, values):
    return struct.pack(f"<IIQ{len(values)}I", ARRAY, kind, len(values), *values)


def test_what_only_a_llama_file_may_hold(make_tiny):
    base = read_gguf(make_tiny())
    strange = replace(base, tensors=(*base.tensors, replace(base.tensors[0], name="blk.0.ffn_norm_exps.weight")))
    check_base(strange)
    with pytest.raises(ModelError, match=r"no place for the tensor blk\.0\.ffn_norm_exps\.weight; take --layout unif"):
        check_base(strange, "ragged")
    with pytest.raises(ModelError, match=r"has a key deci\.block_count already"):
        check_base(altered(base, "deci.block_count", struct.pack("<II", UINT32, 3)), "ragged")


@pytest.mark.parametrize("name", ["head_count", "head_count_kv"])
def test_layers_with_other_heads(make_tiny, name):
    """deci would take layers with no heads, or no heads for keys, for another kind of layer."""
    base, key = read_gguf(make_tiny()), f"llama.attention.{name}"
    for kind in (UINT32, INT32):
        check_base(altered(base, key, array(kind, [2, 2, 2])), "ragged")
    for raw in (array(INT32, [2, 2, 4]), array(INT32, [0, 0, 0]), array(INT32, [2, 2]), struct.pack("<II", UINT32, 0)):
        with pytest.raises(GGUFError, match=key.replace(".", r"\.")):
            check_base(altered(base, key, raw), "ragged")


def test_a_ragged_file_that_lies_about_its_base_is_not_stripped(make_tiny, tmp_path):
    """As if it had been a qwen2 file: its rows would be put into an order that they never had."""
    base, out = make_tiny(width=WIDTH), tmp_path / "ragged.gguf"
    bake(base, out, rule_of(WIDTH, (FEW, NONE, MANY)), "ragged")
    data = out.read_bytes()
    place = data.index(b"npti.base.architecture") + len(b"npti.base.architecture") + 12
    assert data[place : place + 5] == b"llama"
    out.write_bytes(data[:place] + b"qwen2" + data[place + 5 :])
    with pytest.raises(GGUFError, match="cannot be restored"):
        strip(out, tmp_path / "base.gguf", force=False)
    assert not (tmp_path / "base.gguf").exists()


@pytest.fixture(scope="module")
def job(make_tiny, tmp_path_factory):
    """The main job with --layout ragged: the folder, the base, the environment."""
    import os

    folder, base = tmp_path_factory.mktemp("ragged"), make_tiny(width=WIDTH)
    environment = {**os.environ, "NPTI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = main_job(base, "r.gguf", "--layout", "ragged", "--report", "r.json", "--threads", "1")
    done = npti(*arguments, environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, base, environment, done.stdout


def test_the_report_says_how_wide_the_layers_are(job):
    folder, _, _, shown = job
    report = json.loads((folder / "r.json").read_text())
    header, neurons = read_gguf(folder / "r.gguf"), report["neurons"]
    added = [width - WIDTH for width in mlp_widths(header)]
    assert len(set(added)) > 1
    assert header.architecture == "deci"
    assert (neurons["extra_width"], neurons["extra_width_mean"]) == (max(added), round(np.mean(added), 1))
    assert report["recipe"]["compile"]["layout"] == "ragged"
    assert f"+ {max(added)} at most" in shown


def test_a_ragged_file_is_verified_inspected_and_used_again(job, tmp_path):
    folder, base, environment, _ = job

    def run(*arguments):
        done = npti(*arguments, environment=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "faithful" in run("verify", folder / "r.gguf", "--threads", "1")
    about = run("inspect", folder / "r.gguf")
    assert "deci" in about
    assert "3 values" in about
    run("strip", folder / "r.gguf", "--out", "base.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == base.read_bytes()
    run("--from", folder / "r.gguf", "--out", "again.gguf", "--threads", "1")
    run("--from", "again.gguf", "--layout", "uniform", "--out", "u.gguf", "--threads", "1")
    assert read_gguf(tmp_path / "again.gguf").architecture == "deci"
    assert read_gguf(tmp_path / "u.gguf").architecture == "llama"
    np.testing.assert_array_equal(llama_logits(tmp_path / "again.gguf"), llama_logits(tmp_path / "u.gguf"))


def test_a_ragged_file_is_attached(make_tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    import npti_export
    from npti_export.export.metadata import steering_metadata
    from npti_export.models import gguf_source
    from npti_export.rule_io import Provenance, SavedRule

    base, rule = make_tiny(), random_rule(3, 96)
    source = gguf_source(base)
    about = Provenance("calm", 1.0, "{}", "tiny", source.model_type, source.identity, None)
    plan = plan_bake(
        read_gguf(base),
        compile_exact(rule, 5),
        steering_metadata(SavedRule(rule, about), base),
        sha256_file(base),
        "ragged",
    )
    write_bake(plan, tmp_path / "r.gguf")
    assert read_gguf(tmp_path / "r.gguf").architecture == "deci"
    model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype="float32").eval()
    import torch

    ids = torch.tensor([TOKENS])
    with torch.no_grad(), npti_export.attach(model, tmp_path / "r.gguf"):
        attached = model(ids).logits[0].numpy()
    assert kl(llama_logits(tmp_path / "r.gguf"), attached) < KL_TINY_FLOAT
    with torch.no_grad():
        assert kl(attached, model(ids).logits[0].numpy()) > 0.02


def test_what_ragged_cannot_do_is_said_at_once(make_tiny, job, tmp_path):
    _, base, environment, _ = job
    cases = {
        "all that granite computes": main_job(make_tiny(family="granite"), "x.gguf", "--layout", "ragged"),
        "--layout says how wide the layers of a GGUF are; it goes with --format gguf": main_job(
            base, "x", "--format", "peft", "--layout", "ragged"
        ),
        "'compile.layout': Input should be 'uniform' or 'ragged'": main_job(
            base, "x.gguf", "--set", "compile.layout=narrow"
        ),
    }
    for message, arguments in cases.items():
        done = npti(*arguments, environment=environment, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())
