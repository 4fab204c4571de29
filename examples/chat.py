"""Ask a steered file and its base the same question, with stock llama.cpp and nothing of ours.

    python examples/chat.py model.gguf base.gguf "Your neighbour plays the drums at midnight. What do you do?"

base.gguf comes from: npti-export strip model.gguf --out base.gguf
"""

import sys

from llama_cpp import Llama


def ask(path, question):
    model = Llama(path, n_ctx=1024, verbose=False)
    messages = [{"role": "user", "content": question}]
    answer = model.create_chat_completion(messages, max_tokens=96, temperature=0.0, repeat_penalty=1.1)
    model.close()
    return answer["choices"][0]["message"]["content"].strip()


if __name__ == "__main__":
    *paths, question = sys.argv[1:]
    for path in paths:
        print(f"--- {path}\n{ask(path, question)}\n")
