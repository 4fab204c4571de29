"""A task of lm-evaluation-harness on local data, in llama.cpp, where it is installed."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import random_rule
from jobs import npti
from own_trait import write_trait
from test_bake import bake

from npti_export.errors import EvaluationError
from npti_export.evaluate.document import read_document
from npti_export.evaluate.harness import Harness, _is_greedy, _until, check_harness
from npti_export.evaluate.task_files import check_task_file
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

DOCUMENTS = [
    {"q": f"Question {number}: which one?", "choices": ["the red house", "a boat", "snow"], "gold": number % 3}
    for number in range(8)
]


CHOICE = {
    "task": "ours_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}


def common(data):
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}


@pytest.fixture(scope="module")
def trait_dir(tmp_path_factory):
    return write_trait(tmp_path_factory.mktemp("traits") / "pirate")


def opened(path):
    return LlamaCppRuntime(path, Settings(threads=1), sequences=2, listens=False)


def test_a_local_task(tiny, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install npti-export[harness]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "docs.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in DOCUMENTS), encoding="utf-8")
    choice = common(data) | CHOICE
    words = common(data) | {
        "task": "ours_words",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    out = tmp_path / "s.gguf"
    bake(tiny, out, random_rule(3, 96))
    with opened(tiny) as base, opened(out) as steered:
        first, second = Harness.of(base, [choice, words]).compared(steered)
        for runtime, found in ((base, first.score.base), (steered, first.score.steered)):
            right = []
            for one in DOCUMENTS:
                sums = []
                for option in one["choices"]:
                    whole, head = (runtime.encode_text(text) for text in (f"{one['q']} {option}", one["q"]))
                    (mean,) = runtime.log_likelihoods([Exchange(whole[: len(head)], whole[len(head) :])])
                    sums.append(mean * (len(whole) - len(head)))
                right.append(np.argmax(sums) == one["gold"])
            assert found.mean == pytest.approx(np.mean(right))
    assert (first.name, first.metric, first.score.change.n) == ("ours_choice", "acc", 8)
    assert (second.name, second.metric, second.score.base.mean) == ("ours_words", "exact_match", 0)


def test_greedy_continuations(tiny):
    with opened(tiny) as runtime:
        prompt = runtime.encode_text("Hello there")
        (found,) = runtime.generate([prompt], max_new_tokens=4, repetition_penalty=1.0)
        assert _is_greedy(runtime, found)
        other = (found.response[0], (found.response[1] + 1) % 300, *found.response[2:])
        assert not _is_greedy(runtime, Exchange(prompt, other))


@pytest.mark.parametrize(("until", "want"), [(["b"], "a "), ("c", "a b "), ([], "a b c"), (["x", " b"], "a")])
def test_answers_end_at_a_stop(tiny, monkeypatch, until, want):
    with opened(tiny) as runtime:
        monkeypatch.setattr(LlamaCppRuntime, "decode", lambda _self, _tokens: "a b c")
        assert _until(runtime, "Hello", {"until": until, "max_gen_toks": 2}) == want


def test_it_says_what_to_install(monkeypatch):
    install = r"cannot be imported .*; pip install 'npti-export\[harness\]'$"
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=install):
        check_harness(["hellaswag"])
    with pytest.raises(EvaluationError, match=install):
        Harness.of(None, ["hellaswag"])
    check_harness([])
    with pytest.raises(EvaluationError, match="--harness x: is left out by --skip capability"):
        check_harness(["x"], skipped=True)


@pytest.mark.parametrize(
    "text",
    [
        "process_docs: !function evil.process", "a: [{b: !function evil.f}]", "%TAG !y! !func\n---\na: !y!tion e.f",
        "a: !!python/object/apply:os.system [ls]", "a: !%66unction evil.f", "a: 1\n---\nb: !function e.f",
        "metric_list:\n- metric: ./evil", "metric_list:\n- {metric: [acc, someone/evil]}", "!function evil.f",
        "dataset_kwargs: {trust_remote_code: true}", "include: [good.yaml, sub/bad.yaml]", "include: sub/bad.yaml",
        "x: &x {include: sub/bad.yaml}\n<<: *x", "include: sub/first.yaml", "group: g\ntask: [sub/bad.yaml]",
        "? !function e.f\n: 1",
    ],
)  # fmt: skip
def test_task_files_that_run_code_are_refused(text, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.yaml").write_text("task: x")
    (tmp_path / "sub" / "bad.yaml").write_text("task: x\nprocess_docs: !function evil.f\n")
    (tmp_path / "sub" / "first.yaml").write_text("include: bad.yaml")
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"^--harness .*\.yaml: line \d+ .*; pass --trust-remote-code if you"):
        check_harness([str(path)])


@pytest.mark.parametrize("text", ["a: [", "a: " + "[" * 5000, "\x00", "x" * (1 << 21), "a: *b"])
def test_task_files_that_are_no_yaml(text, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"cannot be read as YAML|is larger than"):
        check_task_file(path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CHOICE), "", "a: &a [1, *a]", "include: task.yaml\nb: 2024-01-01\nc: =\nd: '!function e.f'",
        "include: none.yaml", f"include: {'x' * 5000}",
        "include: {a: 1}", "a: |\n  !function e.f\n# !function e.f", "? [1]\n: 2", "metric: acc",
    ],
)  # fmt: skip
def test_other_task_files_are_left_to_the_harness(text, tmp_path, monkeypatch):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    check_task_file(path)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    path.write_text("a: !function e.f")
    with pytest.raises(EvaluationError, match=r"pip install 'npti-export\[harness\]'$"):
        check_harness([str(path)], trusted=True)


def test_the_command_says_so_before_any_work(tiny, tmp_path, cli_environment):
    done = npti("evaluate", tiny, "--trait", "calm", "--base", tiny, "--harness", "no_such_task, other",
                environment=cli_environment, cwd=tmp_path)  # fmt: skip
    there = importlib.util.find_spec("lm_eval") is not None
    said = "--harness no_such_task: lm-evaluation-harness has no such task" if there else "npti-export[harness]"
    assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    done = npti("evaluate", tiny, "--harness", "x", "--skip", "capability", environment=cli_environment, cwd=tmp_path)
    assert (done.returncode, "--skip capability" in done.stderr) == (2, True)


def test_its_tasks_are_among_the_skills_of_an_evaluation(tiny, trait_dir, tmp_path, cli_environment):
    """A task of the user's own, in a YAML file, by the command."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install npti-export[harness]")
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(one) for one in DOCUMENTS), encoding="utf-8")
    task = common(tmp_path / "docs.jsonl") | CHOICE
    (tmp_path / "ours.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    out = tmp_path / "s.gguf"
    bake(tiny, out, random_rule(3, 96))
    environment = cli_environment | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = npti("evaluate", out, "--base", tiny, "--trait", f"{trait_dir}+", "--harness", "ours.yaml",
                "--harness-limit", "5", "--questions", "2", "--answer-tokens", "3", "--baselines", "none",
                "--no-prompts", "--skip", "cross-talk", "--skip", "inventory", "--threads", "1", "--any-model",
                "--json", "r.json", environment=environment, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    tasks = read_document(tmp_path / "r.json").capability.tasks
    assert [(one.name, one.source) for one in tasks][3:] == [("ours_choice", "lm-evaluation-harness")]
    with opened(tiny) as base, opened(out) as steered:
        broken = task | {"task": "broken", "doc_to_text": "{{ q"}
        with pytest.raises(EvaluationError, match=r"lm-evaluation-harness: \w+: "):
            Harness.of(base, [broken])
        (want,) = Harness.of(base, [str(tmp_path / "ours.yaml")], 5).compared(steered)
    assert tasks[3] == want
    assert want.score.change.n == 5
    assert "ours_choice:" in done.stdout
    for name, message in (("none.yaml", "there is no such file"), ("hellaswagg", "did you mean hellaswag")):
        done = npti("evaluate", out, "--harness", name, environment=environment, cwd=tmp_path)
        assert (done.returncode, message in " ".join(done.stderr.split())) == (2, True), done.stderr
