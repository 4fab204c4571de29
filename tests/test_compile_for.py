"""What the compiler learns of a model, in both runtimes, against the same model in float64."""

import json

import numpy as np
import pytest
from conftest import random_rule
from jobs import QUICK, npti
from reference import ReferenceLlama, kl
from tolerances import ADAPTER_FLOAT32, KL_EXACT_FITTED, KL_TWO_ENGINES, KV_FLOAT16, STREAM_LLAMACPP

from npti_export.compile_for import FileCompiler
from npti_export.compile_in_torch import TorchCompiler
from npti_export.compiler.exact import compile_exact
from npti_export.compiler.kinds import parse_program
from npti_export.errors import ModelError
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

QUESTIONS = [f"What would you tell {name} about the {thing}?" for name in ("Ana", "Ben") for thing in "abcd"]
RECIPE = load_recipe("npti", ["compile.calibration_tokens=100", "verify.answer_tokens=8", "compile.clamp_units=3"])


class Watching(ReferenceLlama):
    """Keeps what goes into the norms before MLPs and what comes out of them."""

    def norm(self, x, name):
        out = super().norm(x, name)
        if name.endswith("ffn_norm.weight"):
            self.passes.append((x, out))
        return out


@pytest.fixture(scope="module", params=["llama.cpp", "torch"])
def compiler(request, tiny, tiny_runtime):
    if request.param == "torch":
        yield TorchCompiler(tiny_runtime, RECIPE, QUESTIONS, Silent())
        return
    with LlamaCppRuntime(tiny, Settings(threads=1), sequences=4, source=gguf_source(tiny)) as runtime:
        yield FileCompiler(runtime, RECIPE, QUESTIONS, Silent())


@pytest.fixture(scope="module")
def rule():
    return random_rule(3, 96)


def test_what_mlps_read_and_how_large_their_stream_is(compiler, rule, tiny):
    reference = Watching(tiny)
    streams, inputs = [[], [], []], [[], [], []]
    for tokens in compiler.sequences:
        reference.passes = []
        reference.logits(tokens, rule.shift, rule.clamp)
        for layer, (stream, x) in enumerate(reference.passes):
            streams[layer].append(stream)
            inputs[layer].append(x)
    total = sum(map(len, compiler.sequences))
    assert total > 100
    kept = sorted({round(place) for place in np.linspace(0, total - 1, 100).tolist()})
    atol = ADAPTER_FLOAT32 if isinstance(compiler, TorchCompiler) else 20 * KV_FLOAT16
    for layer, sample in enumerate(compiler.calibration(rule).samples):
        np.testing.assert_allclose(sample.inputs, np.concatenate(inputs[layer])[kept], atol=atol)
        sizes = np.square(np.concatenate(streams[layer])[kept]).sum(-1)
        assert sample.sensitivity == pytest.approx(np.mean(1 / sizes), rel=STREAM_LLAMACPP)
        touched = np.flatnonzero(rule.clamp[layer] | (rule.shift[layer] != 0))
        np.testing.assert_array_equal(sample.neurons.index, touched)
        for name in ("gate", "up"):
            weight = reference.tensors[f"blk.{layer}.ffn_{name}.weight"][touched]
            np.testing.assert_allclose(getattr(sample.neurons, name), weight, atol=1e-7)
        down = reference.tensors[f"blk.{layer}.ffn_down.weight"][:, touched]
        np.testing.assert_allclose(sample.neurons.down, down, atol=1e-7)


def test_a_program_is_measured_against_the_rule(compiler, rule, tiny):
    """One that does nothing is as far away as the base is; the one that is compiled is near."""
    reference, judged = ReferenceLlama(tiny), compiler.sequences[-6:]
    rows = [(reference.logits(one, rule.shift, rule.clamp), reference.logits(one)) for one in judged]
    apart = kl(*(np.concatenate(side) for side in zip(*rows, strict=True)))
    measure = compiler.measure(rule)
    nothing = compile_exact(SteeringRule(np.zeros_like(rule.shift), np.zeros_like(rule.clamp)), 3)
    assert measure(nothing) == pytest.approx(apart, rel=KL_TWO_ENGINES)
    compiled = compiler.compile(rule, parse_program("exact"), compiler.calibration(rule))
    assert measure(compiled.program) < KL_EXACT_FITTED < 0.01 * apart
    assert measure(compiled.program) < 0.5 * measure(compile_exact(rule, 3))
    biases = compiler.compile(rule, parse_program("bias"), compiler.calibration(rule)).program
    assert biases.widest == 0
    assert measure(compiled.program) < measure(biases) < 0.7 * apart


def test_without_a_question_nothing_is_compiled(tiny_runtime):
    with pytest.raises(ModelError, match="there is no question to ask; give --bench"):
        TorchCompiler(tiny_runtime, RECIPE, [], Silent())


def test_a_checkpoint_of_biases_and_one_of_units(tiny_checkpoint, tmp_path, cli_environment):
    """Zero and some extra neurons, nearer to the rule than the model; verified again from what is on disk."""
    found = {}
    for program in ("bias", "budget:40%", "exact"):
        job = ["--trait", "extraversion+", "--model", tiny_checkpoint, "--recipe", "npti", *QUICK, "--program", program]
        job += ["--set", "compile.calibration_tokens=200", "--format", "checkpoint", "--out", program[:4]]
        done = npti(*job, "--report", f"{program[:4]}.json", environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        report = found[program] = json.loads((tmp_path / f"{program[:4]}.json").read_text())
        assert report["fidelity"]["kl_rule_artifact"] < report["fidelity"]["limit"]
        config = json.loads((tmp_path / program[:4] / "config.json").read_text())
        assert config["intermediate_size"] == 96 + report["neurons"]["extra_width"]
        done = npti("verify", program[:4], "--json", environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = json.loads(done.stdout)["fidelity"]["kl_rule_artifact"]
        assert again == pytest.approx(report["fidelity"]["kl_rule_artifact"], rel=0.01)
    assert [one["neurons"]["extra_width"] for one in found.values()] == [0, 32, 256]
    bias, budget, exact = (one["fidelity"]["kl_rule_artifact"] for one in found.values())
    assert exact < KL_EXACT_FITTED < budget < bias < 0.7 * found["bias"]["fidelity"]["kl_rule_base"]


def test_programs_are_for_formats_with_neurons(tiny_checkpoint, tmp_path, cli_environment):
    job = ["--trait", "extraversion+", "--model", tiny_checkpoint, "--format", "peft", "--program", "bias"]
    done = npti(*job, "--out", "x", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "--program says what extra neurons may cost; leave it out for this format" in done.stderr
