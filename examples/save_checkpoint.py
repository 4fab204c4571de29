"""From an adapter to a checkpoint that needs none of our code (Llama, Mistral and Qwen2 models).

    python examples/save_checkpoint.py calm calm-model "The train is three hours late. What do you do?"

The same on the command line, streamed and verified: npti-export --from calm --format checkpoint --out calm-model
"""

import sys

from load_adapter import ask
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import npti_export


def main(adapter, directory, question):
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    npti_export.set_strength(model, 1.0)
    print(f"--- adapter\n{ask(model, tokenizer, question)}\n")
    merged = model.merge_and_unload()  # a plain LlamaForCausalLM with a wider MLP
    merged.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory)
    print(
        f"--- {type(again).__name__}, MLP width {again.config.intermediate_size}\n{ask(again, tokenizer, question)}\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
