"""What an attached adapter costs: generation speed, size, and the time to attach.

    python benchmarks/adapter.py [--pairs 9] [--tokens 64] [--dtype float32]

Generation on the default model, greedy, one sequence and a batch: the model as it is and that with an adapter of 1,000
shifts and 1,000 clamps take turns, by PEFT and by attach(); a ratio is the median over the pairs. As two noisy cores
blur a per cent or two, the time spent inside the wrappers, less that of the activations in them, is shown beside it.
Size and attach time are those of Llama-3-8B's shape (32 layers of 14,336 neurons), whose big matrices stay on the meta
device.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import load_model, say

import npti_export
from npti_export.attached import AttachedActivation
from npti_export.export.peft import write_adapter
from npti_export.fingerprint import fingerprint
from npti_export.rule import SteeringRule
from npti_export.rule_io import ADAPTER_WEIGHTS, Provenance, SavedRule
from npti_export.runtimes.base import chat
from npti_export.runtimes.transformers import TransformersRuntime

QUESTION = "Your neighbour plays the drums at midnight. What do you do?"


def random_rule(layers, width, shifts, clamps, seed=0):
    rng = np.random.default_rng(seed)
    places = rng.permutation(layers * width)
    shift, clamp = np.zeros(layers * width, np.float32), np.zeros(layers * width, bool)
    shift[places[:shifts]] = rng.uniform(0.01, 0.2, shifts)
    clamp[places[shifts : shifts + clamps]] = True
    return SteeringRule(shift.reshape(layers, width), clamp.reshape(layers, width))


def seconds(model, ids, tokens):
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


@contextmanager
def clock(kind):
    """Within the block, seconds spent in ``forward`` of a class of modules, in a list of one."""
    original, total = kind.forward, [0.0]

    def forward(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            total[0] += time.perf_counter() - started

    kind.forward = forward
    try:
        yield total
    finally:
        kind.forward = original


def share_inside(model, ids, tokens, wrapper, activation):
    """Share of the generation time that wrappers take beyond the activations in them."""
    with clock(wrapper) as outer, clock(activation) as inner:
        whole = seconds(model, ids, tokens)
    return (outer[0] - inner[0]) / whole


def generation(arguments, folder):
    import peft

    from npti_export.adapter.layer import NptiLayer

    source, _ = load_model()
    runtime = TransformersRuntime(source, dtype=arguments.dtype)
    rule = random_rule(source.shape.layers, source.shape.width, 1000, 1000)
    about = Provenance("calm", 1.0, "{}", source.name, source.model_type, source.identity)
    write_adapter(SavedRule(rule, about), folder)
    prompt = torch.tensor([runtime.encode(chat(None, QUESTION))])
    say(f"{runtime.dtype}, {torch.get_num_threads()} threads, {arguments.tokens} tokens, {arguments.pairs} pairs")
    for name in ("peft", "attach"):
        for batch in (1, 8):
            ids, ratios = prompt.repeat(batch, 1), []
            for turn in range(arguments.pairs + 2):
                if name == "peft":
                    adapted = peft.PeftModel.from_pretrained(runtime.model, folder)
                    steered = seconds(adapted, ids, arguments.tokens)
                    adapted.unload()
                else:
                    with npti_export.attach(runtime.model, folder):
                        steered = seconds(runtime.model, ids, arguments.tokens)
                base = seconds(runtime.model, ids, arguments.tokens)
                if turn > 1:  # the first two warm up
                    ratios.append(steered / base)
            activation = type(runtime.activations[0])
            if name == "peft":
                adapted = peft.PeftModel.from_pretrained(runtime.model, folder)
                share = share_inside(adapted, ids, arguments.tokens, NptiLayer, activation)
                adapted.unload()
            else:
                with npti_export.attach(runtime.model, folder):
                    share = share_inside(runtime.model, ids, arguments.tokens, AttachedActivation, activation)
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            spread = f"({low:.3f} to {high:.3f})"
            say(f"{name}, batch {batch}: {median:.3f} times the base's time {spread}; inside {share:.1%}")


def llama_3_8b(folder):
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.to_empty(device="cpu")
            torch.nn.init.ones_(module.weight)
    norms = [np.ones(4096, np.float32)] * 65
    rule = random_rule(32, 14336, 10_000, 20_000)
    about = Provenance("calm", 1.0, "{}", "8B", "llama", fingerprint(norms))
    write_adapter(SavedRule(rule, about), folder)
    say(f"adapter of Llama-3-8B's shape: {(folder / ADAPTER_WEIGHTS).stat().st_size / 1e6:.2f} MB")
    for name in ("PeftModel.from_pretrained", "attach"):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            if name == "attach":
                attached = npti_export.attach(model, folder)
                times.append(time.perf_counter() - started)
                attached.detach()
            else:
                adapted = PeftModel.from_pretrained(model, folder)
                times.append(time.perf_counter() - started)
                adapted.unload()
        say(f"{name}: {statistics.median(times):.2f} s (first {times[0]:.2f} s), fingerprint checked")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llama_3_8b(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        generation(arguments, Path(folder))


if __name__ == "__main__":
    main()
