"""Two traits at once: their clamps unite, their shifts add, each with a strength of its own.

npti-export --trait calm --format peft --out calm
npti-export --trait extraversion+ --format peft --out lively
python examples/mix_traits.py calm lively "Tell me about your weekend."
"""

import sys

from load_adapter import ask
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import npti_export


def main(first, second, question):
    base = PeftConfig.from_pretrained(first).base_model_name_or_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    print(f"--- neither\n{ask(model, tokenizer, question)}\n")
    model.load_adapter(first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    for name in ("first", "second"):
        model.set_adapter(name)
        print(f"--- {name}\n{ask(model, tokenizer, question)}\n")
    model.set_adapter(["first", "second"])
    npti_export.set_strength(model, 0.7, "first")
    print(f"--- both, the first at 0.7\n{ask(model, tokenizer, question)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
