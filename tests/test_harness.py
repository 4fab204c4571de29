"""A task of lm-evaluation-harness on local data, in llama.cpp, where it is installed."""

import json

import numpy as np
import pytest
from conftest import random_rule
from test_bake import bake

from npti_export.errors import EvaluationError
from npti_export.evaluate.harness import harness_tasks
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

DOCUMENTS = [
    {"q": f"Question {number}: which one?", "choices": ["the red house", "a boat", "snow"], "gold": number % 3}
    for number in range(8)
]


def opened(path):
    return LlamaCppRuntime(path, Settings(threads=1), sequences=2, listens=False)


def test_a_local_task(tiny, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install npti-export[harness]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "docs.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in DOCUMENTS), encoding="utf-8")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choice = common | {
        "task": "ours_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    words = common | {
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
        first, second = harness_tasks(base, steered, [choice, words])
        with pytest.raises(EvaluationError, match="lm-evaluation-harness"):
            harness_tasks(base, steered, ["no_such_task"])
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


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    with pytest.raises(EvaluationError, match=r"pip install 'npti-export\[harness\]'"):
        harness_tasks(None, None, ["x"])
