"""Mixtures of experts in llama.cpp: counted, steered and approximated, against a model written out in float64."""

import json

import numpy as np
import pytest
from conftest import random_rule
from families import EXPERT_ROWS, EXPERTS, EXPERTS_USED, MIXTURES
from gguf import GGUFReader
from graph import nodes
from jobs import main_job, npti
from reference import ReferenceLlama, kl
from test_bake import TOKENS
from tolerances import GRAPH_NODES, KV_FLOAT16

from npti_export.architectures import GGUF_MIXTURES
from npti_export.constant import mean_effect
from npti_export.errors import ArchitectureError, GGUFError
from npti_export.export.control_vector import read_directions
from npti_export.gguf.experts import experts_of
from npti_export.gguf.reader import read_gguf
from npti_export.models import gguf_source
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

NAMES = [row.name for row in GGUF_MIXTURES]
WIDTH = EXPERTS * EXPERT_ROWS
RULE = random_rule(3, WIDTH, per_layer=(40, 60))
EXCHANGES = [Exchange((5, 9, 40, 77), (33, 60, 61)), Exchange((8, 8, 120), (7, 300, 301, 302))]
# A difference of float32 sums in another order and of a float16 KV cache, on logits of size one.
KL_SAME = 1e-5


@pytest.fixture(params=NAMES)
def mixture(request, make_tiny):
    return make_tiny(family=request.param, experts=True)


def steer(runtime):
    def see(layer, parts):
        parts.product[:] += parts.change(RULE, layer, "silu")
        return True

    return runtime.run_experts([TOKENS], see)


def test_there_is_a_tiny_file_of_every_mixture():
    assert list(MIXTURES) == NAMES


def test_a_mixture_is_identified(mixture):
    source = gguf_source(mixture)
    assert (source.shape.layers, source.shape.width, source.shape.experts) == (3, WIDTH, EXPERTS)
    assert source.family.mixture
    assert not source.bakeable


def test_counts_against_the_graphs_own_inputs(mixture):
    """Router and gates computed here from the input of each layer's experts and the file's weights."""
    w = {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(mixture).tensors}
    active, routed = np.zeros((3, EXPERTS, EXPERT_ROWS), int), np.zeros((3, EXPERTS), int)
    for exchange in EXCHANGES:
        found = dict(nodes(mixture, exchange.tokens, [f"ffn_norm-{layer}" for layer in range(3)]))
        for layer in range(3):
            stem = f"blk.{layer}.ffn_gate_"
            gates = w[f"{stem}exps.weight"]
            for token in range(len(exchange.prompt), len(exchange.tokens) - 1):
                x = found[f"ffn_norm-{layer}"][token].astype(np.float64)
                for expert in np.argsort(-(w[f"{stem}inp.weight"] @ x))[:EXPERTS_USED]:
                    routed[layer, expert] += 1
                    active[layer, expert] += gates[expert] @ x > 0
    with LlamaCppRuntime(mixture, source=gguf_source(mixture)) as runtime:
        stats = runtime.activation_stats(EXCHANGES)
    assert stats.tokens == 5
    np.testing.assert_array_equal(stats.routed, routed)
    np.testing.assert_array_equal(stats.active, active.reshape(3, WIDTH))
    assert stats.histogram.sum() == active.sum() > 100


def test_counting_while_answering_is_counting_afterwards(mixture):
    source = gguf_source(mixture)
    with LlamaCppRuntime(mixture, sequences=3, source=source) as runtime:
        prompts = [runtime.encode(chat("Be calm.", text)) for text in ("Hello", "What is it?", "Why?")]
        (first, second), answers = runtime.observe(prompts, [0, 1, 1], max_new_tokens=6, repetition_penalty=1.1)
        exchanges = runtime.generate(prompts, max_new_tokens=6, repetition_penalty=1.1)
        after = [runtime.activation_stats(exchanges[:1]), runtime.activation_stats(exchanges[1:])]
    for found, want in zip((first, second), after, strict=True):
        assert found.tokens == want.tokens > 3
        assert np.abs(found.routed - want.routed).sum() <= 2  # a token at the edge of two experts
        assert np.abs(found.active - want.active).sum() <= 0.02 * want.active.sum()
    np.testing.assert_array_equal(answers.active[1:].sum(0), second.active)
    assert first.routed.sum() == 3 * EXPERTS_USED * first.tokens


def test_the_rule_against_float64(make_tiny):
    path = make_tiny(family="llama", experts=True)
    with LlamaCppRuntime(path, source=gguf_source(path)) as runtime:
        found, base = steer(runtime), runtime.run_experts([TOKENS], lambda *_: False)
        np.testing.assert_array_equal(runtime.run_experts([TOKENS], lambda *_: False), base)
    model = ReferenceLlama(path)
    want = model.logits(TOKENS, RULE.shift, RULE.clamp)
    assert kl(model.logits(TOKENS), base) < KL_SAME
    assert kl(want, found) < KL_SAME < 0.01 < kl(want, base)


def test_mean_effect_against_float64(make_tiny):
    path = make_tiny(family="llama", experts=True)
    model, inputs, sums = ReferenceLlama(path), [], np.zeros((3, 64))
    plain, zeros = model.experts, np.zeros((EXPERTS, EXPERT_ROWS))

    def experts(x, layer, shift, clamp):
        steered = plain(x, layer, shift, clamp)
        inputs.append(steered - plain(x, layer, zeros, zeros.astype(bool)))
        return steered

    model.experts = experts
    for exchange in EXCHANGES:
        inputs.clear()
        model.logits(exchange.tokens, RULE.shift, RULE.clamp)
        sums += [change[len(exchange.prompt) :].sum(0) for change in inputs]
    with LlamaCppRuntime(path, source=gguf_source(path)) as runtime:
        found = mean_effect(runtime, RULE, EXCHANGES)
    np.testing.assert_allclose(found, sums / 7, atol=KV_FLOAT16)
    assert np.abs(found[:2]).max() > 0.05


def test_the_nodes_meet_in_the_output(mixture):
    """What a pass hands over is what the experts add up to, with the down projections of the file."""
    w = {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(mixture).tensors}
    found = []

    def see(layer, parts):
        if layer == 1:
            found.append(
                sum(
                    np.einsum(
                        "t,tn,thn->th",
                        parts.weights[:, k],
                        parts.product[:, k],
                        w["blk.1.ffn_down_exps.weight"][parts.experts[:, k]],
                    )
                    for k in range(EXPERTS_USED)
                )
            )
            a = parts.gate / (1 + np.exp(-parts.gate))
            np.testing.assert_allclose(parts.product, a * parts.up, atol=GRAPH_NODES)
        return False

    with LlamaCppRuntime(mixture, source=gguf_source(mixture)) as runtime:
        runtime.run_experts([TOKENS], see)
    want = nodes(mixture, TOKENS, ["ffn_moe_out-1"])[-1][1]  # so is called a part of the sum, too
    np.testing.assert_allclose(found[0], want, atol=GRAPH_NODES)
    assert np.abs(want).max() > 10 * GRAPH_NODES


@pytest.mark.parametrize(("family", "kind"), [("llama", "F32"), ("qwen3moe", "Q8_0")])
def test_a_job_makes_a_control_vector(family, kind, make_tiny, tmp_path, cli_environment):
    model = make_tiny(kind, family=family, experts=True)
    job = main_job(model, "v.gguf", "--format", "control-vector", "--report", "r.json", "--save-profile", "p")
    done = npti(*job, environment=cli_environment, cwd=tmp_path)
    if done.returncode == 3:  # a random model: its constant part may be worth nothing, which must be said
        assert "not delivered" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        fidelity = json.loads((tmp_path / "r.json").read_text())["fidelity"]
        assert fidelity["kl_rule_artifact"] < fidelity["kl_rule_base_file"] == fidelity["limit"]
    directions = read_directions(tmp_path / ("v.gguf.rejected" if done.returncode else "v.gguf"), 3, 64)
    assert np.abs(directions).max() > 0
    done = npti(*main_job(model, "m.gguf"), environment=cli_environment, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "m.gguf").exists()) == (2, False)
    assert "its MLPs are experts" in done.stderr
    assert "--format control-vector" in done.stderr


def test_mixtures_that_are_not_understood_are_refused(make_tiny, tmp_path):
    from gguf import GGUFWriter

    with pytest.raises(ArchitectureError, match="'deepseek2' are not supported; supported are those of llama"):
        writer = GGUFWriter(tmp_path / "a.gguf", "deepseek2")
        writer.add_expert_count(4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        gguf_source(tmp_path / "a.gguf")
    good = make_tiny(family="qwen3moe", experts=True)
    for old, new, kind, match in (
        (b"blk.1.ffn_gate_exps.weight", b"blk.1.ffn_gate_shex.weight", GGUFError, "ffn_gate_exps.weight is missing"),
        (b"blk.2.ffn_norm.weight", b"blk.2.ffn_gate.weight", ArchitectureError, "layer 2 has an MLP that every token"),
    ):
        damaged = tmp_path / "b.gguf"
        damaged.write_bytes(good.read_bytes().replace(old, new))
        with pytest.raises(kind, match=match):
            gguf_source(damaged)


def test_the_number_of_experts_used_must_be_possible(make_tiny, tmp_path):
    data = make_tiny(family="qwen3moe", experts=True).read_bytes()
    key = b"qwen3moe.expert_used_count"
    place = data.index(key) + len(key) + 4
    (tmp_path / "x.gguf").write_bytes(data[:place] + (7).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(GGUFError, match="to 7 of 6 experts"):
        experts_of(read_gguf(tmp_path / "x.gguf"))
