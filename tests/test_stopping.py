"""Anytime identification: the forecast against what then happens, on neurons whose truth is known, and stopping."""

import zlib

import numpy as np
import pytest
from tolerances import OVERLAP_FORECAST, OVERLAP_FORECAST_SKEWED

from npti_export.bench import load_bench
from npti_export.identify.profiles import Place, identified
from npti_export.identify.stopping import expected_overlap, jaccard
from npti_export.models import gguf_source
from npti_export.profile_io import save_profile
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.stats import BIN_COUNT, ActivationStats, AnswerCounts, ContrastStats, PairSpread

NEURONS, QUESTIONS = 1500, 128
SELECTIONS = {"threshold": [], "fixed": ["select.at_least=150", "select.at_most=150"]}


def counts_of(counts, tokens, layers=1):
    """Of answers' active tokens [answers, neurons] and tokens [answers]."""
    return AnswerCounts(counts.reshape(len(counts), layers, -1).astype(np.int32), tokens.astype(np.int64))


def stats_of(answers):
    """All activations in one bin."""
    histogram = np.zeros((*answers.active.shape[1:], BIN_COUNT), np.int32)
    histogram[..., 70] = answers.active.sum(0)
    active = answers.active.sum(0, dtype=np.int64)
    return ActivationStats(int(answers.tokens.sum()), active, histogram, np.ones(active.shape, np.float32))


def contrast_of(plus, minus):
    return ContrastStats(stats_of(plus), stats_of(minus), PairSpread.of_answers(plus, minus))


def world(kind, seed):
    """Answers to all questions as each pole: rates that differ by neuron, by pole (delta), and by answer."""
    rng = np.random.default_rng(seed)
    delta = {
        "normal": lambda: rng.normal(0, 0.06, NEURONS),
        "heavy tails": lambda: rng.laplace(0, 0.045, NEURONS),
        "few": lambda: rng.normal(0, 0.06, NEURONS) * np.where(rng.random(NEURONS) < 0.15, 2.5, 0.2),
        "skewed": lambda: rng.normal(0.05, 0.06, NEURONS),
    }[kind]()
    rate = rng.uniform(0.15, 0.85, NEURONS)
    answers = []
    for sign in (1, -1):
        tokens = rng.integers(10, 60, QUESTIONS)
        rates = np.clip(rate + sign * delta / 2 + 0.15 * rng.normal(size=(QUESTIONS, NEURONS)), 0, 1)
        answers.append((rng.binomial(tokens[:, None], rates), tokens))
    return answers


def chosen(answers, asked, section):
    """The selection as the recipe states it, in plain numpy: ``{sign: mask}``."""
    (plus, plus_tokens), (minus, minus_tokens) = answers
    delta = plus[:asked].sum(0) / plus_tokens[:asked].sum() - minus[:asked].sum(0) / minus_tokens[:asked].sum()
    masks = {}
    for sign, towards in (("+", delta), ("-", -delta)):
        order = np.argsort(-towards, kind="stable")
        count = max(int((towards >= section.threshold).sum()), section.at_least)
        masks[sign] = np.zeros(NEURONS, bool)
        masks[sign][order[: min(count, section.at_most or NEURONS)]] = True
        masks[sign] &= towards > 0
    return masks


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few", "skewed"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_forecast_is_what_happens(kind, selection):
    section = load_recipe("npti", SELECTIONS[selection]).select
    forecasts, happened = [], []
    asked = (16, 32, 64, 96, 120)
    for seed in range(4):
        answers = world(kind, seed)
        final = chosen(answers, QUESTIONS, section)
        for number in asked:
            stats = contrast_of(*(counts_of(counts, tokens)[:number] for counts, tokens in answers))
            forecasts.append(expected_overlap(stats, section, QUESTIONS))
            now = chosen(answers, number, section)
            happened.append(min((now[s] & final[s]).sum() / max(1, (now[s] | final[s]).sum()) for s in "+-"))
    forecast, truth = (np.reshape(one, (4, -1)).mean(0) for one in (forecasts, happened))
    tolerance = OVERLAP_FORECAST_SKEWED if kind == "skewed" else OVERLAP_FORECAST
    assert np.abs(forecast - truth).max() < tolerance, (forecast.round(3), truth.round(3))
    assert (np.diff(forecast) > 0).all()
    assert forecast[0] < 0.5 < forecast[-1]


def test_the_forecast_is_repeatable_and_ends_at_one():
    section = load_recipe("npti").select
    plus, minus = (counts_of(*pole) for pole in world("normal", 0))
    stats = contrast_of(plus[:40], minus[:40])
    first = expected_overlap(stats, section, QUESTIONS)
    assert 0 < first < 1
    np.random.default_rng().normal(size=5)
    assert expected_overlap(stats, section, QUESTIONS) == first
    assert expected_overlap(stats, section, 40) == 1.0
    assert expected_overlap(stats, section, 41) > first
    assert expected_overlap(contrast_of(plus[:1], minus[:1]), section, QUESTIONS) == 0.0  # no spread to be seen


def test_jaccard():
    sets = [np.array(one, bool) for one in ([1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0])]
    assert jaccard(sets[0], sets[1]) == pytest.approx(1 / 3)
    assert jaccard(sets[0], sets[2]) == 0
    assert jaccard(sets[2], sets[2]) == 1


def test_the_variance_of_delta_against_the_formula_and_a_bootstrap():
    """Questions at random, each answered as both poles, whose answers have something in common."""
    rng = np.random.default_rng(0)
    common = 0.15 * rng.normal(size=(300, 12))
    tokens = [rng.integers(1, 60, 300) for _ in range(2)]
    counts = [
        rng.binomial(length[:, None], np.clip(0.4 + common + 0.15 * rng.normal(size=(300, 12)), 0, 1))
        for length in tokens
    ]
    stats = contrast_of(*map(counts_of, counts, tokens))
    found = stats.spread.delta_variance(stats.plus, stats.minus)[0]
    for neuron in range(12):
        residues = np.zeros(300)
        for sign, active, length in ((1, counts[0][:, neuron], tokens[0]), (-1, counts[1][:, neuron], tokens[1])):
            p = active.sum() / length.sum()
            residues += sign * (active - p * length) / length.sum()
        assert found[neuron] == pytest.approx(300 / 299 * sum(one * one for one in residues), rel=1e-9)
    draws = []
    for _ in range(800):
        some = rng.integers(0, 300, 300)
        plus, minus = (active[some].sum(0) / length[some].sum() for active, length in zip(counts, tokens, strict=True))
        draws.append(plus - minus)
    np.testing.assert_allclose(np.std(draws, axis=0), np.sqrt(found), rtol=0.15)
    naive = sum(one.probability() * (1 - one.probability()) / one.tokens for one in (stats.plus, stats.minus))[0]
    assert (found > 1.5 * naive).all()  # tokens of one answer are alike
    first = contrast_of(*(counts_of(*pole)[:1] for pole in zip(counts, tokens, strict=True)))
    assert np.isinf(first.spread.delta_variance(first.plus, first.minus)).all()


class Synthetic:
    """A model whose neurons have known rates, and whose answers depend on the prompt alone."""

    def __init__(self, shape, effect, noise, stops_at=None):
        self.shape, self.noise, self.calls, self.stops_at = shape, noise, 0, stops_at
        rng = np.random.default_rng(0)
        size = shape.layers * shape.width
        self.rate = rng.uniform(0.3, 0.7, size)
        self.delta = np.zeros(size)
        self.delta[rng.permutation(size)[:60]] = np.repeat([effect, -effect], 30)

    def encode(self, messages):
        return tuple("|".join(one["content"] for one in messages).encode())

    def observe(self, prompts, groups, *, max_new_tokens, repetition_penalty, shared):
        self.calls += 1
        if self.calls == self.stops_at:
            raise KeyboardInterrupt
        answers = self._answers(prompts, groups)
        places = [[place for place, its in enumerate(groups) if its == group] for group in (0, 1)]
        return [stats_of(AnswerCounts(answers.active[some], answers.tokens[some])) for some in places], answers

    def _answers(self, prompts, groups):
        counts, tokens = [], []
        for prompt, group in zip(prompts, groups, strict=True):
            rng = np.random.default_rng(zlib.crc32(bytes(prompt)))
            length = int(rng.integers(10, 30))
            rates = self.rate + (0.5 - group) * self.delta + self.noise * rng.normal(size=len(self.rate))
            counts.append(rng.binomial(length, np.clip(rates, 0, 1)))
            tokens.append(length)
        return counts_of(np.array(counts), np.array(tokens), self.shape.layers)


def asked(runtime, tiny, cache=None, *overrides, notes=None):
    settings = ["identify.questions=96", "identify.batch_size=16", "select.at_least=30", "select.at_most=30"]
    recipe = load_recipe("npti", [*settings, "identify.floor=24", *overrides])
    progress = Silent()
    if notes is not None:
        progress.note = notes.append
    source, bench = gguf_source(tiny), load_bench("openness")
    return identified(Place(lambda: runtime, source, "ggml", "cpu", cache), bench, recipe, progress)[1]


def bytes_of(profile, folder, name):
    save_profile(profile, folder / name, force=True, threshold=0.1, at_least=0)
    return (folder / name).read_bytes()


def test_easy_neurons_are_known_early_and_hard_ones_late(tiny):
    shape, notes = gguf_source(tiny).shape, []
    easy = asked(Synthetic(shape, 0.6, 0.05), tiny, notes=notes)
    assert easy.origin["questions"] == 24  # the floor
    assert easy.origin["expected_overlap"] >= 0.9
    assert "stopped after 24 of 96 questions" in notes[0]
    middle = asked(Synthetic(shape, 0.15, 0.15), tiny)
    assert 24 < middle.origin["questions"] < 96
    hard, notes = Synthetic(shape, 0.0, 0.3), []
    profile = asked(hard, tiny, notes=notes)
    assert (profile.origin["questions"], profile.origin["expected_overlap"], hard.calls) == (96, 1.0, 12)
    assert notes == []


def test_floor_goal_and_all(tiny):
    shape = gguf_source(tiny).shape
    assert asked(Synthetic(shape, 0.6, 0.05), tiny, None, "identify.floor=50").origin["questions"] == 56
    assert asked(Synthetic(shape, 0.6, 0.05), tiny, None, "identify.until=all").origin["questions"] == 96
    assert asked(Synthetic(shape, 0.6, 0.05), tiny, None, "identify.floor=500").origin["questions"] == 96
    counts = [
        asked(Synthetic(shape, 0.15, 0.15), tiny, None, f"identify.overlap={goal}").origin["questions"]
        for goal in (0.3, 0.8, 0.95, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[2]
    assert counts[3] == 96


def test_a_run_that_was_killed_goes_on_to_the_same_profile(tiny, tmp_path):
    shape = gguf_source(tiny).shape
    whole = asked(Synthetic(shape, 0.15, 0.15), tiny)
    with pytest.raises(KeyboardInterrupt):
        asked(Synthetic(shape, 0.15, 0.15, stops_at=3), tiny, tmp_path / "cache")
    going_on, notes = Synthetic(shape, 0.15, 0.15), []
    again = asked(going_on, tiny, tmp_path / "cache", notes=notes)
    assert "going on from 2 finished batches" in notes[0]
    assert going_on.calls == whole.origin["questions"] // 8 - 2
    assert bytes_of(again, tmp_path, "a.safetensors") == bytes_of(whole, tmp_path, "b.safetensors")
    done = Synthetic(shape, 0.15, 0.15)
    assert bytes_of(asked(done, tiny, tmp_path / "cache"), tmp_path, "c.safetensors") == bytes_of(
        whole, tmp_path, "b.safetensors"
    )
    assert done.calls == 0


def test_asking_the_rest_goes_on_from_what_was_asked(tiny, tmp_path):
    """As the note says: ``--until all`` asks the rest."""
    shape = gguf_source(tiny).shape
    first = Synthetic(shape, 0.6, 0.05)
    asked(first, tiny, tmp_path / "cache")
    rest = Synthetic(shape, 0.6, 0.05)
    profile = asked(rest, tiny, tmp_path / "cache", "identify.until=all")
    assert (first.calls, rest.calls, profile.origin["questions"]) == (3, 9, 96)
    fresh = asked(Synthetic(shape, 0.6, 0.05), tiny, None, "identify.until=all")
    np.testing.assert_array_equal(profile.p_plus, fresh.p_plus)
    other = Synthetic(shape, 0.6, 0.05)
    asked(other, tiny, tmp_path / "cache", "identify.max_new_tokens=7")  # other answers are not taken
    assert other.calls == 3


def test_llama_cpp_goes_on_to_the_same_profile(make_tiny, tmp_path, monkeypatch):
    """Quantised arithmetic, several batches, the last one shorter: nothing hangs on what a runtime did before."""
    path = make_tiny("Q4_1")
    quick = ["identify.questions=14", "identify.max_new_tokens=24", "identify.until=all", "identify.batch_size=8"]

    def runtime():
        return LlamaCppRuntime(path, Settings(threads=1), sequences=5, source=gguf_source(path))

    with runtime() as opened:
        whole = bytes_of(asked(opened, path, None, *quick), tmp_path, "a.safetensors")
    with runtime() as opened:
        observe, calls = opened.observe, []

        def killed(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return observe(*arguments, **options)

        monkeypatch.setattr(opened, "observe", killed)
        with pytest.raises(KeyboardInterrupt):
            asked(opened, path, tmp_path / "cache", *quick)
    with runtime() as opened:
        again = asked(opened, path, tmp_path / "cache", *quick)
    assert again.origin["questions"] == 14
    assert bytes_of(again, tmp_path, "b.safetensors") == whole


def plain_overlap(stats, section, total):
    """The forecast as its docstring states it, neuron by neuron, with a full sort of every draw."""
    asked, rest = stats.spread.pairs, total - stats.spread.pairs
    delta = (stats.plus.active / stats.plus.tokens - stats.minus.active / stats.minus.tokens).ravel()
    squared = stats.spread.delta_variance(stats.plus, stats.minus).ravel()
    error = np.sqrt(squared)
    observed = np.array([d / e if e > 0 else 0.0 for d, e in zip(delta, error, strict=True)])
    mean, variance = observed[error > 0].mean(), observed[error > 0].var()
    shrink = max(variance - 1, 1e-6) / max(variance, 1 + 1e-6)
    expected = np.where(error > 0, error * (mean + shrink * (observed - mean)), delta)
    deviation = np.sqrt(shrink * squared + squared * asked / rest)
    random, found = np.random.default_rng(0), {"+": [], "-": []}
    for _ in range(12):
        final = (asked * delta + rest * (expected + deviation * random.standard_normal(len(delta)))) / total
        for sign, towards in (("+", 1), ("-", -1)):
            now, then = (plain_choice((towards * one).tolist(), section) for one in (delta, final))
            found[sign].append(len(now & then) / len(now | then) if now | then else 1.0)
    return min(float(np.mean(values)) for values in found.values())


def plain_choice(strength, section):
    order = sorted(range(len(strength)), key=lambda place: -strength[place])  # stable
    count = max(sum(one >= section.threshold - 1e-7 for one in strength), section.at_least)
    return {place for place in order[:count] if strength[place] > 0} & set(order[: section.at_most])


@pytest.mark.parametrize("selection", [[], ["select.at_least=3000"], ["select.at_most=40"], ["select.threshold=1"]])
def test_the_forecast_is_what_full_sorts_give(selection):
    """More neurons than are drawn at once, many of one delta, some that never change."""
    rng = np.random.default_rng(2)
    tokens = [rng.integers(5, 9, 20) for _ in range(2)]
    rates = np.clip(rng.uniform(-0.2, 0.6, 33_000), 0, 1)
    plus, minus = (counts_of(rng.binomial(one[:, None], rates), one) for one in tokens)
    section, stats = load_recipe("npti", selection).select, contrast_of(plus, minus)
    delta = stats.plus.probability() - stats.minus.probability()
    assert (delta == 0).sum() > 5000
    assert len(np.unique(delta)) < delta.size / 2
    assert expected_overlap(stats, section, 64) == plain_overlap(stats, section, 64)
