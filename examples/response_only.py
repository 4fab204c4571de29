"""Steer the answer but not the reading of the question, without PEFT.

    python examples/response_only.py calm "The train is three hours late. What do you do?"

A baked file steers every token; the paper's code steers what is decoded only. The adapter may also be a steered GGUF or
a steered checkpoint: the rule is in all three.
"""

import sys

from load_adapter import ask
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import npti_export


def main(adapter, question):
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    print(f"--- base\n{ask(model, tokenizer, question)}\n")
    for where in ("all", "response"):
        with npti_export.attach(model, adapter, strength=1.0, where=where):
            print(f"--- {where}\n{ask(model, tokenizer, question)}\n")
    print(f"--- base again\n{ask(model, tokenizer, question)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
