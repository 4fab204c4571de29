"""Statistics against plain numpy over the raw activations."""

import bisect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import QUANTILE_BIN, QUANTILE_FULL_BINS, QUANTILE_WIDE_BIN, SUMS_FLOAT64

from npti_export.errors import ProfileError
from npti_export.runtimes.accumulate import StatsAccumulator
from npti_export.stats import (
    BIN_COUNT,
    EDGES,
    ActivationStats,
    AnswerCounts,
    ContrastStats,
    PairSpread,
    load_stats,
    save_stats,
)


def collect(activations):
    """Statistics of [layers, tokens, width] through the accumulator that runs beside a model."""
    layers, tokens, width = activations.shape
    accumulator = StatsAccumulator(layers, width)
    modules = [torch.nn.Identity() for _ in range(layers)]
    with accumulator.listen(modules, torch.ones(1, tokens, dtype=torch.bool)):
        for module, values in zip(modules, activations, strict=True):
            module(torch.from_numpy(values)[None])
    return accumulator.result()


def silu_like(rng, shape):
    gates = rng.normal(0.3, 1.5, shape)
    return (gates / (1 + np.exp(-gates))).astype(np.float32)


def test_counts_against_plain_loops():
    activations = silu_like(np.random.default_rng(0), (2, 50, 7))
    stats = collect(activations)
    assert stats.tokens == 50
    for layer in range(2):
        for neuron in range(7):
            values = [float(value) for value in activations[layer, :, neuron]]
            assert stats.active[layer, neuron] == sum(value > 0 for value in values)
            assert stats.histogram[layer, neuron].sum() == sum(value > 0 for value in values)
            assert stats.largest[layer, neuron] == max(0.0, *values)
    np.testing.assert_array_equal(stats.probability(), (activations > 0).mean(1))


@pytest.mark.parametrize("at_once", [1 << 21, 64])
def test_every_float32_is_in_its_bin(at_once, monkeypatch):
    """Next to every edge and every cell of the table, the smallest and the largest, infinite ones, and no number."""
    monkeypatch.setattr("npti_export.runtimes.accumulate._AT_ONCE_CPU", at_once)
    cells = np.arange(0, 1 << 31, 1 << 19, dtype=np.uint32).view(np.float32)
    close = [np.nextafter(one, np.float32(to)) for one in (EDGES, cells) for to in (0, np.inf)]
    rng = np.random.default_rng(9)
    others = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    odd = np.float32([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3.4e38])
    values = np.concatenate([EDGES, cells, *close, others, odd])
    values = np.concatenate([values, -values])
    values = values[: len(values) // 7 * 7].reshape(1, -1, 7)
    want, edges = np.zeros((7, BIN_COUNT), int), EDGES.tolist()
    for neuron, found in enumerate(values[0].T.tolist()):
        for one in found:
            if one > 0:
                want[neuron, bisect.bisect_right(edges, one)] += 1
    np.testing.assert_array_equal(collect(values).histogram[0], want)
    numbers = values[0][~np.isnan(values[0])]
    on_a_gpu = torch.bucketize(torch.from_numpy(numbers), torch.from_numpy(EDGES), right=True, out_int32=True)
    assert on_a_gpu.tolist() == [bisect.bisect_right(edges, one) for one in numbers.tolist()]


def test_inputs_of_down_projections_in_pieces(monkeypatch):
    monkeypatch.setattr("npti_export.runtimes.accumulate._PRODUCTS_CPU", 1 << 12)
    values = np.random.default_rng(10).normal(size=(1, 40, 300)).astype(np.float32)
    accumulator, modules = StatsAccumulator(1, 300, products=True), [torch.nn.Identity() for _ in range(2)]
    with accumulator.listen(modules[:1], torch.ones(1, 40, dtype=torch.bool), modules[1:]):
        for module in modules:
            module(torch.from_numpy(values))
    found = accumulator.result().product[:, 0]
    for neuron, column in enumerate(values[0].T.tolist()):
        np.testing.assert_allclose(found[0, neuron], math.fsum(column), atol=SUMS_FLOAT64 * 40)
        np.testing.assert_allclose(found[1, neuron], math.fsum(one * one for one in column), rtol=SUMS_FLOAT64)


def test_exact_zeros_and_empty_neurons_are_not_active():
    activations = np.zeros((1, 10, 3), np.float32)
    activations[0, :, 1] = -0.2
    activations[0, 3, 2] = 1e9
    stats = collect(activations)
    assert stats.active.tolist() == [[0, 0, 1]]
    assert stats.histogram[0, 2, BIN_COUNT - 1] == 1
    assert stats.quantile(0.5).tolist() == [[0, 0, 0]]
    assert stats.quantile(0.99)[0, 2] <= 1e9


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
def test_quantiles_against_sorting(q):
    activations = silu_like(np.random.default_rng(1), (1, 20000, 40))
    exact = np.quantile(activations[0], q, axis=0, method="inverted_cdf")
    found = collect(activations).quantile(q)[0]
    assert (exact > 0).all()
    assert np.abs(found / exact - 1).max() < QUANTILE_FULL_BINS


@given(
    st.lists(st.floats(-1, 1000, width=32), min_size=1, max_size=60),  # 1,024 and more share one open bin
    st.floats(0.01, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_quantile_is_never_off_by_more_than_its_bin(values, q):
    activations = np.array(values, np.float32).reshape(1, -1, 1)
    exact = max(float(np.quantile(activations, q, method="inverted_cdf")), 0.0)
    found = float(collect(activations).quantile(q)[0, 0])
    wide = QUANTILE_BIN if exact < 32 else QUANTILE_WIDE_BIN
    assert found <= exact * (1 + wide) + 2**-6
    assert found >= exact / (1 + wide) - 2**-6


def test_large_activations_beside_one_that_is_huge():
    """Some gates of large models are at dozens, and one token in thousands is at thousands."""
    values = np.random.default_rng(4).normal(60, 15, (1, 20000, 1)).astype(np.float32)
    values[0, 7] = 5000
    exact = float(np.quantile(values, 0.95, method="inverted_cdf"))
    assert float(collect(values).quantile(0.95)[0, 0]) == pytest.approx(exact, rel=0.1)


def test_adding_shards_is_counting_everything_at_once():
    activations = silu_like(np.random.default_rng(2), (2, 90, 5))
    whole = collect(activations)
    a, b, c = (collect(activations[:, start : start + 30]) for start in (0, 30, 60))
    zero = ActivationStats.empty(2, 5)
    for total in ((a + b) + c, a + (b + c), c + a + b, zero + a + b + c):
        assert total.tokens == whole.tokens
        for field in ("active", "histogram", "largest"):
            np.testing.assert_array_equal(getattr(total, field), getattr(whole, field))


def test_added_in_the_memory_of_the_first():
    activations = silu_like(np.random.default_rng(6), (2, 60, 5))
    whole, first, second = (collect(activations[:, some]) for some in (slice(60), slice(30), slice(30, 60)))
    room, kept = first.histogram, second.histogram.copy()
    total = ActivationStats.empty(2, 5).absorb(first.absorb(second))
    for field in ("active", "histogram", "largest"):
        np.testing.assert_array_equal(getattr(total, field), getattr(whole, field))
    np.testing.assert_array_equal(room, whole.histogram)  # the very array
    np.testing.assert_array_equal(second.histogram, kept)
    second.histogram.flags.writeable = second.active.flags.writeable = False
    np.testing.assert_array_equal(second.absorb(second).active, 2 * second.active)
    empty = ContrastStats.empty(2, 5)
    one = ContrastStats(whole, whole, empty.spread)
    both = empty.absorb(one)
    assert (both.plus.tokens, both.minus.active.sum()) == (60, whole.active.sum())  # plus and minus are two


def test_all_that_is_added_in_place_is_what_is_added():
    rng = np.random.default_rng(11)

    def batch():
        poles = []
        for _ in range(2):
            tokens = rng.integers(3, 9, 4)
            poles.append(AnswerCounts(rng.integers(0, 3, (4, 2, 5)).astype(np.int16), tokens))
        stats = [replace(collect(silu_like(rng, (2, 30, 5))), product=rng.normal(size=(2, 2, 5))) for _ in range(2)]
        return ContrastStats(*stats, PairSpread.of_answers(*poles))

    first, second = batch(), batch()
    want = ContrastStats.empty(2, 5) + first + second
    kept, room = (second.spread.mixed.copy(), second.plus.product.copy()), first.spread.mixed
    found = first.absorb(second)
    assert found.spread.mixed is room  # of a large model there is not room for another one
    for pole in ("plus", "minus"):
        for field in ("active", "histogram", "largest", "product"):
            np.testing.assert_array_equal(getattr(getattr(found, pole), field), getattr(getattr(want, pole), field))
    for field in ("pairs", "lengths", "products", "mixed"):
        np.testing.assert_array_equal(getattr(found.spread, field), getattr(want.spread, field))
    np.testing.assert_array_equal(second.spread.mixed, kept[0])  # what is added stays what it was
    np.testing.assert_array_equal(second.plus.product, kept[1])


@pytest.mark.parametrize("largest", [200, 60_000, 2**31 - 1])
def test_counts_of_any_size_are_kept(tmp_path, largest):
    stats = collect(silu_like(np.random.default_rng(3), (1, 20, 5)))
    stats.histogram[0, 0, 3] = largest
    save_stats(tmp_path / "s", ContrastStats(stats, stats, PairSpread.empty(1, 5)), {})
    read = load_stats(tmp_path / "s")[0].plus.histogram
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, stats.histogram)


def test_saved_and_read_back(tmp_path):
    stats = collect(silu_like(np.random.default_rng(3), (2, 20, 5)))
    spread = PairSpread(7, (1, 2, 3), np.arange(30).reshape(3, 2, 5), np.arange(40).reshape(4, 2, 5))
    save_stats(tmp_path / "s.safetensors", ContrastStats(stats, stats + stats, spread), {"batches": 3})
    read, progress = load_stats(tmp_path / "s.safetensors")
    assert progress == {"batches": 3}
    assert (read.plus.tokens, read.minus.tokens) == (20, 40)
    np.testing.assert_array_equal(read.minus.histogram, 2 * stats.histogram)
    np.testing.assert_array_equal(read.plus.largest, stats.largest)
    assert (read.spread.pairs, read.spread.lengths) == (7, (1, 2, 3))
    np.testing.assert_array_equal(read.spread.products, spread.products)
    np.testing.assert_array_equal(read.spread.mixed, spread.mixed)
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-7])
    with pytest.raises(ProfileError, match="damaged"):
        load_stats(tmp_path / "s.safetensors")


def test_no_tokens_is_an_error():
    with pytest.raises(ProfileError, match="no response token"):
        ActivationStats.empty(1, 2).probability()


# 16 answers of 11,585 tokens are the most of which int32 holds every sum
@pytest.mark.parametrize(
    ("largest", "kind"), [(500, np.int16), (11_585, np.int16), (11_586, np.int16), (2**29, np.int32)]
)
def test_sums_over_questions_against_python_integers(largest, kind):
    """Of as many tokens as each kind of integer holds, and one more; more neurons than are multiplied at once."""
    rng = np.random.default_rng(8)
    poles = []
    for _ in range(2):
        tokens = rng.integers(largest // 2, largest, 16, endpoint=True)
        active = rng.integers(0, tokens[:, None, None], (16, 2, 1029), endpoint=True)
        tokens[0], active[:, 1, 1027] = largest, largest
        poles.append(AnswerCounts(active.astype(kind), tokens))
    found = PairSpread.of_answers(*poles)
    a, b = (one.active.astype(object) for one in poles)
    s, t = (one.tokens.astype(object) for one in poles)
    products = [(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)]
    mixed = [(one * tokens[:, None, None]).sum(0) for one, tokens in ((a, s), (b, t), (a, t), (b, s))]
    np.testing.assert_array_equal(found.products, np.array(products))
    np.testing.assert_array_equal(found.mixed, np.array(mixed))
    assert found.lengths == ((s * s).sum(), (t * t).sum(), (s * t).sum())
    assert found.products.dtype == found.mixed.dtype == np.int64


def test_counts_of_answers_are_as_narrow_as_their_tokens():
    assert AnswerCounts.kind(0) is AnswerCounts.kind(32_767) is np.int16
    assert AnswerCounts.kind(32_768) is np.int32
    accumulator, module = StatsAccumulator(1, 3), torch.nn.Identity()
    for tokens in (5, 32_768):
        with accumulator.listen([module], torch.ones(1, tokens, dtype=torch.bool)):
            module(torch.ones(1, tokens, 3))
    first, second = accumulator.counts()
    assert (first.active.dtype, second.active.dtype) == (np.int16, np.int32)
    assert (first.active.tolist(), second.active.tolist()) == ([[[5] * 3]], [[[32_768] * 3]])
