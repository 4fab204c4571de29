"""A rule is the one that was written, to the bit, or it is refused; one that PEFT saved again is taken as it is."""

import base64
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import random_rule
from jobs import npti
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from npti_export.errors import AdapterError
from npti_export.export.peft import write_adapter
from npti_export.gguf.reader import read_gguf
from npti_export.rule import SteeringRule
from npti_export.rule_bytes import RULE_SHA256, encode_rule, rule_sha256
from npti_export.rule_io import SavedRule, load_rule, save_checkpoint_rule

DAMAGED = r"its steering rule is not the one that was written \(rule_sha256 in .* is damaged; make it again"


@pytest.fixture
def saved(provenance):
    plain = random_rule(3, 96)
    return SavedRule(SteeringRule(plain.shift, plain.clamp, plain.shift[::-1].copy()), provenance)


def flipped(data, place, draw):
    """One bit of a float32's fraction turned over: another number, as good as the first."""
    changed = bytearray(data)
    changed[place + draw.randrange(2)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def values_in(encoded):
    """Places of the values in an encoded rule."""
    length = int.from_bytes(encoded[:8], "little")
    header = json.loads(encoded[8 : 8 + length])
    for name in ("shift_value", "constant_value"):
        if name in header:
            begin, end = header[name]["data_offsets"]
            yield from range(8 + length + begin, 8 + length + end, 4)


def test_a_checkpoints_rule(saved, tmp_path):
    save_checkpoint_rule(saved, tmp_path)
    assert np.array_equal(load_rule(tmp_path).rule.constant, saved.rule.constant)
    path, draw = tmp_path / "npti.json", random.Random(0)
    content = json.loads(path.read_text())
    rule = base64.b64decode(content["rule"])
    for place in values_in(rule):
        damaged = base64.b64encode(flipped(rule, place, draw)).decode()
        path.write_text(json.dumps({**content, "rule": damaged}))
        with pytest.raises(AdapterError, match=r"npti\.json: " + DAMAGED):
            load_rule(tmp_path)
    del content["provenance"][RULE_SHA256]  # as of earlier versions, or by somebody who means it
    path.write_text(json.dumps({**content, "rule": damaged}))
    assert rule_sha256(load_rule(tmp_path).rule) != rule_sha256(saved.rule)


def test_an_adapters_rule(saved, tmp_path):
    write_adapter(saved, tmp_path)
    assert np.array_equal(load_rule(tmp_path).rule.constant, saved.rule.constant)
    path, draw = tmp_path / "adapter_model.safetensors", random.Random(0)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in draw.sample(range(begin, len(whole), 4), 40):
        path.write_bytes(flipped(whole, place, draw))
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: .*(not the one that was written|damaged)"):
            load_rule(tmp_path)
    path.write_bytes(whole)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"strength": 0.5}))  # is kept apart
    assert np.array_equal(load_rule(tmp_path).rule.shift, saved.rule.shift * np.float32(0.5))
    tensors = load_file(path)
    halves = {name: one.astype(np.float16) for name, one in tensors.items() if one.dtype == np.float32}
    save_file(tensors | halves, path)  # by somebody who converted it
    assert np.abs(load_rule(tmp_path).rule.shift - saved.rule.shift * 0.5).max() < 1e-3


def test_a_steered_files_rule(finished, tmp_path, cli_environment):
    path, draw = tmp_path / "m.gguf", random.Random(0)
    shutil.copy(finished[0] / "model.gguf", path)
    whole, entry = path.read_bytes(), read_gguf(path).by_key["npti.rule"]
    rule = encode_rule(load_rule(path).rule)
    begin = whole.index(rule, entry.position)
    for place in draw.sample(list(values_in(rule)), 10):
        path.write_bytes(flipped(whole, begin + place, draw))
        with pytest.raises(AdapterError, match=r"m\.gguf: " + DAMAGED):
            load_rule(path)
    for command in (["verify", path], ["--from", path, "--format", "peft", "--out", "again"]):
        done = npti(*command, environment=cli_environment, cwd=tmp_path)
        assert (done.returncode, "is not the one that was written" in done.stderr) == (2, True), done.stderr


def test_a_rule_is_the_same_in_every_format(saved, tmp_path):
    """Negative zeros and a constant of nothing are not kept by all of them."""
    wanted = rule_sha256(saved.rule)
    shift = np.where(saved.rule.shift == 0, np.float32(-0.0), saved.rule.shift)
    assert rule_sha256(SteeringRule(shift, saved.rule.clamp, saved.rule.constant)) == wanted
    without = SteeringRule(saved.rule.shift, saved.rule.clamp)
    assert rule_sha256(without) == rule_sha256(SteeringRule(without.shift, without.clamp, without.shift * 0)) != wanted
    assert rule_sha256(SteeringRule(shift.reshape(6, 48), saved.rule.clamp.reshape(6, 48))) != rule_sha256(without)
    for number, write in enumerate((write_adapter, save_checkpoint_rule)):
        folder = tmp_path / str(number)
        folder.mkdir()
        negative = SteeringRule(shift, saved.rule.clamp, saved.rule.shift * np.float32(-0.0))
        write(SavedRule(negative, saved.about), folder)
        assert np.array_equal(load_rule(folder).rule.shift, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_peft_saves_again_is_taken(saved, tiny_checkpoint, tmp_path, dtype):
    """Also one that was trained, or rounded, since: what it was made with says nothing of it."""
    (tmp_path / "a").mkdir()
    write_adapter(saved, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype)
    adapted = PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=True)
    adapted.save_pretrained(tmp_path / "same")
    assert np.array_equal(load_rule(tmp_path / "same").rule.shift, saved.rule.shift)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "npti_shift" in name:
                parameter.add_(1.0)
    adapted.save_pretrained(tmp_path / "trained")
    np.testing.assert_allclose(load_rule(tmp_path / "trained").rule.shift, saved.rule.shift + 1, rtol=1e-6)
    assert adapted.peft_config["default"].provenance[RULE_SHA256]  # only what is written lacks it
