"""Programs with all their parts, in stock llama.cpp and stock transformers, against float64; and out again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from plain_rule import logits
from programs import PARTS, ProgramLlama, random_program, without
from reference import ReferenceLlama, kl, open_gguf
from test_bake import TOKENS, llama_logits, tiny_of
from test_bake_families import BIASES
from test_columns import decoded
from tolerances import COLUMNS, KL_TINY_BFLOAT16, KL_TINY_FLOAT, KL_TINY_PROGRAM, KL_TINY_QUANTISED_OTHERS
from transformers import AutoConfig, AutoModelForCausalLM

from npti_export.compiler.layout import arrange
from npti_export.compiler.program import DenseUnits, MLPProgram
from npti_export.errors import GGUFError, ModelError, ProfileError
from npti_export.export.checkpoint import directory_weights, plan_checkpoint, write_checkpoint
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import sha256_file
from npti_export.gguf.blocks import type_id_of
from npti_export.gguf.columns import granule, is_codebook, quantise_columns
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.gguf.shards import read_model, shard_paths

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "MXFP4", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ1_M", "NVFP4"]


def hidden_of(base):
    header = read_gguf(base)
    return header.require_int(f"{header.architecture}.embedding_length")


def bake_program(base_path, out, program):
    base = read_model(base_path)
    check_base(base)
    plan = plan_bake(base, program, {}, [sha256_file(part.path) for part in base.parts])
    write_bake(plan, out)
    return plan


def check(base, folder, program, limit=KL_TINY_FLOAT):
    """Bakes, compares with float64, strips; returns the steered file."""
    out = folder / "steered.gguf"
    bake_program(base, out, program)
    want, plain = ProgramLlama(base, program).logits(TOKENS), ReferenceLlama(base).logits(TOKENS)
    error = kl(want, llama_logits(out))
    assert error < limit
    assert kl(want, plain) > max(0.02, 4 * error)
    strip(out, folder / "stripped.gguf", force=False)
    assert (folder / "stripped.gguf").read_bytes() == base.read_bytes()
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_all_parts_at_once(make_tiny, tmp_path, kind):
    base = tiny_of(make_tiny, kind)
    program = random_program(mlp_widths(read_gguf(base)), hidden_of(base))
    out = check(base, tmp_path, program, KL_TINY_PROGRAM.get(kind, KL_TINY_QUANTISED_OTHERS))
    old, new = open_gguf(base), {tensor.name: tensor for tensor in open_gguf(out).tensors}
    for tensor in old.tensors:
        was, now = tensor.data.view(np.uint8), new[tensor.name].data.view(np.uint8)
        assert new[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(now[: was.shape[0], : was.shape[1]] if was.ndim > 1 else now, was)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_there(tiny, tmp_path, part):
    """One part alone is exact, and all parts together are another model without it."""
    alone = random_program((96,) * 3, 64, parts=(part,))
    out = check(tiny, tmp_path, alone)
    header = read_gguf(out)
    assert header.get("llama.feed_forward_length") == (128 if part in ("copied", "dense") else 96)
    whole = random_program((96,) * 3, 64)
    bake_program(tiny, tmp_path / "whole.gguf", whole)
    lacking = ProgramLlama(tiny, without(whole, part)).logits(TOKENS)
    assert kl(lacking, llama_logits(tmp_path / "whole.gguf")) > 100 * KL_TINY_FLOAT


@pytest.mark.parametrize("parts", [("biased",), ("down_bias",), ("biased", "down_bias")], ids="+".join)
def test_biases_alone_leave_every_weight_alone(make_tiny, tmp_path, parts):
    base = make_tiny("Q4_K", hidden=256, width=512, layers=2)
    out = check(base, tmp_path, random_program((512,) * 2, 256, parts=parts), KL_TINY_QUANTISED_OTHERS)
    old, new = GGUFReader(base), GGUFReader(out)
    found = {tensor.name: tensor for tensor in new.tensors}
    for tensor in old.tensors:
        assert found.pop(tensor.name).data.tobytes() == tensor.data.tobytes()
    stems = {"biased": "ffn_gate", "down_bias": "ffn_down"}
    assert set(found) == {f"blk.{layer}.{stems[part]}.bias" for layer in range(2) for part in parts}
    assert new.fields["llama.feed_forward_length"].contents() == 512


@pytest.mark.parametrize("family", ["llama", "mistral3", "granite", "minicpm", "deci", "qwen2"])
def test_every_family_that_bakes(make_tiny, tmp_path, family):
    """Granite and minicpm scale what the MLP puts out, down bias included."""
    base = make_tiny(family=family)
    names = [tensor.name for tensor in read_gguf(check(base, tmp_path, random_program((96,) * 3, 64))).tensors]
    assert "blk.0.ffn_down.bias" in names
    assert "blk.0.ffn_up.bias" not in names


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("biases", [("ffn_gate",), ("ffn_up",), ("ffn_down",), BIASES], ids="+".join)
def test_mlps_with_biases_of_their_own(make_tiny, tmp_path, family, biases):
    """What cannot be subtracted again is kept, and only that."""
    base = make_tiny(family=family, biases=biases)
    out = check(base, tmp_path, random_program((96,) * 3, 64))
    kept = [entry.key for entry in read_gguf(out).keys if entry.key.startswith("npti.base.kept.")]
    wanted = [stem for stem in ("ffn_gate", "ffn_down") if stem in biases]
    assert sorted(kept) == sorted(f"npti.base.kept.blk.{n}.{stem}.bias" for n in range(3) for stem in wanted)
    bake_program(base, tmp_path / "copied.gguf", random_program((96,) * 3, 64, parts=("copied",)))
    kept = [entry.key for entry in read_gguf(tmp_path / "copied.gguf").keys if entry.key.startswith("npti.base.kept.")]
    assert kept == []


def test_kept_biases_of_another_size(make_tiny, tmp_path):
    base, out = make_tiny(biases=BIASES), tmp_path / "steered.gguf"
    bake_program(base, out, random_program((96,) * 3, 64))
    gate, down, other = (f"npti.base.kept.blk.0.ffn_{one}.bias".encode() for one in ("gate", "down", "none"))
    out.write_bytes(out.read_bytes().replace(gate, other).replace(down, gate).replace(other, down))
    with pytest.raises(
        GGUFError, match=r"kept.blk.0.ffn_\w+.bias has \d+ bytes where \d+ are due; the file is damaged"
    ):
        strip(out, tmp_path / "base.gguf", force=False)


def test_layers_with_a_width_each(make_tiny, tmp_path):
    """Those of deci; a layer that gets biases only keeps its width."""
    base = make_tiny(family="deci", width=(96, 0, 64, 32), layers=4)
    program = random_program((96, 0, 64, 32), 64)
    layers = [*program.layers[:3], random_program((96, 0, 64, 32), 64, parts=("biased", "down_bias")).layers[3]]
    out = check(base, tmp_path, MLPProgram(96, tuple(layers)))
    assert mlp_widths(read_gguf(out)) == [128, 0, 96, 32]
    where_none_is = replace(program.layers[1], down_bias=np.ones(64, np.float32))
    with pytest.raises(ModelError, match="layer 1 has no MLP, and the rule steers it"):
        bake_program(base, tmp_path / "x.gguf", MLPProgram(96, (layers[0], where_none_is, *layers[2:])))


def test_split_files(make_tiny, tmp_path):
    """Biases go beside the weights they belong to; a bias of the base stays in its own shard."""
    base = make_tiny(split=7, biases=("ffn_down",))
    single = make_tiny(biases=("ffn_down",))
    program, out = random_program((96,) * 3, 64), tmp_path / "s-00001-of-00005.gguf"
    count = len(read_model(base).parts)
    out = shard_paths(tmp_path / "s.gguf", count)[0]
    bake_program(base, tmp_path / "s.gguf", program)
    assert kl(ProgramLlama(single, program).logits(TOKENS), llama_logits(out)) < KL_TINY_FLOAT
    strip(out, tmp_path / "base.gguf", force=False)
    for was, now in zip(read_model(base).parts, shard_paths(tmp_path / "base.gguf", count), strict=True):
        assert now.read_bytes() == was.path.read_bytes()


def test_streamed_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    program = random_program((96,) * 3, 64)
    bake_program(tiny, tmp_path / "a.gguf", program)
    monkeypatch.setattr("npti_export.export.gguf._AHEAD_BYTES", 1)
    monkeypatch.setattr("npti_export.export.widen.CHUNK", 1000)
    bake_program(tiny, tmp_path / "b.gguf", program)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints(tiny, tiny_checkpoint, tmp_path, dtype):
    """The same weights as the GGUF, so the same reference."""
    source = tiny_checkpoint
    if dtype != "float32":
        source = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained(source)
    program = random_program((96,) * 3, 64)
    plan = plan_checkpoint(AutoConfig.from_pretrained(source), directory_weights(source), program)
    (tmp_path / "out").mkdir()
    write_checkpoint(plan, tmp_path / "out")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), torch.tensor([TOKENS]))[0]
    reference = ProgramLlama(tiny, program)
    if dtype != "float32":  # its own weights are rounded, too
        rounded = {key: torch.from_numpy(one).bfloat16().double().numpy() for key, one in reference.tensors.items()}
        reference.tensors = rounded
    want = reference.logits(TOKENS)
    assert kl(want, got) < (KL_TINY_FLOAT if dtype == "float32" else KL_TINY_BFLOAT16)
    for part in PARTS:
        reference.program = without(program, part)
        assert kl(reference.logits(TOKENS), got) > 100 * KL_TINY_FLOAT


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "IQ2_XXS"])
def test_dense_columns_are_last_and_corrected(name):
    kind = type_id_of(name)
    layer = random_program((300,), 48, parts=("copied", "dense"), dense=20).layers[0]
    columns = np.random.default_rng(0).normal(size=(48, 300)).astype(np.float32) / 8
    errors = []
    for correct in (True, False):
        one = arrange(layer, 256, granule(kind), is_codebook(kind), correct=correct)
        assert one.units == 256
        assert one.copied % granule(kind) == 0
        np.testing.assert_array_equal(one.dense.down[:, :20], layer.dense.down)
        np.testing.assert_array_equal(one.dense.up[:20], layer.dense.up)
        found = decoded(
            quantise_columns(np.concatenate([columns[:, one.source], one.dense.down], axis=1), one.corrects, kind), name
        )
        total = np.zeros((48, 20))  # what stands beside each row of its own, all its units together
        for place in np.flatnonzero(one.dense.up.any(axis=1)):
            total[:, place if place < 20 else one.corrects[one.copied + place] - one.copied] += found[
                :, one.copied + place
            ]
        errors.append(np.linalg.norm(total - layer.dense.down) / np.linalg.norm(layer.dense.down))
        assert correct == (one.corrects is not None)
    plain, corrected = COLUMNS[name]
    assert errors[0] < 1.5 * corrected
    assert errors[0] < errors[1] / 1.5
    assert errors[1] < 1.5 * plain


def test_dense_columns_without_room_for_a_block_of_their_own():
    layer = random_program((300,), 48, parts=("copied", "dense"), dense=20).layers[0]
    one = arrange(layer, 256, 256, False)
    assert (one.copied, one.dense.units, one.corrects) == (236, 20, None)
    np.testing.assert_array_equal(one.source[:20], layer.source)
    assert not one.gate_bias[20:].any()


def test_programs_that_cannot_be(tiny, tmp_path):
    program = random_program((96,) * 3, 64)
    layer = program.layers[0]
    with pytest.raises(ProfileError, match="not finite"):
        replace(layer, down_bias=np.full(64, np.nan, np.float32))
    with pytest.raises(ProfileError, match="switches off"):
        replace(layer, biased=layer.off[:1], bias=np.ones(1, np.float32))
    with pytest.raises(ProfileError, match="do not go together"):
        DenseUnits(np.ones(2, np.float32), np.ones((2, 64), np.float32), np.ones((64, 3), np.float32))
    for more in (
        {"down_bias": np.ones(32, np.float32)},
        {"dense": random_program((96,), 32).layers[0].dense, "down_bias": None},
    ):
        with pytest.raises(ModelError, match="has 64 hidden values, and the rule for layer 0 has 32"):
            bake_program(tiny, tmp_path / "x.gguf", MLPProgram(96, (replace(layer, **more), *program.layers[1:])))
    beyond = replace(layer, biased=np.array([99]), bias=np.ones(1, np.float32))
    with pytest.raises(ModelError, match="layer 0 has 96 neurons, and the rule steers one beyond"):
        bake_program(tiny, tmp_path / "x.gguf", MLPProgram(96, (beyond, *program.layers[1:])))
