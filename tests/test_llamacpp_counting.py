"""Statistics of gate activations from llama.cpp, against a float64 forward pass and against transformers."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from families import write_tiny
from gguf import GGUFReader
from graph import nodes
from reference import ReferenceLlama
from test_families import ACTIVATIONS
from tolerances import GATE_LLAMACPP, LOG_BIN, RATES_CORRELATION, SIGNS_QUANTISED, SUMS_FLOAT64

from npti_export.activations import activate
from npti_export.architectures import gguf_family
from npti_export.errors import ArchitectureError, ModelError
from npti_export.models import ModelShape, gguf_source
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.counting import GateCounter, bin_of_bits
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.stats import BIN_COUNT, EDGES, AnswerCounts, PairSpread

QUESTIONS = ["Hi", "Why?", "What do you do when it rains all day?", "Name three birds.", "Where is the sea?"]
GROUPS = [0, 1, 1, 0, 1]
ANSWERS = {"max_new_tokens": 12, "repetition_penalty": 1.1}


def opened(path, sequences=3, **settings):
    return LlamaCppRuntime(path, Settings(threads=1, **settings), sequences=sequences, source=gguf_source(path))


def prompts_of(runtime):
    return [runtime.encode(chat("You are calm.", question)) for question in QUESTIONS]


def check(stats, gates, activation="silu"):
    """Against pre-activations of each answer, ``[answers][layers, tokens, width]``, those near 0 or an edge aside."""
    act = ACTIVATIONS[activation]
    everything = np.concatenate(gates, axis=1)
    unsure = (np.abs(everything) < GATE_LLAMACPP).sum(1)
    assert unsure.sum() < 0.02 * everything.size
    active = (everything > 0).sum(1)
    assert stats.tokens == everything.shape[1] > 0
    assert (np.abs(stats.active - active) <= unsure).all()
    assert active.sum() > 0.3 * everything.size
    a = act(everything)
    np.testing.assert_allclose(stats.largest, a.max(1).clip(0), atol=GATE_LLAMACPP)
    # how many lie above each edge: all that are clearly above it, none that are clearly below
    above = stats.histogram[..., ::-1].cumsum(-1)[..., ::-1]
    np.testing.assert_array_equal(above[..., 0], stats.active)
    low, high = a * (1 - LOG_BIN) - GATE_LLAMACPP, a * (1 + LOG_BIN) + GATE_LLAMACPP
    for index, edge in enumerate(EDGES, start=1):
        assert ((low >= edge).sum(1) <= above[..., index]).all()
        assert ((high >= edge).sum(1) >= above[..., index]).all()


def check_answers(counts, gates):
    """Each answer's own counts, against its pre-activations."""
    assert counts.tokens.tolist() == [one.shape[1] for one in gates]
    for active, one in zip(counts.active, gates, strict=True):
        assert (np.abs(active - (one > 0).sum(1)) <= (np.abs(one) < GATE_LLAMACPP).sum(1)).all()


def reference_gates(reference, exchange):
    """Pre-activations of the tokens that count, ``[layers, tokens, width]`` float64."""
    seen = []
    linear = reference.linear

    def kept(x, name):
        y = linear(x, name)
        if name.endswith("ffn_gate"):
            seen.append(y[len(exchange.prompt) : len(exchange.tokens) - 1])
        return y

    reference.linear = kept
    reference.logits(exchange.tokens)
    del reference.linear
    return np.array(seen)


@pytest.mark.parametrize("biases", [(), ("ffn_gate", "ffn_up", "ffn_down")], ids=["plain", "biased"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_observed_statistics_against_float64(make_tiny, biases, sequences):
    path = make_tiny(biases=biases)
    reference = ReferenceLlama(path)
    with opened(path, sequences) as runtime:
        prompts = prompts_of(runtime)
        found, counts = runtime.observe(prompts, GROUPS, shared=[12] * 5, **ANSWERS)
        exchanges = runtime.generate(prompts, **ANSWERS)
        again = runtime.activation_stats(exchanges)
    assert len(found) == 2
    gates = [reference_gates(reference, exchange) for exchange in exchanges]
    for group, stats in enumerate(found):
        check(stats, [one for one, its in zip(gates, GROUPS, strict=True) if its == group])
    assert np.abs(found[0].active / found[0].tokens - found[1].active / found[1].tokens).max() > 0.3
    check(again, gates)
    check(found[0] + found[1], gates)
    check_answers(counts, gates)
    for group, stats in enumerate(found):  # one count, two ways of adding it up
        np.testing.assert_array_equal(counts.active[np.array(GROUPS) == group].sum(0), stats.active)


def test_a_layer_narrower_than_another_and_none_at_all(make_tiny):
    path = make_tiny(family="deci", width=(96, 0, 64))
    with opened(path) as runtime:
        prompts = prompts_of(runtime)
        (stats,), _ = runtime.observe(prompts, [0] * 5, **ANSWERS)
        exchanges = runtime.generate(prompts, **ANSWERS)
    tokens = sum(len(one.response) - 1 for one in exchanges)
    assert stats.active.shape == (3, 96)
    assert stats.tokens == tokens
    assert not stats.active[1].any()
    assert not stats.active[2, 64:].any()
    assert not stats.largest[2, 64:].any()
    for layer, width in ((0, 96), (2, 64)):
        gates = np.concatenate([node_gates(path, one, f"ffn_gate-{layer}") for one in exchanges])
        unsure = (np.abs(gates) < GATE_LLAMACPP).sum(0)
        assert (np.abs(stats.active[layer, :width] - (gates > 0).sum(0)) <= unsure).all()


def node_gates(path, exchange, node):
    """From a plain pass of llama.cpp over the sequence, ``[tokens that count, columns]``."""
    ((_, values),) = nodes(path, list(exchange.tokens), [node])
    return values[len(exchange.prompt) : -1]


@pytest.mark.parametrize("family", ["phi3", "gemma", "glm4", "olmo2", "command-r"])
def test_families_that_keep_their_gate_elsewhere(make_tiny, family):
    """Fused projections hold the gate first; GELU is positive where SiLU is, but its bins are others."""
    row, path = gguf_family(family, "x"), make_tiny(family=family)
    with opened(path) as runtime:
        prompts = [tokens[-20:] for tokens in prompts_of(runtime)[:3]]
        (stats,), _ = runtime.observe(prompts, [0] * 3, **ANSWERS)
        exchanges = runtime.generate(prompts, **ANSWERS)
    gates = [
        np.array([node_gates(path, one, f"{row.gate}-{layer}")[:, :96] for layer in range(3)]).astype(np.float64)
        for one in exchanges
    ]
    check(stats, gates, row.activation)
    if row.fused:  # the node's other half is another thing
        halves = np.concatenate([node_gates(path, one, f"{row.gate}-0")[:, 96:] for one in exchanges])
        assert np.abs((halves > 0).sum(0) - stats.active[0]).max() > 5


def test_more_rows_than_the_buffer_and_answers_longer_than_a_batch(make_tiny):
    path = make_tiny()
    rng = np.random.default_rng(0)
    exchanges = [
        Exchange(tuple(rng.integers(5, 900, 40)), tuple(rng.integers(5, 900, size))) for size in (700, 1, 0, 2, 300)
    ]
    reference = ReferenceLlama(path)
    for batch in (512, 64):
        with opened(path, 1, batch=batch) as runtime:
            stats = runtime.activation_stats(exchanges)
        check(stats, [reference_gates(reference, one) for one in exchanges])


def test_no_answer_at_all(tiny):
    with opened(tiny) as runtime:
        stats = runtime.activation_stats([Exchange((5, 6), (2,)), Exchange((5, 6), ())])
        assert (stats.tokens, int(stats.active.sum())) == (0, 0)
        assert runtime.activation_stats([]).tokens == 0


def test_both_runtimes_agree_on_a_tiny_model(tiny, tiny_runtime):
    with opened(tiny) as runtime:
        prompts = prompts_of(runtime)
        ours, counts = runtime.observe(prompts, GROUPS, **ANSWERS)
        exchanges = runtime.generate(prompts, **ANSWERS)
    for group, stats in enumerate(ours):
        chosen = [one for one, its in zip(exchanges, GROUPS, strict=True) if its == group]
        theirs = tiny_runtime.activation_stats(chosen)
        assert stats.tokens == theirs.tokens
        assert np.abs(stats.active - theirs.active).sum() < (1 - SIGNS_QUANTISED) * stats.active.size * stats.tokens
        np.testing.assert_allclose(stats.largest, theirs.largest, atol=GATE_LLAMACPP)
    _, their_counts = tiny_runtime.observe(prompts, GROUPS, **ANSWERS)
    # float16 keys and values tip a nearly even choice of a token now and then: those answers aside
    same = [one == other for one, other in zip(exchanges, tiny_runtime.generate(prompts, **ANSWERS), strict=True)]
    assert sum(same) >= 4
    np.testing.assert_array_equal(counts.tokens[same], their_counts.tokens[same])
    differing = np.abs(counts.active - their_counts.active).sum((1, 2))
    assert (differing < (1 - SIGNS_QUANTISED) * counts.active[0].size * counts.tokens)[same].all()


def test_both_runtimes_agree_on_the_default_model(default_model):
    """The same tokens, through llama.cpp's quantised arithmetic and through float32."""
    from npti_export.runtimes.transformers import TransformersRuntime

    with opened(default_model, 4) as runtime:
        prompts = [runtime.encode(chat("You are a shy and quiet person.", text)) for text in QUESTIONS[1:4]]
        (observed,), _ = runtime.observe(prompts, [0] * 3, max_new_tokens=24, repetition_penalty=1.1)
        exchanges = runtime.generate(prompts, max_new_tokens=24, repetition_penalty=1.1)
        forced = runtime.activation_stats(exchanges)
        assert len(runtime.decode(exchanges[1].response)) > 20
    theirs = TransformersRuntime(gguf_source(default_model), device="cpu", dtype="float32").activation_stats(exchanges)
    for ours in (observed, forced):
        assert ours.tokens == theirs.tokens > 40
        rates = np.corrcoef(ours.probability().ravel(), theirs.probability().ravel())[0, 1]
        assert rates > RATES_CORRELATION
        differing = np.abs(ours.active - theirs.active).sum()  # at least so many signs
        assert differing < (1 - SIGNS_QUANTISED) * ours.active.size * ours.tokens
        assert 0.1 < ours.probability().mean() < 0.6


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_every_float32_lands_in_its_bin(activation):
    """Random bit patterns; the table looks at the upper bits only, so those next to an edge may be one off."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), rng.normal(size=200_000).astype(np.float32) * 3])
    values = np.concatenate([values[np.isfinite(values)], np.float32([0.0, -0.0, 1e-44, 1e-40, -1e-40, 3e38, -3e38])])
    found = bin_of_bits(activation)[values.view(np.uint32) >> 11].astype(int)
    with np.errstate(over="ignore"):
        a = ACTIVATIONS[activation](values.astype(np.float64))
    want = np.where(values > 0, np.searchsorted(EDGES.astype(np.float64), a, side="right") + 1, 0)
    tiny = (values > 0) & (values < 1e-37)
    assert (found[tiny] <= 1).all()
    values, found, want, a = values[~tiny], found[~tiny], want[~tiny], a[~tiny]
    wrong = found != want
    assert 0 < wrong.sum() < 0.01 * len(values)
    assert np.abs(found - want).max() == 1
    nearest = np.abs(a[wrong, None] / EDGES - 1).min(1)
    assert nearest.max() < LOG_BIN
    assert found.max() == BIN_COUNT


def test_not_a_number_is_not_counted_in_silence():
    counter = GateCounter(ModelShape(1, 4, 8), "silu", 1, 2, "x.gguf")
    for bad in (np.nan, np.inf):
        counter.begin([0, 1], [0, 0])
        assert counter.see(0)(np.array([[1, 2, 3, 4], [1, bad, 3, 4]], np.float32)) is False
        with pytest.raises(ModelError, match=r"x\.gguf: computes gates that are not numbers"):
            counter.results()


def test_counted_by_hand():
    counter = GateCounter(ModelShape(1, 3, 8), "silu", 2, 3, "x.gguf")
    passes = [([0, 2], [0, 1]), ([0, 2], [0, 1]), ([1, 2], [0, 1])]
    gates = [[[1, -1, 0], [2, 2, -2]], [[3, -1, 0], [-2, 2, -2]], [[-1, 5, 1e-3], [1, 1, -1]]]
    for (answers, groups), values in zip(passes, gates, strict=True):
        counter.begin(answers, groups)
        counter.see(0)(np.array(values, np.float32))
    first, second = counter.results()
    assert (first.tokens, second.tokens) == (3, 3)
    assert first.active.tolist() == [[2, 1, 1]]
    assert second.active.tolist() == [[2, 3, 0]]
    assert counter.counts().tokens.tolist() == [2, 1, 3]
    assert counter.counts().active.tolist() == [[[2, 0, 0]], [[0, 1, 1]], [[2, 3, 0]]]
    np.testing.assert_allclose(first.largest, [[3 / (1 + np.exp(-3)), 5 / (1 + np.exp(-5)), 0.00050025]], rtol=1e-5)
    assert second.largest[0, 2] == 0


def near_edges():
    """Where a bin could be missed by one: float32 numbers next to every edge and to every place of the table."""
    gates = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 1e-30, -1e-30, 88, 89, 3.4e38, -3.4e38])
    for edge in EDGES:  # of SiLU, from above: a >= gate / 2
        low, high = float(edge), 2 * float(edge) + 1
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if middle / (1 + np.exp(-middle)) < edge else (low, middle)
        at = np.float32(high)
        table = at.view(np.uint32) >> 11 << 11  # the first of its place
        around = [at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf)), -at]
        gates = np.concatenate([gates, around, np.array([table - 1, table, table + 1], np.uint32).view(np.float32)])
    return gates


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_counted_as_value_by_value(activation):
    """Groups, answers that come and go or have several rows, a narrow layer, more rows and neurons than fit at once."""
    rng, shape = np.random.default_rng(3), ModelShape(2, 480, 8)
    counter, widths = GateCounter(shape, activation, 2, 7, "x.gguf"), (480, 70)
    table, edges = bin_of_bits(activation).tolist(), near_edges()
    tokens, active, bins = Counter(), Counter(), Counter()
    largest, sums = {}, {}
    passes = [([0, 1, 2, 4, 5], [0, 0, 0, 1, 1])] * 90 + [([0, 2, 5], [0, 0, 1])] * 40 + [([3] * 300, [0] * 300)]
    passes += [([6, 6, 4, 6], [1] * 4), ([1], [0]), ([2, 1, 0], [0] * 3)]
    for answers, groups in passes:
        counter.begin(answers, groups)
        tokens.update(answers)
        for layer, width in enumerate(widths):
            wide = np.concatenate([rng.choice(edges, (len(answers), width)), np.ones((len(answers), 4))], 1)
            gates, products = wide.astype(np.float32), rng.normal(size=(len(answers), width)).astype(np.float32)
            assert counter.see(layer, width)(gates) is counter.see_product(layer)(products) is False
            keys = (gates[:, :width].view(np.uint32) >> 11).tolist()
            for row, (answer, group) in enumerate(zip(answers, groups, strict=True)):
                for neuron, key in enumerate(keys[row]):
                    place = layer, neuron
                    largest[(group, *place)] = max(largest.get((group, *place), 0.0), float(gates[row, neuron]))
                    sums.setdefault((group, *place), []).append(float(products[row, neuron]))
                    if table[key]:
                        active[(answer, *place)] += 1
                        bins[(group, *place, table[key] - 1)] += 1
    results, counts = counter.results(), counter.counts()
    assert counts.tokens.tolist() == [tokens[answer] for answer in range(7)]
    for place, found in np.ndenumerate(counts.active):
        assert found == active[place]
    for group, stats in enumerate(results):
        members = [0, 1, 2, 3] if group == 0 else [4, 5, 6]
        assert stats.tokens == sum(tokens[answer] for answer in members)
        np.testing.assert_array_equal(stats.active, counts.active[members].sum(0))
        for place, found in np.ndenumerate(stats.histogram):
            assert found == bins[(group, *place)]
        for place, found in np.ndenumerate(stats.largest):
            top = np.float32(largest.get((group, *place), 0.0))
            assert found == (activate(np.array([top]), activation)[0] if top > 0 else 0)
            values = sums.get((group, *place), [])
            squares = [value * value for value in values]
            np.testing.assert_allclose(stats.product[(0, *place)], math.fsum(values), atol=SUMS_FLOAT64 * len(values))
            np.testing.assert_allclose(stats.product[(1, *place)], math.fsum(squares), rtol=SUMS_FLOAT64)


def test_an_answer_of_more_tokens_than_int16_holds():
    for answers in (1, 2):
        counter = GateCounter(ModelShape(1, 3, 8), "silu", 1, answers, "x.gguf")
        for _ in range(33):
            counter.begin([0] * 1000, [0] * 1000)
            counter.see(0)(np.array([[1, -1, 2]] * 1000, np.float32))
        assert counter.results()[0].active.tolist() == [[33_000, 0, 33_000]]
        assert counter.counts().active[0].tolist() == [[33_000, 0, 33_000]]
        assert counter.counts().active.dtype == np.int32


def test_sums_of_spread_are_exact_and_add_up():
    rng = np.random.default_rng(1)
    active = rng.integers(0, 60_000, (2, 4, 2, 3)).astype(np.int32)
    tokens = np.array([[60_000, 0, 65_000, 100], [5, 60_001, 0, 64_999]])
    plus, minus = (AnswerCounts(*pole) for pole in zip(active, tokens, strict=True))
    spread = PairSpread.of_answers(plus, minus)
    parts = PairSpread.of_answers(plus[:1], minus[:1]) + PairSpread.of_answers(plus[1:], minus[1:])
    for one in (spread, parts):
        for layer in range(2):
            for neuron in range(3):
                a, b = ([int(count) for count in pole[:, layer, neuron]] for pole in active)
                s, t = ([int(count) for count in pole] for pole in tokens)
                dot = lambda left, right: sum(x * y for x, y in zip(left, right, strict=True))  # noqa: E731
                assert one.products[:, layer, neuron].tolist() == [dot(a, a), dot(b, b), dot(a, b)]
                assert one.mixed[:, layer, neuron].tolist() == [dot(a, s), dot(b, t), dot(a, t), dot(b, s)]
        assert (one.pairs, one.lengths) == (4, (dot(s, s), dot(t, t), dot(s, t)))


def test_the_activations_against_transformers():
    import torch
    from transformers.activations import ACT2FN

    values = np.linspace(-30, 30, 4001, dtype=np.float32)
    values = np.concatenate([values, np.float32([-1e4, -120, 1e4, 0, 1e-30])])
    for name in ("silu", "gelu_pytorch_tanh"):
        want = ACT2FN[name](torch.from_numpy(values).double()).numpy()
        np.testing.assert_allclose(activate(values, name), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArchitectureError, match="activation 'relu' is not known here"):
        activate(values, "relu")


@pytest.mark.parametrize("place", ["blk.1.ffn_gate.weight", "blk.0.attn_norm.weight", "output_norm.weight"])
def test_weights_that_are_not_numbers(tiny, tmp_path, place):
    path = tmp_path / "broken.gguf"
    data = bytearray(tiny.read_bytes())
    tensor = next(one for one in GGUFReader(tiny).tensors if one.name == place)
    data[tensor.data_offset + 8 : tensor.data_offset + 12] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    source = gguf_source(tiny)
    with LlamaCppRuntime(path, Settings(threads=1), source=source) as runtime:
        with pytest.raises(ModelError, match=r"broken.gguf: .* not numbers"):
            runtime.observe([(5, 6, 7)], [0], **ANSWERS)
        if place != "output_norm.weight":  # after which there is no gate
            with pytest.raises(ModelError, match=r"broken.gguf: .* not numbers"):
                runtime.activation_stats([Exchange((5, 6), (7, 8, 9))])


def test_a_node_that_is_not_float32_is_refused(monkeypatch):
    from npti_export.runtimes.llamacpp import library

    fake = SimpleNamespace(
        ggml_nelements=lambda _t: 8, ggml_nrows=lambda _t: 2, ggml_nbytes=lambda _t: 16, ggml_get_name=lambda _t: b"x-1"
    )
    monkeypatch.setattr(library, "ggml", lambda: fake)
    with pytest.raises(ModelError, match="x-1 in another type than float32"):
        library.tensor_values(0, on_host=True)


def test_a_copy_that_is_written_back_is_what_a_view_is(tiny):
    """The way of a GPU, whose nodes are not in this process's memory, taken on the host."""
    change = lambda layer, _x, y: bool(np.multiply(y, 1.5, out=y) is y)  # noqa: E731
    with opened(tiny) as runtime:
        tokens = prompts_of(runtime)[2]
        plain, want = runtime.logits(tokens), runtime.run([tokens], change)
        runtime._context.tap._on_host = False
        np.testing.assert_array_equal(runtime.run([tokens], change), want)
        (copied,), _ = runtime.observe([tokens], [0], **ANSWERS)
    with opened(tiny) as runtime:
        (viewed,), _ = runtime.observe([tokens], [0], **ANSWERS)
    np.testing.assert_array_equal(copied.active, viewed.active)
    assert np.abs(want - plain).max() > 0.1


def test_a_tiny_file_with_a_name_in_no_encoding(tokenizer_fields, tmp_path):
    import os

    path = write_tiny(tmp_path / os.fsdecode(b"caf\xe9.gguf"), tokenizer_fields)
    with opened(path) as runtime:
        assert runtime.logits([5, 6]).shape == (2, 1024)
