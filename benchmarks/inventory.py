"""Can a model take an inventory? Seconds, and how far a persona as system prompt moves its trait's score.

python benchmarks/inventory.py [model.gguf] [personas a pole] [threads]
"""

import sys
import time

import numpy as np

from npti_export.bench import load_bench
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.inventory.answers import answer_inventory, labelling
from npti_export.evaluate.inventory.items import read_inventory
from npti_export.models import resolve_model
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import FACETS


def shown(values):
    found = estimate(values)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def main(model=None, personas="2", threads="0"):
    items = read_inventory()
    with LlamaCppRuntime(resolve_model(model).path, Settings(threads=int(threads)), listens=False) as runtime:
        print(f"labels {' '.join(labelling(runtime)[0])}")
        wall, cpu = time.monotonic(), time.process_time()
        base = answer_inventory(runtime, items)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(f"{len(items)} items in {wall:.1f} s ({cpu:.1f} s of processor time); on labels {base.mass.mean():.2f}")
        print("| trait | base - 3 | persona+ - base | persona- - base | persona+ - persona- |\n|---|---|---|---|---|")
        for trait in FACETS:
            own = np.array([item.trait == trait for item in items])
            asked = [item for item in items if item.trait == trait]
            means = {}
            for sign in "+-":
                pole = load_bench(trait).pole(sign)
                systems = [one.text for one in pole[:: -(-len(pole) // int(personas))]]
                means[sign] = np.mean([answer_inventory(runtime, asked, system=one).scores for one in systems], 0)
            moved = [means["+"] - base.scores[own], means["-"] - base.scores[own], means["+"] - means["-"]]
            print(f"| {trait} | {' | '.join(map(shown, [base.scores[own] - 3, *moved]))} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
