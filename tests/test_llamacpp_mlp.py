"""MLPs in numpy from a file's own weights, against float64 from gguf-py's dequantisation and against llama.cpp."""

import numpy as np
import pytest
from conftest import random_rule
from graph import nodes
from reference import open_gguf, plain_dequantize
from test_bake import TOKENS, tiny_of
from test_families import ACTIVATIONS
from tolerances import GRAPH_NODES, MLP_FLOAT32

from npti_export.architectures import GGUF_FAMILIES, gguf_family
from npti_export.gguf import mlp as module
from npti_export.gguf.mlp import FileMLP
from npti_export.gguf.shards import first_in, read_model


def weights_of(path):
    """Of one file or of all parts of a split one, float64."""
    paths = sorted(path.parent.glob("*.gguf")) if "-of-" in path.name else [path]
    return {
        tensor.name: plain_dequantize(tensor.data, tensor.tensor_type)
        .astype(np.float64)
        .reshape([int(one) for one in tensor.shape[::-1]])
        for one in paths
        for tensor in open_gguf(one).tensors
    }


def plain_mlp(weights, family, layer, x, rule=None):
    """The rule of the paper in float64, one neuron at a time."""
    get = lambda stem, kind: weights.get(f"blk.{layer}.{stem}.{kind}")  # noqa: E731
    gate_rows, up_rows, down = get("ffn_gate", "weight"), get("ffn_up", "weight"), get("ffn_down", "weight")
    if family.fused:
        gate_rows, up_rows = np.split(up_rows, 2)
    gate, up = x @ gate_rows.T, x @ up_rows.T
    gate = gate if get("ffn_gate", "bias") is None else gate + get("ffn_gate", "bias")
    up = up if get("ffn_up", "bias") is None else up + get("ffn_up", "bias")
    a = ACTIVATIONS[family.activation](gate)
    if rule is not None:
        for neuron in range(a.shape[1]):
            if rule.clamp[layer, neuron]:
                a[:, neuron] = np.minimum(a[:, neuron], 0)
            a[:, neuron] += rule.shift[layer, neuron]
    y = (a * up) @ down.T
    return y if get("ffn_down", "bias") is None else y + get("ffn_down", "bias")


def check(path, layers=(0, 1, 2), width=96):
    header = read_model(path)
    family = gguf_family(header.architecture, path)
    weights, mlp = weights_of(path), FileMLP(header, family)
    rule = random_rule(3, width)
    rng = np.random.default_rng(0)
    hidden = header.require_int(f"{header.architecture}.embedding_length")
    found = []
    for layer in layers:
        x = rng.normal(size=(9, hidden)).astype(np.float32)
        plain = plain_mlp(weights, family, layer, x)
        for one, want in ((None, plain), (rule, plain_mlp(weights, family, layer, x, rule))):
            y = mlp(layer, x, one)
            assert (y.shape, y.dtype) == (x.shape, np.float32)
            np.testing.assert_allclose(y, want, atol=MLP_FLOAT32 * np.abs(want).max())
            np.testing.assert_array_equal(mlp(layer, x, one), y)  # the second time, kept or read again
            found.append(y)
        if rule.shift[layer].any():
            assert np.abs(want - plain).max() > 0.1 * np.abs(plain).max()
    return found


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_types(make_tiny, kind):
    path = tiny_of(make_tiny, kind)
    width = read_model(path).get("llama.feed_forward_length")
    check(path, layers=(0, 1), width=width)


@pytest.mark.parametrize("family", [one.name for one in GGUF_FAMILIES])
def test_every_family(make_tiny, family):
    check(make_tiny(family=family))


def test_biases(make_tiny):
    check(make_tiny(biases=("ffn_gate", "ffn_up", "ffn_down")))
    check(make_tiny(biases=("ffn_down",), seed=4))


def test_split_files(make_tiny):
    path = make_tiny("Q8_0", split=7)
    assert len(list(path.parent.glob("*.gguf"))) > 2
    assert first_in(path.parent) == path
    check(path)


def test_layers_of_different_width(make_tiny):
    check(make_tiny(family="deci", width=(96, 0, 64)), layers=(0, 2))


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "phi3"])
def test_pieces_and_bounded_memory_give_the_same(make_tiny, monkeypatch, kind):
    path = make_tiny(family="phi3") if kind == "phi3" else make_tiny(kind)
    whole = check(path)
    monkeypatch.setattr(module, "_NEURONS", 32)
    pieces = check(path)
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    read_again = check(path)
    for one, two, three in zip(whole, pieces, read_again, strict=True):
        np.testing.assert_array_equal(two, three)
        np.testing.assert_allclose(two, one, atol=MLP_FLOAT32 * np.abs(one).max())


def test_nothing_is_kept_of_a_large_model(make_tiny, monkeypatch):
    path = make_tiny("Q4_1")
    mlp = FileMLP(read_model(path), gguf_family("llama", path))
    mlp(0, np.ones((1, 64), np.float32))
    assert list(mlp._kept) == [0]
    monkeypatch.setattr(module, "_KEPT_BYTES", 4 * 3 * 3 * 96 * 64 - 1)
    mlp = FileMLP(read_model(path), gguf_family("llama", path))
    mlp(0, np.ones((1, 64), np.float32))
    assert not mlp._kept


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_computes_the_same(make_tiny, kind):
    path = make_tiny(kind, biases=("ffn_gate", "ffn_up", "ffn_down"))
    found = dict(nodes(path, TOKENS, ["ffn_norm-1", "ffn_out-1"]))
    y = FileMLP(read_model(path), gguf_family("llama", path))(1, found["ffn_norm-1"])
    tolerance = GRAPH_NODES if kind == "F32" else 0.02  # activations rounded to 8 bits
    np.testing.assert_allclose(y, found["ffn_out-1"], atol=tolerance * np.abs(y).max())
