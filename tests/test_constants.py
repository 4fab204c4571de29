"""Constants at the input of the down projection, in everything that holds a rule, against references written out."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import random_rule
from peft import LoraConfig, PeftModel, get_peft_model
from plain_rule import logits, plain_rule
from reference import ReferenceLlama, kl
from safetensors.numpy import load, save
from test_bake import TOKENS, llama_logits, tiny_of
from test_checkpoint import write as write_checkpoint_of
from test_programs import bake_program, hidden_of
from tolerances import ADAPTER_FLOAT32, KL_TINY_FLOAT, KL_TINY_QUANTISED_OTHERS, MLP_FLOAT32
from transformers import AutoModelForCausalLM

import npti_export
from npti_export.architectures import gguf_family
from npti_export.compiler.exact import compile_exact
from npti_export.errors import AdapterError, GGUFError, ProfileError
from npti_export.export.gguf import strip
from npti_export.gguf.mlp import FileMLP
from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.gguf.shards import read_model, shard_paths
from npti_export.job import Job
from npti_export.loader import RuntimeSettings
from npti_export.pipeline import run, verify_artifact
from npti_export.progress import Silent
from npti_export.rule import SteeringRule, compose
from npti_export.rule_io import (
    SavedRule,
    decode_rule,
    encode_rule,
    load_rule,
    save_checkpoint_rule,
)
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.steer import steered

IDS = torch.arange(5, 29).reshape(2, 12)


def constant_rule(widths, seed=0, plain=False):
    """A rule with constants, and unless ``plain`` with shifts and clamps, too; one neuron may have all three."""
    rule, rng = random_rule(len(widths), max(widths), seed), np.random.default_rng(seed + 9)
    constant = np.zeros(rule.shift.shape, np.float32)
    for layer, width in enumerate(widths):
        chosen = rng.permutation(width)[: width // 4]
        constant[layer, chosen] = rng.normal(0, 0.4, len(chosen))
        rule.shift[layer, width:], rule.clamp[layer, width:] = 0, False
    if plain:
        return SteeringRule(np.zeros_like(rule.shift), np.zeros_like(rule.clamp), constant)
    return SteeringRule(rule.shift, rule.clamp, constant)


def without_constant(rule):
    return SteeringRule(rule.shift, rule.clamp)


class ConstantLlama(ReferenceLlama):
    """The float64 reference, with a constant added in front of the down projection."""

    def __init__(self, path, constant):
        super().__init__(path)
        self.constant = constant

    def linear(self, x, name):
        if name.endswith("ffn_down"):
            x = x + self.constant[int(name.split(".")[1])][: x.shape[1]]
        return super().linear(x, name)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q2_K", "IQ1_M"])
@pytest.mark.parametrize("plain", [False, True], ids=["with shifts and clamps", "alone"])
def test_baked_into_a_gguf(make_tiny, tmp_path, kind, plain):
    base, out = tiny_of(make_tiny, kind), tmp_path / "s.gguf"
    rule = constant_rule(mlp_widths(read_gguf(base)), plain=plain)
    bake_program(base, out, compile_exact(rule, 4))
    want = ConstantLlama(base, rule.constant).logits(TOKENS, rule.shift, rule.clamp)
    error = kl(want, llama_logits(out))
    assert error < (KL_TINY_FLOAT if kind == "F32" else KL_TINY_QUANTISED_OTHERS)
    assert kl(want, ReferenceLlama(base).logits(TOKENS, rule.shift, rule.clamp)) > max(0.02, 4 * error)
    if plain:  # nothing but biases
        assert mlp_widths(read_gguf(out)) == mlp_widths(read_gguf(base))
        folded = sorted(set(read_gguf(out).by_name) - set(read_gguf(base).by_name))
        assert folded == [f"blk.{layer}.ffn_down.bias" for layer in range(len(rule.constant))]
    strip(out, tmp_path / "base.gguf", force=False)
    assert (tmp_path / "base.gguf").read_bytes() == base.read_bytes()


@pytest.mark.parametrize(
    "sizes",
    [
        {"family": "granite", "biases": ("ffn_down", "ffn_gate")},
        {"family": "deci", "width": (96, 0, 64, 32), "layers": 4},
        {"family": "qwen2"},
        {"split": 7, "biases": ("ffn_down",)},
    ],
    ids=str,
)
def test_other_bases(make_tiny, tmp_path, sizes):
    base = make_tiny(**sizes)
    whole = make_tiny(**{key: value for key, value in sizes.items() if key != "split"})
    rule = constant_rule(mlp_widths(read_gguf(whole)))
    bake_program(base, tmp_path / "s.gguf", compile_exact(rule, 4))
    count = len(read_model(base).parts)
    first = shard_paths(tmp_path / "s.gguf", count)[0]
    want = ConstantLlama(whole, rule.constant).logits(TOKENS, rule.shift, rule.clamp)
    assert kl(want, llama_logits(first)) < KL_TINY_FLOAT
    assert kl(want, ReferenceLlama(whole).logits(TOKENS, rule.shift, rule.clamp)) > 0.01
    strip(first, tmp_path / "base.gguf", force=False)
    for was, now in zip(read_model(base).parts, shard_paths(tmp_path / "base.gguf", count), strict=True):
        assert now.read_bytes() == was.path.read_bytes()


def test_folded_a_few_rows_at_a_time(tiny, tmp_path, monkeypatch):
    rule = constant_rule((96,) * 3, plain=True)
    bake_program(tiny, tmp_path / "a.gguf", compile_exact(rule, 4))
    monkeypatch.setattr("npti_export.export.biases._FOLDED", 500)
    bake_program(tiny, tmp_path / "b.gguf", compile_exact(rule, 4))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_weight_that_is_not_finite(tiny, tmp_path):
    base = tmp_path / "nan.gguf"
    data = bytearray(tiny.read_bytes())
    place = read_gguf(tiny).by_name["blk.1.ffn_down.weight"].offset
    data[place : place + 4] = np.float32(np.nan).tobytes()
    base.write_bytes(data)
    rule = constant_rule((96,) * 3, plain=True)
    with pytest.raises(GGUFError, match=r"nan.gguf: blk.1.ffn_down.weight: a weight is not finite"):
        bake_program(base, tmp_path / "s.gguf", compile_exact(rule, 4))


def test_the_mlps_of_a_file(make_tiny):
    """What verification in llama.cpp measures against, on inputs of its own, in float64."""
    base = make_tiny(biases=("ffn_down",))
    rule, x = constant_rule((96,) * 3), np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    reference = ConstantLlama(base, rule.constant)
    got = FileMLP(read_model(base), gguf_family("llama", "tiny"))
    for layer in range(3):
        want = reference.mlp(x.astype(float), layer, rule.shift[layer], rule.clamp[layer], None)
        assert np.abs(got(layer, x, rule) - want).max() < MLP_FLOAT32 * np.abs(want).max()
        assert np.abs(got(layer, x, without_constant(rule)) - want).max() > 0.01
    assert hidden_of(base) == 64


def test_a_checkpoint(tiny, tiny_checkpoint, tmp_path):
    rule = constant_rule((96,) * 3)
    write_checkpoint_of(tiny_checkpoint, rule, tmp_path / "out")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([TOKENS]))[0]
    want = ConstantLlama(tiny, rule.constant).logits(TOKENS, rule.shift, rule.clamp)
    assert kl(want, got) < KL_TINY_FLOAT
    assert kl(want, ReferenceLlama(tiny).logits(TOKENS, rule.shift, rule.clamp)) > 0.01


def test_the_reference_in_torch(tiny, tiny_runtime):
    rule = constant_rule((96,) * 3)
    with torch.inference_mode(), steered(tiny_runtime.activations, rule, tiny_runtime.down_projections):
        got = tiny_runtime.logits(TOKENS)
    want = ConstantLlama(tiny, rule.constant).logits(TOKENS, rule.shift, rule.clamp)
    assert np.abs(got - want).max() < ADAPTER_FLOAT32
    assert np.abs(tiny_runtime.logits(TOKENS) - ReferenceLlama(tiny).logits(TOKENS)).max() < ADAPTER_FLOAT32
    with pytest.raises(AdapterError, match="give these modules"), steered(tiny_runtime.activations, rule):
        pass
    assert isinstance(tiny_runtime, TransformersRuntime)


def test_rules_add_up():
    first, second = constant_rule((96,) * 3), constant_rule((96,) * 3, seed=1)
    np.testing.assert_allclose(compose([first, second]).constant, first.constant + second.constant, rtol=1e-6)
    np.testing.assert_array_equal(compose([first, without_constant(second)]).constant, first.constant)
    assert compose([without_constant(first)] * 2).constant is None
    assert (without_constant(first).constants, first.constants) == (0, 72)
    with pytest.raises(ProfileError, match="must be equal"):
        SteeringRule(first.shift, first.clamp, first.constant[:, :5])
    with pytest.raises(ProfileError, match="not finite"):
        SteeringRule(first.shift, first.clamp, np.full_like(first.constant, np.nan))


def test_kept_bytes_come_back():
    rule = constant_rule((96,) * 3)
    again = decode_rule(encode_rule(rule), "x")
    for name in ("shift", "clamp", "constant"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rule, name))
    plain = encode_rule(without_constant(rule))
    assert decode_rule(plain, "x").constant is None
    assert "constant_index" not in load(plain)
    for damage in ({"constant_index": np.array([288], np.int32)}, {"constant_value": np.ones(3, np.float32)}):
        with pytest.raises(AdapterError, match="neurons and values do not match"):
            decode_rule(save(load(encode_rule(rule)) | damage), "x")
    lacking = load(encode_rule(rule))
    del lacking["constant_value"]
    with pytest.raises(AdapterError, match="its steering rule is damaged"):
        decode_rule(save(lacking), "x")


def fresh(checkpoint, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def expected(model, rule, rows=None):
    with plain_rule(model, rule, rows):
        return logits(model, IDS)


def hooks(model):
    return sum(len(layer.mlp.down_proj._forward_pre_hooks) for layer in model.model.layers)


def scaled(rule, strength):
    return SteeringRule(rule.shift * np.float32(strength), rule.clamp, rule.constant * np.float32(strength))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["with shifts and clamps", "alone"])
def test_a_peft_adapter(tiny_checkpoint, make_adapter, tmp_path, dtype, plain):
    """Loaded, scaled, off, saved, loaded again, unloaded."""
    model, rule = fresh(tiny_checkpoint, dtype), constant_rule((96,) * 3, plain=plain)
    base, want, half = logits(model, IDS), expected(model, rule), expected(model, scaled(rule, 0.5))
    assert not torch.equal(want, expected(model, without_constant(rule)))
    adapted = PeftModel.from_pretrained(model, make_adapter(rule))
    assert torch.equal(logits(adapted, IDS), want)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, IDS), base)
    adapted.set_strength(0)
    assert torch.equal(logits(adapted, IDS), base)
    adapted.set_strength(0.5)
    assert torch.equal(logits(adapted, IDS), half)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(tiny_checkpoint, dtype), tmp_path)
    assert torch.equal(logits(again, IDS), half)
    np.testing.assert_array_equal(load_rule(tmp_path).rule.constant, rule.constant * np.float32(0.5))
    twin = copy.deepcopy(again)
    again.set_strength(0)
    assert torch.equal(logits(twin, IDS), half)
    assert torch.equal(logits(again.unload(), IDS), base)
    assert (hooks(again.get_base_model()), hooks(twin.get_base_model())) == (0, 3)


def test_two_adapters_of_which_one_has_constants(tiny_checkpoint, make_adapter):
    model = fresh(tiny_checkpoint)
    first, second = random_rule(3, 96, seed=3), constant_rule((96,) * 3)
    both, alone = expected(model, compose([first, second])), expected(model, first)
    adapted = PeftModel.from_pretrained(model, make_adapter(first), adapter_name="a")
    assert hooks(model) == 0
    adapted.load_adapter(make_adapter(second), adapter_name="b")
    assert torch.equal(logits(adapted, IDS), alone)
    adapted.base_model.set_adapter(["a", "b"])
    assert (logits(adapted, IDS) - both).abs().max() < ADAPTER_FLOAT32
    adapted.delete_adapter("b")
    adapted.set_adapter("a")
    assert torch.equal(logits(adapted, IDS), alone)
    assert hooks(model) == 0
    assert (both - alone).abs().max() > 0.01


def test_a_cast_leaves_the_constants_exact(tiny_checkpoint, make_adapter):
    rule = constant_rule((96,) * 3)
    adapted = PeftModel.from_pretrained(fresh(tiny_checkpoint), make_adapter(rule)).to(torch.bfloat16).half()
    for layer, constant in zip(adapted.get_base_model().model.layers, rule.constant, strict=True):
        assert torch.equal(layer.mlp.act_fn.npti_constant["default"].data, torch.from_numpy(constant))


@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_a_lora_of_the_down_projection(tiny_checkpoint, make_adapter, lora_first):
    """The LoRA reads the input with the constant, whichever came first."""
    rule, config = constant_rule((96,) * 3), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(fresh(tiny_checkpoint), config).get_base_model()
    want, without = expected(model, rule), expected(model, without_constant(rule))
    torch.manual_seed(0)
    other = fresh(tiny_checkpoint)
    directory = make_adapter(rule)
    if lora_first:
        other = get_peft_model(other, config).get_base_model()
        steered_model = PeftModel.from_pretrained(other, directory, adapter_name="calm")
    else:
        npti_export.attach(other, directory)
        steered_model = get_peft_model(other, config)
    assert (logits(steered_model, IDS) - want).abs().max() < ADAPTER_FLOAT32
    assert (want - without).abs().max() > 0.01


def test_the_response_only(tiny_checkpoint, provenance, tmp_path):
    from npti_export.export.peft import write_adapter

    model, rule = fresh(tiny_checkpoint), constant_rule((96,) * 3)
    rows = torch.zeros(2, 12, dtype=torch.bool)
    rows[0, 5:], rows[1, 8:] = True, True
    want = expected(model, rule, rows)
    write_adapter(SavedRule(rule, provenance, "response"), tmp_path)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    with npti_export.response_mask(adapted, rows):
        assert torch.equal(logits(adapted, IDS), want)
    plain = adapted.unload()
    with npti_export.attach(plain, tmp_path), npti_export.response_mask(plain, rows):
        assert torch.equal(logits(plain, IDS), want)
    assert not torch.equal(want, expected(plain, rule))


def test_merged(tiny_checkpoint, make_adapter):
    model, rule = fresh(tiny_checkpoint), constant_rule((96,) * 3)
    want = expected(model, scaled(rule, 0.8))
    adapted = PeftModel.from_pretrained(model, make_adapter(rule))
    adapted.set_strength(0.8)
    merged = adapted.merge_and_unload()
    assert hooks(merged) == 0
    assert kl(want.flatten(0, 1), logits(merged, IDS).flatten(0, 1)) < KL_TINY_FLOAT
    without = expected(fresh(tiny_checkpoint), dataclasses.replace(scaled(rule, 0.8), constant=None))
    assert kl(want.flatten(0, 1), without.flatten(0, 1)) > 0.01


def test_constants_alone_can_be_merged(tiny_checkpoint, make_adapter):
    rule = constant_rule((96,) * 3, plain=True)
    adapted = PeftModel.from_pretrained(fresh(tiny_checkpoint), make_adapter(rule))
    want = logits(adapted, IDS)
    merged = adapted.merge_and_unload()
    assert merged.config.intermediate_size == 96
    assert (logits(merged, IDS) - want).abs().max() < ADAPTER_FLOAT32


def test_gradients_reach_them(tiny_checkpoint, make_adapter):
    adapted = PeftModel.from_pretrained(
        fresh(tiny_checkpoint), make_adapter(constant_rule((96,) * 3)), is_trainable=True
    )
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for layer in adapted.get_base_model().model.layers:
        assert layer.mlp.act_fn.npti_constant["default"].grad.abs().max() > 0


def test_attached_and_detached(tiny_checkpoint, provenance, make_adapter, tmp_path):
    model, rules = fresh(tiny_checkpoint), [constant_rule((96,) * 3), constant_rule((96,) * 3, seed=1, plain=True)]
    base, want = logits(model, IDS), expected(model, compose(rules))
    alone, half = expected(model, rules[1]), expected(model, scaled(rules[1], 0.5))
    save_checkpoint_rule(SavedRule(rules[1], provenance), tmp_path)
    first, second = npti_export.attach(model, make_adapter(rules[0])), npti_export.attach(model, tmp_path)
    assert (logits(model, IDS) - want).abs().max() < ADAPTER_FLOAT32
    first.detach()
    assert torch.equal(logits(model, IDS), alone)
    second.strength = 0.5
    assert torch.equal(logits(model, IDS), half)
    second.detach()
    assert torch.equal(logits(model, IDS), base)
    assert hooks(model) == 0
    assert not torch.equal(base, alone)


def test_a_compiled_model_notices(tiny_checkpoint, make_adapter):
    model, rule = fresh(tiny_checkpoint), constant_rule((96,) * 3)
    base, want = logits(model, IDS), expected(model, rule)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(logits(model, IDS), base)
    for _ in range(2):
        with npti_export.attach(model, make_adapter(rule)) as attached:
            assert (logits(model, IDS) - want).abs().max() < ADAPTER_FLOAT32
            attached.strength = 0
            assert torch.equal(logits(model, IDS), base)
        assert torch.equal(logits(model, IDS), base)
    torch.compiler.reset()


def test_a_model_without_a_down_projection(tiny_checkpoint, make_adapter):
    model = fresh(tiny_checkpoint)
    for layer in model.model.layers:
        layer.mlp.down = layer.mlp.down_proj
        del layer.mlp.down_proj
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    base = logits(model, IDS)
    with pytest.raises(AdapterError, match="LlamaMLP has no down_proj beside it, at whose"):
        npti_export.attach(model, make_adapter(constant_rule((96,) * 3)))
    with pytest.raises(AdapterError, match="has no down_proj"):
        PeftModel.from_pretrained(model, make_adapter(constant_rule((96,) * 3)))
    assert torch.equal(logits(model, IDS), base)


@pytest.mark.parametrize("format_name", ["gguf", "checkpoint", "peft"])
@pytest.mark.parametrize("plain", [False, True], ids=["with shifts and clamps", "alone"])
def test_the_main_job_from_an_adapter(tiny, tiny_checkpoint, make_adapter, tmp_path, format_name, plain):
    """Verified in the artifact's own runtime, layer by layer for a GGUF; the rule goes with it."""
    rule = constant_rule((96,) * 3, plain=plain)
    job = Job(
        traits=(),
        out=tmp_path / "out.gguf",
        format=format_name,
        model=str(tiny if format_name == "gguf" else tiny_checkpoint),
        recipe="npti",
        overrides=("verify.prompts=2", "verify.answer_tokens=8"),
        rule_from=make_adapter(rule),
        runtime=RuntimeSettings(threads=1 if format_name == "gguf" else 0),
    )
    report = run(job, Silent())
    assert report["neurons"]["constant"] == rule.constants
    assert report["fidelity"]["kl_rule_artifact"] < report["fidelity"]["limit"] < report["fidelity"]["kl_rule_base"]
    np.testing.assert_array_equal(load_rule(tmp_path / "out.gguf").rule.constant, rule.constant)
    assert bool(report["neurons"]["extra_width"]) == (not plain and format_name != "peft")
    again = dataclasses.replace(job, out=None, rule_from=tmp_path / "out.gguf")
    assert verify_artifact(again, Silent())["fault"] is None
