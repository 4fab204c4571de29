"""Run as a script: llama.cpp's server on a free port, until its standard input ends. As a module: start it, ask it.

A process of its own, because xllamacpp brings another llama.cpp than llama-cpp-python, and so that it ends for sure.
"""

import json
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

SECONDS = 120  # for loading, and for an answer


def serve(model, adapters):
    """Like ``llama-server -m model --lora-scaled file:0,…``."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params = 512, 1, False, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.n_gpu_layers = 0
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()


@contextmanager
def started(model, adapters=()):
    """``ask(content, **more)`` of a server that runs for as long as the block lasts."""
    command = [sys.executable, __file__, str(model), *map(str, adapters)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        address = next((line.strip() for line in server.stdout if line.startswith("http://")), None)
        assert address, f"the server did not start (exit code {server.wait(SECONDS)})"
        yield lambda content, **more: _ask(address, content, more)
    finally:
        server.kill()
        server.wait(SECONDS)
        server.stdin.close()
        server.stdout.close()


def _ask(address, content, more):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12, **more}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
