"""Every family of GGUF files in the table, as a tiny random one run by stock llama.cpp: its claims hold there."""

import json

import numpy as np
import pytest
from families import LAYOUTS
from gguf import GGUFReader
from graph import nodes
from test_bake import TOKENS
from tolerances import GRAPH_NODES

from npti_export.architectures import GGUF_FAMILIES, gguf_family
from npti_export.errors import ArchitectureError
from npti_export.export.gguf import check_base
from npti_export.gguf.reader import read_gguf
from npti_export.models import gguf_source, resolve_model

ACTIVATIONS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "gelu_pytorch_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
}
NAMES = [family.name for family in GGUF_FAMILIES]


def test_there_is_a_tiny_file_of_every_family():
    assert list(LAYOUTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_nodes_are_what_the_table_says(make_tiny, name):
    """From the named input and the file's weights, the MLP computed here gives the named gate and output."""
    family, path = gguf_family(name, "x"), make_tiny(family=name)
    layer = 1
    wanted = [f"{node}-{layer}" for node in (family.mlp_input, family.gate, family.product, family.mlp_output)]
    found = nodes(path, TOKENS, wanted)
    assert [node for node, _ in found] == wanted
    (x, gate, product, output) = (values.astype(np.float64) for _, values in found)
    w = {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(path).tensors}
    up = w[f"blk.{layer}.ffn_up.weight"]
    stacked = up if family.fused else w[f"blk.{layer}.ffn_gate.weight"]
    np.testing.assert_allclose(gate, x @ stacked.T, atol=GRAPH_NODES)
    assert gate.shape == (len(TOKENS), 192 if family.fused else 96)
    g, up = gate[:, :96], up[96:] if family.fused else up
    entering = ACTIVATIONS[family.activation](g) * (x @ up.T)
    np.testing.assert_allclose(product, entering, atol=GRAPH_NODES * max(1, np.abs(entering).max()))
    want = entering @ w[f"blk.{layer}.ffn_down.weight"].T
    np.testing.assert_allclose(output, want, atol=GRAPH_NODES * max(1, np.abs(want).max()))
    assert np.abs(want).max() > 10 * GRAPH_NODES


@pytest.mark.parametrize("name", NAMES)
def test_biases_are_loaded_and_used_where_the_table_says(make_tiny, name):
    """A family that is baked as itself computes with biases; llama.cpp refuses the tensors in files of the others."""
    path = make_tiny(family=name, biases=("ffn_gate", "ffn_up", "ffn_down"), seed=3)
    if gguf_family(name, "x").bake != "itself":
        with pytest.raises(ValueError, match="cannot load"):
            nodes(path, TOKENS, [])
        return
    found = dict(nodes(path, TOKENS, ["ffn_norm-1", "ffn_gate_b-1", "ffn_out-1"]))
    w = {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(path).tensors}
    x = found["ffn_norm-1"].astype(np.float64)
    gate, up, down = (
        lambda v, stem=stem: v @ w[f"blk.1.{stem}.weight"].T + w[f"blk.1.{stem}.bias"]
        for stem in ("ffn_gate", "ffn_up", "ffn_down")
    )
    np.testing.assert_allclose(found["ffn_gate_b-1"], gate(x), atol=GRAPH_NODES)
    np.testing.assert_allclose(found["ffn_out-1"], down(ACTIVATIONS["silu"](gate(x)) * up(x)), atol=GRAPH_NODES)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_identified(make_tiny, name):
    family, path = gguf_family(name, "x"), make_tiny(family=name)
    source = gguf_source(path)
    assert (source.family, source.model_type, source.activation) == (family, family.model_type, family.activation)
    assert (source.shape.layers, source.shape.width, source.shape.hidden) == (3, 96, 64)
    assert source.bakeable == (family.bake is not None)
    assert gguf_source(make_tiny(family=name, seed=1)).fingerprint != source.fingerprint
    if family.bake is None:
        with pytest.raises(ArchitectureError, match=rf"GGUF of {name}: .*--format control-vector"):
            check_base(read_gguf(path))
    if family.activation != "silu":
        with pytest.raises(ArchitectureError, match=r"its activation is GELU.*--format control-vector"):
            source.check_compilable()


def test_layers_of_different_width(make_tiny):
    path = make_tiny(family="deci", width=(96, 0, 64))
    assert gguf_source(path).shape.width == 96
    assert [values.shape[1] for _, values in nodes(path, TOKENS, ["ffn_gate-0", "ffn_gate-2"])] == [96, 64]


# norm weights: names in a transformers checkpoint are those of the table, the file is made as the converter makes it
TRANSFORMERS = [family for family in GGUF_FAMILIES if family.architecture.model_types != (family.name,)] + [
    family for family in GGUF_FAMILIES if family.name in ("llama", "qwen2", "gemma", "gemma2", "olmo2")
]


@pytest.mark.parametrize("family", {one.name: one for one in TRANSFORMERS}.values(), ids=lambda one: one.name)
def test_a_checkpoint_and_its_gguf_have_one_fingerprint(make_tiny, tiny_runtime, tmp_path, family):
    """bfloat16 weights down to 1e-7, which adding 1 in float32 rounds: the converter does that to gemma's norms."""
    import torch
    from safetensors.torch import save_file

    row, rng = family.architecture, np.random.default_rng(0)
    path = tmp_path / "model.gguf"
    path.write_bytes(make_tiny(family=family.name).read_bytes())
    header, state = read_gguf(path), {}
    pairs = [
        (f"{row.layers}.{layer}.{theirs}.weight", f"blk.{layer}.{ours}.weight")
        for layer in range(3)
        for theirs, ours in zip(row.norms, family.norms, strict=True)
    ]
    with path.open("rb+") as stream:
        for theirs, ours in [*pairs, (row.final_norm, "output_norm.weight")]:
            exponents = rng.uniform(-7, 0.5, 64)
            weight = torch.tensor(rng.choice([-1, 1], 64) * 10.0**exponents).to(torch.bfloat16)
            state[theirs] = weight
            stream.seek(header.by_name[ours].offset)
            stream.write((weight.float() + row.norm_offset).numpy().tobytes())
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": family.model_type, "num_hidden_layers": 3, "intermediate_size": 96, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    directory, file = resolve_model(str(tmp_path)), gguf_source(path)
    assert directory.identity == file.identity
    assert directory.identity.bfloat16 == directory.identity.float32  # what a model loaded in bfloat16 is known by


def test_unknown_families_are_named():
    with pytest.raises(ArchitectureError, match="'rwkv7' is not supported; supported are llama, mistral3"):
        gguf_family("rwkv7", "x")
