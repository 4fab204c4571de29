"""What a rule is read from: profiles, adapters, steered checkpoints, constants, dials."""

import json
import math
import struct
from pathlib import Path

import fuzz_seeds
import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load, save

from fuzz_targets.target import HIDDEN, LAYERS, WIDTH, Target
from npti_export.dial.adapters import check_adapters
from npti_export.dial.index import load_dial, parse_mix
from npti_export.errors import TraitError
from npti_export.fingerprint import Fingerprint
from npti_export.gguf.reader import read_gguf
from npti_export.inspection import inspect_file
from npti_export.models import ModelShape, gguf_source
from npti_export.profile import NeuronProfile, write_profile
from npti_export.profile_io import load_profile
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.rule_io import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT_FILE,
    Provenance,
    SavedRule,
    adapter_tensors,
    decode_rule,
    encode_rule,
    load_rule,
    save_checkpoint_rule,
)
from npti_export.traits import parse_recorded
from npti_export.vectors import read_vector


def _profile(path):
    profile = load_profile(path, ModelShape(LAYERS, WIDTH, HIDDEN))
    for name in ("p_plus", "p_minus", "a95_plus", "a95_minus"):
        values = getattr(profile, name)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    if path.suffix != ".json":
        assert 0 <= min(profile.p_plus.min(), profile.p_minus.min()) <= max(profile.p_plus.max(), 0) <= 1
        write_profile(profile, path, force=True)
        assert np.array_equal(load_profile(path, ModelShape(LAYERS, WIDTH, HIDDEN)).delta, profile.delta)
    json.dumps(inspect_file(path))


def _rule(path):
    """An adapter, a steered checkpoint: the rule is whole, and comes back from its short form."""
    saved = load_rule(path.parent)
    assert np.isfinite(saved.rule.shift).all()
    assert saved.rule.shift.shape == saved.rule.clamp.shape
    assert np.array_equal(decode_rule(encode_rule(saved.rule), "it").shift, saved.rule.shift)
    for trait in saved.about.trait.split():
        parse_recorded(trait)
    json.dumps(inspect_file(path.parent))


def _constant(path):
    base = path.parent / "base.gguf"
    found = read_vector(path, gguf_source(base), any_model=False)
    assert found.constant.shape == (LAYERS, WIDTH)
    assert np.isfinite(found.constant).all()


def _dial(path):
    dial = load_dial(path.parent)
    assert all(Path(one).name == one for one in (dial.base, *(one.file for one in dial.adapters)))
    try:
        scales = [dial.scales(parse_mix(pole, {pole[:-1]})) for pole in dial.poles]
    except TraitError:
        return
    assert all(len(one) == len(dial.adapters) and all(map(math.isfinite, one)) for one in scales)


def about():
    """A provenance."""
    prints = Fingerprint("0" * 64, "1" * 64, "2" * 64)
    return Provenance("openness+ calm:0.5", 1.0, load_recipe("npti").to_json(), "tiny", "llama", prints, None, "mit")


def rule():
    """A rule with all that a rule can have."""
    found = fuzz_seeds.rule_for([WIDTH] * LAYERS)
    constant = np.random.default_rng(1).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    return SteeringRule(found.shift, found.clamp, constant)


def _adapter(file):
    def prepare(folder):
        saved = SavedRule(rule(), about())
        config = {
            "peft_type": "NPTI",
            "layers": LAYERS,
            "width": WIDTH,
            "strength": 1.0,
            "where": "all",
            "constant": True,
            "base_model_name_or_path": "tiny",
            "provenance": saved.about.to_dict(),
        }
        contents = {
            ADAPTER_CONFIG: json.dumps(config, indent=1).encode(),
            ADAPTER_WEIGHTS: save(adapter_tensors(saved)),
        }
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        return [contents[file]]

    return prepare


def _checkpoint(folder):
    save_checkpoint_rule(SavedRule(rule(), about()), folder)
    return [(folder / CHECKPOINT_FILE).read_bytes()]


def _inner_rule(path):
    decoded = decode_rule(path.read_bytes(), str(path))
    assert np.isfinite(decoded.shift).all()


def _profile_folder(folder):
    rng = np.random.default_rng(0)
    p, q, a, b = (rng.random((LAYERS, WIDTH)).astype(np.float32) for _ in range(4))
    profile = NeuronProfile("openness", p, q, a, b, "0" * 64, {"model": "tiny", "questions": 3}, matched_plus=a - b)
    write_profile(profile, folder / "p.safetensors", force=True)
    whole = (folder / "p.safetensors").read_bytes()
    return [whole, without_sum(whole)]


def without_sum(data):
    """A profile of an earlier version, whose numbers are believed as they are."""
    tensors = load(data)
    (length,) = struct.unpack("<Q", data[:8])
    said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["npti.profile"])
    del said["sha256"]
    return save(tensors, metadata={"npti.profile": json.dumps(said)})


def _published(folder):
    rows = {str(layer): [[layer, neuron, 0.25, 0.5, 1.5] for neuron in (1, 5)] for layer in range(LAYERS)}
    for name in ("Openness_dict.json", "Openness_reversed_dict.json"):
        (folder / name).write_text(json.dumps(rows))
    return [json.dumps(rows).encode()]


def _with_base(data):
    def prepare(folder):
        fuzz_seeds.write_base(folder / "base.gguf")
        return [data]

    return prepare


def _dial_folder(folder):
    adapters = [
        {"id": 0, "trait": "openness+", "kind": "shift", "file": "openness+.shift.gguf"},
        {"id": 1, "trait": "openness+", "kind": "clamp", "file": "openness+.clamp.gguf"},
        {"id": 2, "trait": "extraversion-", "kind": "shift", "file": "extraversion-.shift.gguf"},
        {"id": 3, "traits": ["openness+", "extraversion-"], "kind": "overlap", "file": "both.overlap.gguf"},
    ]
    return [json.dumps({"npti_dial": 1, "base": "base.gguf", "adapters": adapters, "mixed": 2}, indent=1).encode()]


_CONSTANT = json.dumps({"layers": LAYERS, "width": WIDTH, "constant": [[0, 1, 0.5], [1, 63, -2.5]]})


_HALF = np.full((LAYERS, WIDTH), 0.5, np.float32)


def _dial_gguf(path):
    """A file of a dial is a LoRA that llama-server scales as the dial means it."""
    check_adapters(path.parent, load_dial(path.parent), some_missing=True)
    assert read_gguf(path).text("general.type") == "adapter"


def _dial_files(folder):
    (index,) = _dial_folder(folder)
    (folder / "index.json").write_bytes(index)
    writer = GGUFWriter(folder / "l.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", np.ones((1, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (folder / "l.gguf").read_bytes()
    (folder / "l.gguf").unlink()
    return [data]


TARGETS = {
    "dial-gguf": Target("bytes", "openness+.shift.gguf", _dial_files, _dial_gguf),
    "profile": Target("safetensors", "p.safetensors", _profile_folder, _profile),
    "published": Target("json", "Openness_dict.json", _published, _profile),
    "adapter-config": Target("json", ADAPTER_CONFIG, _adapter(ADAPTER_CONFIG), _rule),
    "adapter-weights": Target("safetensors", ADAPTER_WEIGHTS, _adapter(ADAPTER_WEIGHTS), _rule),
    "checkpoint": Target("json", CHECKPOINT_FILE, _checkpoint, _rule),
    "rule": Target("safetensors", "rule.bin", lambda folder: [encode_rule(rule())], _inner_rule),
    "constant-json": Target("json", "c.json", _with_base(_CONSTANT.encode()), _constant),
    "constant": Target("safetensors", "c.safetensors", _with_base(save({"constant": _HALF})), _constant),
    "dial": Target("json", "index.json", _dial_folder, _dial),
}
