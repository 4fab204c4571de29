"""A personality on top of a LoRA: the adapter finds the activations, the LoRA the projections, in either order.

    python examples/with_lora.py path/to/lora calm "Write two lines about the sea."

The adapter must have been made for the LoRA's base model.
"""

import sys

from load_adapter import ask
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import npti_export


def main(lora, personality, question):
    base = PeftConfig.from_pretrained(lora).base_model_name_or_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.load_adapter(lora, adapter_name="style")
    print(f"--- LoRA\n{ask(model, tokenizer, question)}\n")
    model.load_adapter(personality, adapter_name="personality")
    print(f"--- LoRA and personality\n{ask(model, tokenizer, question)}\n")
    npti_export.set_strength(model, 0, "personality")
    print(f"--- LoRA again\n{ask(model, tokenizer, question)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
