import os
import signal
from pathlib import Path

import numpy as np
import pytest
from families import cut_tokenizer, write_tiny
from jobs import main_job, npti

from npti_export.models import default_model_path, gguf_source
from npti_export.rule import SteeringRule


def pytest_configure(config):
    """A worker of pytest-xdist gets a core of its own: runtimes that see all cores would fight for them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and all that it would start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("NPTI_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def default_model():
    return default_model_path()


@pytest.fixture(scope="session")
def tokenizer_fields(default_model):
    """The default model's tokenizer, cut to VOCABULARY tokens."""
    return cut_tokenizer(default_model)


def requantised(source, target, file_type):
    """``source`` by llama.cpp's own quantiser, every matrix but the embedding in the one type."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.pure, params.token_embedding_type, params.nthread = True, 0, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return Path(target)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory, tokenizer_fields):
    """make_tiny(kind, **sizes) -> path of a tiny GGUF; the same arguments give the same file."""
    made = {}

    def make(kind="F32", **sizes):
        key = (kind, *sorted(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            if kind == "Q2_0":  # which gguf-py cannot write
                made[key] = requantised(make(**sizes), folder / "tiny-Q2_0.gguf", kind)
                return made[key]
            made[key] = write_tiny(folder / f"tiny-{kind}.gguf", tokenizer_fields, kind, **sizes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny):
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_runtime(tiny):
    from npti_export.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(gguf_source(tiny), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_runtime, tmp_path_factory):
    """The tiny model as a transformers directory."""
    import copy

    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny_runtime.model.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_runtime.model.state_dict())
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    tiny_runtime.tokenizer.save_pretrained(directory)
    return directory


def random_rule(layers, width, seed=0, per_layer=(5, 7)):
    """A rule with shifts and clamps on different neurons, strong enough to be seen, and one layer left alone."""
    rng = np.random.default_rng(seed)
    shift = np.zeros((layers, width), np.float32)
    clamp = np.zeros((layers, width), bool)
    for layer in range(layers - 1):
        chosen = rng.permutation(width)
        shift[layer, chosen[: per_layer[0]]] = rng.uniform(0.2, 1.5, per_layer[0])
        clamp[layer, chosen[per_layer[0] : sum(per_layer)]] = True
    return SteeringRule(shift, clamp)


@pytest.fixture(scope="session")
def provenance(tiny_checkpoint):
    from npti_export.models import resolve_model
    from npti_export.rule_io import Provenance

    source = resolve_model(str(tiny_checkpoint))
    return Provenance(
        trait="calm",
        gamma=1.0,
        recipe="{}",
        model="tiny",
        model_type=source.model_type,
        fingerprint=source.identity,
        base=str(tiny_checkpoint),
    )


@pytest.fixture(scope="session")
def make_adapter(provenance, tmp_path_factory):
    """make_adapter(rule) -> directory of an adapter for the tiny model."""
    from npti_export.export.peft import write_adapter
    from npti_export.rule_io import SavedRule

    def make(rule, about=provenance):
        directory = tmp_path_factory.mktemp("adapter")
        write_adapter(SavedRule(rule, about), directory)
        return directory

    return make


@pytest.fixture
def cli_environment(tmp_path):
    """For subprocesses: their own cache, one thread, no network."""
    return {
        **os.environ,
        "NPTI_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """One uninterrupted run of the main job on the tiny model."""
    folder = tmp_path_factory.mktemp("finished")
    environment = {**os.environ, "NPTI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = npti(
        *main_job(tiny, "model.gguf", "--report", "report.json", "--save-profile", "p.safetensors"),
        environment=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done
