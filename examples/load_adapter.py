"""Load an adapter with stock PEFT and turn its strength up and down while the model stays loaded.

npti-export --trait calm --format peft --out calm
python examples/load_adapter.py calm "The train is three hours late. What do you do?"
"""

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import npti_export  # before an adapter is read: teaches PEFT this type of adapter


def ask(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(adapter, question):
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)  # loads the base model that the adapter names
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    for strength in (0.0, 0.5, 1.0):  # 0 is exactly the base
        npti_export.set_strength(model, strength)
        print(f"--- strength {strength}\n{ask(model, tokenizer, question)}\n")
    with model.disable_adapter():
        print(f"--- off\n{ask(model, tokenizer, question)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
