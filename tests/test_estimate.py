"""Intervals against a bootstrap written out, and against what must hold for any data."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from npti_export.evaluate.assemble import _share
from npti_export.evaluate.conditions import Answered, Test, Way
from npti_export.evaluate.contrast import ContrastScores
from npti_export.evaluate.document import Condition
from npti_export.evaluate.estimate import estimate, resampled, transformed

NORMAL = NormalDist()
SIMILAR = 0.12  # of an interval's width: two bootstraps of 2,000 resamples differ by a few hundredths


def resampled_means(values, seed, count=4000):
    rng = np.random.default_rng(seed)
    return np.sort([np.mean(rng.choice(values, len(values))) for _ in range(count)])


def plain_percentile(values, seed):
    means = resampled_means(values, seed)
    return means[int(0.025 * len(means))], means[int(0.975 * len(means))]


def plain_bca(values, seed):
    """Efron's bias-corrected and accelerated interval, step by step."""
    means, values = resampled_means(values, seed), np.asarray(values, float)
    mean = values.mean()
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / len(means)
    bias = NORMAL.inv_cdf(below)
    left_out = np.array([np.delete(values, at).mean() for at in range(len(values))])
    away = left_out.mean() - left_out
    acceleration = np.sum(away**3) / (6 * np.sum(away**2) ** 1.5)
    found = []
    for share in (0.025, 0.975):
        z = bias + NORMAL.inv_cdf(share)
        found.append(means[int(NORMAL.cdf(bias + z / (1 - acceleration * z)) * len(means))])
    return found


def samples():
    rng = np.random.default_rng(3)
    return {
        "normal": rng.normal(2.0, 3.0, 60),
        "skewed": rng.exponential(1.0, 40),
        "shares": rng.integers(0, 2, 50).astype(float),
        "few": rng.normal(0.0, 1.0, 8),
    }


@pytest.mark.parametrize("name", ["normal", "skewed", "shares", "few"])
def test_it_is_the_bca_interval(name):
    values = samples()[name]
    found, want = estimate(values), plain_bca(values, seed=11)
    width = want[1] - want[0]
    assert (found.mean, found.n) == (pytest.approx(values.mean()), len(values))
    assert abs(found.low - want[0]) < SIMILAR * width
    assert abs(found.high - want[1]) < SIMILAR * width
    assert found.low <= found.mean <= found.high


def test_symmetric_data_have_nearly_the_percentile_interval_and_skewed_data_another():
    values = samples()
    for name, near in (("normal", True), ("skewed", False)):
        found, (low, high) = estimate(values[name]), plain_percentile(values[name], seed=5)
        moved = (found.low - low + found.high - high) / (high - low)
        assert (abs(moved) < SIMILAR) == near, name
    assert moved > 0  # towards the long tail


def test_figures_move_and_stretch_with_the_values():
    values = samples()["skewed"]
    plain, moved, turned = estimate(values), estimate(3 * values + 7), estimate(-values)
    assert (moved.low, moved.high) == pytest.approx((3 * plain.low + 7, 3 * plain.high + 7))
    assert (turned.low, turned.high) == pytest.approx((-plain.high, -plain.low), rel=0.05)


def test_seeds():
    values = samples()["normal"]
    assert estimate(values, seed=4) == estimate(list(values), seed=4)
    assert estimate(values, seed=4) != estimate(values, seed=5)


def test_one_value_none_and_equal_ones():
    for values in ([0.3], [0.3] * 20):
        one = estimate(values)
        assert (one.mean, one.low, one.high, one.n) == (pytest.approx(0.3), one.mean, one.mean, len(values))
    nothing = estimate([])
    assert (nothing.mean, nothing.low, nothing.high, nothing.n) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [0.0] * 30 + [1e-3], [1.0, 1.0 + 1e-15], [-1e300, 1e300], [0.0, 5e-324]]
)
def test_hard_values_give_numbers_that_contain_the_mean(values):
    found = estimate(values)
    assert all(map(math.isfinite, (found.mean, found.low, found.high)))
    assert found.low <= found.mean <= found.high
    assert min(values) <= found.low
    assert found.high <= max(values)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_true_mean_is_inside_about_as_often_as_is_said(draw):
    rng, inside, trials = np.random.default_rng(8), 0, 150
    for trial in range(trials):
        values = rng.normal(1.0, 2.0, 30) if draw == "normal" else rng.exponential(1.0, 30)
        found = estimate(values, seed=trial)
        inside += found.low <= 1.0 <= found.high
    # 95% nominal; with 30 values the bootstrap is known to be a few percent short, and chance adds 2%
    assert 0.86 < inside / trials < 0.995


def test_a_monotone_function_of_an_interval():
    found = estimate(samples()["skewed"])
    rising, falling = transformed(found, math.exp), transformed(found, lambda value: math.exp(-value))
    assert (rising.low, rising.mean, rising.high) == tuple(map(math.exp, (found.low, found.mean, found.high)))
    assert (falling.low, falling.high) == (math.exp(-found.high), math.exp(-found.low))
    assert rising.n == falling.n == found.n


def test_of_groups_the_interval_is_over_groups():
    """Student's t of the groups' means, where all groups are of one size; else of their sums, written out."""
    rng = np.random.default_rng(8)
    values = rng.normal(size=24)
    groups = np.arange(24) // 3
    found = estimate(values, groups=groups.tolist())
    means = values.reshape(8, 3).mean(1)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 24)
    reach = 2.364624 * means.std(ddof=1) / math.sqrt(8)  # 7 degrees of freedom
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), rel=1e-5)
    uneven = estimate(values, groups=[0] * 12 + [1] * 6 + [2] * 6)
    total = sum((sum(values[a:b] - values.mean())) ** 2 for a, b in ((0, 12), (12, 18), (18, 24)))
    assert uneven.high - uneven.mean == pytest.approx(4.302653 * math.sqrt(total * 3 / 2) / 24, rel=1e-5)


def test_what_a_group_has_in_common_is_in_the_interval():
    """Of samples with a common part for each of 8 groups, the interval holds the true mean in 95 of 100."""
    rng, holds, plainly = np.random.default_rng(1), 0, 0
    for _ in range(300):
        values = np.repeat(rng.normal(size=8), 4) + 0.3 * rng.normal(size=32)
        grouped, plain = estimate(values, groups=[at // 4 for at in range(32)]), estimate(values)
        holds += grouped.low <= 0 <= grouped.high
        plainly += plain.low <= 0 <= plain.high
    assert 0.91 < holds / 300 < 0.985  # three standard errors
    assert plainly / 300 < 0.85


def test_a_ratio_of_means_is_drawn_by_its_questions():
    """Both means of one draw are of the same questions, so what they have in common falls out."""
    rng = np.random.default_rng(8)
    common = rng.normal(1.0, 0.4, 50)
    above, below = common + rng.normal(0, 0.1, 50), 2 * common + rng.normal(0, 0.1, 50)

    def ratio(some):
        return float(above[some].mean() / below[some].mean())

    low, high = resampled(ratio, range(50), seed=2)
    again = np.random.default_rng(9)
    plain = np.sort([ratio(again.choice(50, 50)) for _ in range(4000)])
    width = plain[3900] - plain[100]
    assert abs(low - plain[100]) < SIMILAR * width
    assert abs(high - plain[3900]) < SIMILAR * width
    apart = np.sort([above[again.choice(50, 50)].mean() / below[again.choice(50, 50)].mean() for _ in range(4000)])
    assert high - low < 0.5 * (apart[3900] - apart[100])
    assert resampled(ratio, range(50), seed=2) == (low, high) != resampled(ratio, range(50), seed=3)


def test_answers_to_one_question_are_drawn_together():
    values = samples()["normal"]
    twice = np.repeat(values, 2)
    alone = resampled(lambda some: float(values[some].mean()), range(60))
    assert resampled(lambda some: float(twice[some].mean()), [at // 2 for at in range(120)]) == pytest.approx(alone)
    low, high = resampled(lambda some: float(twice[some].mean()), range(120))
    assert high - low < 0.8 * (alone[1] - alone[0])
    assert resampled(lambda some: float(twice[some].mean()), ["one", "other"] * 60) is None


def shares(gains, **prompts):
    """:func:`_share` of the - pole, where a contrast is the negative one."""
    found = {"unsteered": np.zeros(len(gains))} | prompts
    conditions, answered = [], []
    for name, values in found.items():
        kind = "prompt" if name.startswith("prompt-") else "base"
        scores = ContrastScores(-np.asarray(values, float), np.zeros(len(gains)))
        answered.append(Answered(Way(name, name, kind, lambda: None), [], [], scores, [], 0.0))
        gain = estimate(values) if kind == "prompt" else None
        nothing = estimate([0.0])
        figures = dict.fromkeys(("contrast", "fluency", "perplexity", "repetition", "distinct", "length"), nothing)
        conditions.append(Condition(name=name, label=name, kind=kind, gain=gain, **figures))
    test = Test(None, "-", (), None, 8, 2)
    return _share(np.asarray(gains, float), conditions, answered, test)


def test_the_share_of_the_better_prompt():
    rng = np.random.default_rng(1)
    gains, better, worse = rng.normal(0.05, 0.02, 40), rng.normal(0.04, 0.02, 40), rng.normal(0.01, 0.02, 40)
    share, (low, high) = shares(gains, **{"prompt-adjective": worse, "prompt-persona": better})
    assert share == pytest.approx(gains.mean() / better.mean())
    assert low < share < high < 2 * share
    share, within = shares(gains, **{"prompt-persona": rng.normal(0.004, 0.02, 40)})
    assert within is None  # of what may be nothing at all
    assert shares(gains, **{"prompt-persona": -better}) == (None, None)
    assert shares(gains) == (None, None)
