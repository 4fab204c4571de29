"""What the statistics of identification cost at the sizes of large models, and how right their a95 is.

    python benchmarks/large_models.py [--shapes 30x1536 32x14336 80x28672] [--questions 24] [--plan]

First, what a layer costs beside its arithmetic: transformers' generation on models that compute next to nothing. Then
what counting one value takes of one core: one activation of a neuron and one input of its down projection, in
llama.cpp (which always counts on the processor) and in transformers where that computes on the processor, too.
Then, on the default model: a95 by the bins against sorting every activation that was positive, neuron by neuron.
Last, for each shape (LAYERSxWIDTH; 32x14336 is Llama 3's 8B, 80x28672 its 70B), in a process of its own, on random
counts: bytes of one trait's statistics, of the file that is kept of them and of the profile, and for each step of a job
how far the process grew, beside what its inputs take, and its processor time (of one core; disks may add to it). A
whole batch of 256 answers, from the first count to the sum, is measured up to a million neurons.

--plan adds what the paper's full job would take on GPUs that were not at hand: 36,000 questions a trait, five traits,
both poles. Measured here are a layer's cost beside its arithmetic, what counting takes of a processor, and what
statistics take; bandwidths and arithmetic are those of a data sheet (H100 SXM), of which a share is taken to be
reached.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import say

ANSWERS = 2 * 5 * 36_000
PROMPT, ANSWER = 130, 300  # tokens: the first is measured on the shipped bench, the second a guess (at most 500)
BANDWIDTH, ARITHMETIC = 0.6 * 3.35e12, 0.4 * 989e12  # bytes and floating-point operations a second, share reached
PCIE = 0.6 * 64e9  # bytes a second from GPU to host: PCIe 5.0 x16, one way
MEMORY = 0.9 * 80e9  # of one GPU
MOST = 256  # answers at once
# Bytes that a GPU moves for a value in transformers: what each kernel of runtimes.accumulate reads and writes, counted
# by hand, of the activation in the statistics (86) and of the down projection's input (46).
COUNTED = 132
HOURLY = 3.0  # dollars a GPU
# parameters, layers, width, bytes of weights, bytes of KV a token, GPUs of a worker, whether in transformers
PLANNED = {
    "8B, bfloat16": (8.0e9, 32, 14336, 16.1e9, 131_072, 1, True),
    "70B, bfloat16, over 4": (70.6e9, 80, 28672, 141e9, 327_680, 4, True),
    "8B, Q8_0 in llama.cpp": (8.0e9, 32, 14336, 8.5e9, 131_072, 1, False),
    "70B, Q4_K_M in llama.cpp": (70.6e9, 80, 28672, 42.5e9, 327_680, 1, False),
}
MB, PAGE = 1e6, os.sysconf("SC_PAGE_SIZE")


def accuracy(questions):
    """Relative errors of a95 on the default model, answers under both poles together."""
    import torch

    from npti_export.bench import load_bench
    from npti_export.identify.collect import contrast_prompts
    from npti_export.models import resolve_model
    from npti_export.recipe import load_recipe
    from npti_export.runtimes.transformers import TransformersRuntime

    bench, recipe = load_bench("extraversion"), load_recipe("npti")
    runtime = TransformersRuntime(resolve_model(None), device="cpu", dtype="float32")
    asked = bench.search(questions, 0)
    prompts = [prompt for sign in "+-" for prompt in contrast_prompts(runtime, bench, asked, sign, recipe, 0)]
    answers = runtime.generate(prompts, max_new_tokens=64, repetition_penalty=recipe.identify.repetition_penalty)
    found = runtime.activation_stats(answers).quantile(0.95)
    seen = [[] for _ in runtime.activations]
    for exchange in answers:
        places = slice(len(exchange.prompt), len(exchange.tokens) - 1)
        hooks = [
            act.register_forward_hook(
                lambda _m, _i, output, kept=kept, places=places: kept.append(output[0, places].numpy().copy())
            )
            for act, kept in zip(runtime.activations, seen, strict=True)
        ]
        with torch.inference_mode():
            runtime.logits(exchange.tokens)
        for hook in hooks:
            hook.remove()
    exact = np.stack([np.quantile(np.concatenate(kept), 0.95, axis=0, method="inverted_cdf") for kept in seen])
    counted = exact > 0
    error = np.abs(found[counted] / exact[counted] - 1)
    tokens = sum(len(one) for one in seen[0])
    worst = ", ".join(f"{q:g}% of neurons within {np.quantile(error, q / 100):.2%}" for q in (50, 95, 99, 100))
    say(f"a95 of {counted.sum():,} neurons over {tokens:,} tokens against sorting: {worst}")
    weighed = np.abs(found[counted] - exact[counted]).sum() / exact[counted].sum()
    say(f"  weighed by a95 itself: {weighed:.2%}")


def step_overhead():
    """Milliseconds of a generation step, and of a layer in it, where there is nothing to compute."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    steps, seconds = 48, {}
    for layers in (8, 40):
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        ids = torch.ones((1, 8), dtype=torch.long)
        with torch.inference_mode():
            took = []
            for _ in range(5):
                began = time.process_time()  # one thread: others on the machine make no difference
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
                took.append(time.process_time() - began)
        seconds[layers] = min(took[1:]) / steps
    layer = (seconds[40] - seconds[8]) / 32
    besides = seconds[8] - 8 * layer
    say(f"a step of generation: {1000 * layer:.2f} ms a layer and {1000 * besides:.1f} ms besides")
    return layer, besides


def counting(width=14336, answers=200, layers=2, steps=12):
    """Seconds of one core a value in llama.cpp; says what it is in transformers, too."""
    import torch

    from npti_export.models import ModelShape
    from npti_export.runtimes.accumulate import StatsAccumulator
    from npti_export.runtimes.llamacpp.counting import GateCounter

    rng = np.random.default_rng(0)
    gates = rng.normal(-0.6, 1.2, (layers, answers, width)).astype(np.float32)
    products = rng.normal(0, 0.5, (layers, answers, width)).astype(np.float32)
    whose, poles = list(range(answers)), [0] * (answers // 2) + [1] * (answers // 2)
    counter, values = GateCounter(ModelShape(layers, width, 8), "silu", 2, answers, "random"), gates.size * steps
    of_gates = of_products = 0.0
    for step in range(steps):
        began = time.process_time()
        counter.begin(whose, poles)
        for layer in range(layers):
            counter.see(layer)(gates[layer])
        if step == steps - 1:
            counter.results()
        between = time.process_time()
        for layer in range(layers):
            counter.see_product(layer)(products[layer])
        of_gates += between - began
        of_products += time.process_time() - between
    found = 1e9 * of_gates / values, 1e9 * of_products / values
    parts = f"{found[0]:.1f} the gate, {found[1]:.1f} the product"
    say(f"counting in llama.cpp: {sum(found):.1f} ns of a core a value ({parts})")
    torch.set_num_threads(1)
    accumulator = StatsAccumulator(layers, width, products=True)
    modules, downs = ([torch.nn.Identity() for _ in range(layers)] for _ in range(2))
    a = torch.nn.functional.silu(torch.from_numpy(gates)).view(layers, 4, -1, width).repeat(1, 1, 4, 1)
    for _ in range(2):  # the first one allocates
        began = time.process_time()
        with accumulator.listen(modules, torch.ones(a.shape[1:3], dtype=torch.bool), downs):
            for module, down, values_of_layer in zip(modules, downs, a, strict=True):
                module(values_of_layer)
                down(values_of_layer)
        seconds = time.process_time() - began
    say(f"counting in transformers on a processor: {1e9 * seconds / a.numel():.1f} ns of a core a value")
    return 1e-9 * sum(found)


def plan(layer, besides, counted, taken):
    """A table.

    Args:
        layer, besides: seconds of a step in transformers beside its arithmetic.
        counted: seconds of a core a value in llama.cpp.
        taken: by layers, what :func:`pairs` gives, and seconds of a batch: adding, the forecast, keeping.
    """
    parts = "steps, prompts and the pass that counts, counting, statistics"
    say(f"\n| model | answers at once | of a batch: {parts} | 1 GPU | 8 GPUs | cost |")
    say("|---" * 6 + "|")
    for name, (size, layers, width, weights, kv, gpus, torch) in PLANNED.items():
        room = gpus * MEMORY - weights - (4 * layers * width * 122 if torch else 0)
        together = int(min(MOST, room / (kv * (PROMPT + ANSWER))))
        reading = weights + together * kv * (PROMPT + ANSWER / 2)
        step = max(reading / BANDWIDTH, 2 * size * together / ARITHMETIC) + (layers * layer + besides if torch else 0)
        steps = ANSWER * step
        tokens = together * (PROMPT + (PROMPT + ANSWER if torch else 0))
        passes = 2 * size * tokens / ARITHMETIC
        values = together * ANSWER * layers * width
        if torch:  # in the end counts of answers, int32, and histograms of both poles
            copied = (4 * together + 2 * 4 * 122) * layers * width / PCIE
            core = 0.0
            counts = values * COUNTED / BANDWIDTH + copied
        else:  # at each step, float32: gates and products
            copied, core = 8 * values / PCIE, values * counted
            counts = copied + core
        (pair, handed), adding, forecast, keeping = taken[layers]
        computing = steps + passes + counts
        statistics = (pair + (handed if torch else 0)) * together / 2 * layers * width + adding + forecast
        statistics += min(keeping, computing / 20)  # see identify.collect
        parts = steps, passes, counts, statistics
        hours = ANSWERS / together * sum(parts) / 3600
        one = f"{hours:.0f} h" if gpus == 1 else f"({gpus}) {hours:.0f} h"
        shown = ", ".join(f"{part:.1f}" for part in parts) + " s"
        say(f"| {name} | {together} | {shown} | {one} | {hours * gpus / 8:.1f} h | {hours * gpus * HOURLY:,.0f} $ |")
        if core:
            job = ANSWERS / together * core / 3600
            say(f"  counting: {copied:.1f} s to the host, {core:.0f} s of a core, {job:.0f} h of the job")


class Peak:
    """How far this process's resident memory rises within the block."""

    def __enter__(self):
        self.start = self.high = self._now()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._began = time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.process_time() - self._began
        self._done.set()
        self._watcher.join()
        self.high = max(self.high, self._now())

    @staticmethod
    def _now():
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * PAGE

    def _watch(self):
        while not self._done.wait(0.005):
            self.high = max(self.high, self._now())

    def __str__(self):
        return f"{(self.high - self.start) / MB:7.0f} MB {self.seconds:6.2f} s"


def random_stats(layers, width, seed):
    """What a batch of eight questions could give."""
    from npti_export.stats import BIN_COUNT, ActivationStats, AnswerCounts, ContrastStats, PairSpread

    rng = np.random.default_rng(seed)
    few = rng.integers(0, 40, (8, 1, width), dtype=np.int32)

    def pole():
        active = np.repeat(few.astype(np.int16), layers, axis=1)
        histogram = np.empty((layers, width, BIN_COUNT), np.int32)
        histogram[:] = rng.integers(0, 60, (width, BIN_COUNT), dtype=np.int32)
        largest = rng.random((layers, width), np.float32) * 30
        product = rng.normal(size=(2, layers, width))
        product[1] = np.abs(product[1]) * 100
        tokens = np.full(8, 4000)
        stats = ActivationStats(8 * 4000, histogram.sum(-1, dtype=np.int64), histogram, largest, product=product)
        return stats, AnswerCounts(active, tokens)

    (plus, one), (minus, other) = pole(), pole()
    return ContrastStats(plus, minus, PairSpread.of_answers(one, other))


def nbytes(stats):
    arrays = [stats.spread.products, stats.spread.mixed]
    for one in (stats.plus, stats.minus):
        arrays += [one.active, one.histogram, one.largest, one.product]
    return sum(array.nbytes for array in arrays)


def pairs(layers, width):
    """Seconds of a pair of answers and a neuron: in sums over questions, and where transformers hands counts over."""
    from npti_export.stats import AnswerCounts, PairSpread

    rng = np.random.default_rng(0)
    few = rng.integers(0, 300, (2, MOST // 2, 1, width), dtype=np.int16)
    plus, minus = (AnswerCounts(np.repeat(one, layers, axis=1), rng.integers(300, 500, MOST // 2)) for one in few)
    with Peak() as peak:
        PairSpread.of_answers(plus, minus)
    wide = few[0, :, 0].astype(np.int32)
    say(f"  sums of {MOST} answers +{peak}, of {(plus.active.nbytes + minus.active.nbytes) / MB:.0f} MB of counts")
    summed = peak.seconds
    with Peak() as peak:  # from int32 and layers into answers, and these into their places
        narrowed = np.empty_like(plus.active)
        for layer in range(layers):
            narrowed[:, layer] = wide
        minus.active[list(range(MOST // 2))] = narrowed
    say(f"  hand over half      +{peak}")
    each = MOST // 2 * layers * width
    return summed / each, 2 * peak.seconds / each


def whole_batch(layers, width, total):
    """Memory of a batch in llama.cpp, from the first count to the sum, beside the statistics so far."""
    from npti_export.models import ModelShape
    from npti_export.runtimes.llamacpp.counting import GateCounter
    from npti_export.stats import ContrastStats, PairSpread

    gates = np.random.default_rng(0).normal(-0.6, 1.2, (MOST, width)).astype(np.float32)
    with Peak() as peak:
        counter = GateCounter(ModelShape(layers, width, 8), "silu", 2, MOST, "random")
        for _ in range(3):
            counter.begin(list(range(MOST)), [0] * (MOST // 2) + [1] * (MOST // 2))
            for layer in range(layers):
                counter.see(layer)(gates)
                counter.see_product(layer)(gates)
        (plus, minus), answers = counter.results(), counter.counts()
        spread = PairSpread.of_answers(answers[: MOST // 2], answers[MOST // 2 :])
        fresh = ContrastStats(plus, minus, spread)
        del counter, answers, plus, minus, spread
        total = total.absorb(fresh)
    say(f"  a whole batch       +{peak}, {MOST} answers of 3 tokens in llama.cpp")
    return total


def of_shape(layers, width, pipe):
    from npti_export.identify.select import pole_neurons
    from npti_export.identify.stopping import expected_overlap
    from npti_export.profile import profile_from_stats, read_profile, write_profile
    from npti_export.recipe import load_recipe
    from npti_export.stats import load_stats, save_stats

    pair = pairs(layers, width)
    total, fresh = random_stats(layers, width, 0), random_stats(layers, width, 1)
    say(f"\n{layers} x {width} = {layers * width:,} neurons: {nbytes(total) / MB:.0f} MB a trait, both poles")

    class Source:
        name, fingerprint = "random", "random"

    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        kept, profile_path = Path(folder, "state.safetensors"), Path(folder, "profile.safetensors")
        with Peak() as peak:
            total = total.absorb(fresh)
        say(f"  add a batch         +{peak}")
        adding = peak.seconds
        del fresh
        counts = total.counts()
        with Peak() as peak:
            counts = counts + counts
        say(f"  add on the driver   +{peak}")
        with Peak() as peak:
            expected_overlap(counts, load_recipe("npti").select, 2 * counts.spread.pairs)
        say(f"  forecast            +{peak}")
        forecast = peak.seconds
        del counts
        if layers * width < 1e6:
            total = whole_batch(layers, width, total)
        with Peak() as peak:
            save_stats(kept, total, {})
        pipe.send((pair, adding, forecast, peak.seconds))
        say(f"  keep                +{peak}, a file of {kept.stat().st_size / MB:.0f} MB")
        with Peak() as peak:
            profile = profile_from_stats("extraversion", total.plus, total.minus, Source, 0.95, {})
        say(f"  profile             +{peak}")
        del total
        with Peak() as peak:
            chosen = pole_neurons(profile, "+", 0.1, 1, None)
        say(f"  select              +{peak}, {len(chosen[0]):,} neurons")
        with Peak() as peak:
            write_profile(profile, profile_path, force=False)
        say(f"  write the profile   +{peak}, a file of {profile_path.stat().st_size / MB:.0f} MB")
        del profile
        with Peak() as peak:
            read_profile(profile_path)
        say(f"  read the profile    +{peak}")
        with Peak() as peak:
            load_stats(kept)
        say(f"  go on (read kept)   +{peak}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["30x1536", "32x14336", "80x28672"])
    parser.add_argument("--questions", type=int, default=24, help="of the default model; 0 leaves that part out")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    overhead, counted, taken = step_overhead(), counting(), {}
    if arguments.questions:
        accuracy(arguments.questions)
    spawn = multiprocessing.get_context("spawn")
    for shape in arguments.shapes:
        layers, width = map(int, shape.split("x"))
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=of_shape, args=(layers, width, theirs))
        process.start()
        theirs.close()
        taken[layers] = ours.recv()
        process.join()
    if arguments.plan:
        plan(*overhead, counted, taken)


if __name__ == "__main__":
    main()
