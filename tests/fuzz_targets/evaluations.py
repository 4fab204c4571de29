"""Evaluations and what goes into one or comes beside it: documents, cards, tests of skill, judges' verdicts."""

import asyncio
import json

import yaml
from documents import sample_document

from fuzz_targets.target import Target, journal, plain
from npti_export.bench.lines import encodable
from npti_export.evaluate.capability.tasks import read_passages, read_tasks
from npti_export.evaluate.card import check_card, section
from npti_export.evaluate.document import Estimate, Sweep, SweepPoint, read_document
from npti_export.evaluate.judge.verdicts import Verdict, VerdictJournal
from npti_export.evaluate.supplements import AblationRecord, TrialRecord, TuningRecord, read_ablation, read_tuning
from npti_export.evaluate.task_files import check_task_file
from npti_export.export.hub import _fault
from npti_export.generators.base import Request
from npti_export.generators.endpoint import Endpoint, EndpointSettings
from npti_export.report_page.page import render_page


def _document(path):
    document = read_document(path)
    path.write_text(document.to_json(), encoding="utf-8")
    assert read_document(path) == document
    assert encodable(section(document))


def _page(path):
    page = render_page(read_document(path))
    assert encodable(page)
    assert page.count("<script") == 1  # ours


def _near(mean=0.1):
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1, n=9)


_ABOUT = {
    "model": {"name": "tiny", "fingerprint": "0" * 64},
    "pole": "openness+",
    "recipe": "npti",
    "settings": {"seed": 0},
    "base_fluency": -1.0,
}


def _tuning(folder):
    trial = TrialRecord(
        number=0, label="a", select={"threshold": 0.1}, rule={"gamma": 1.0}, gain=_near(), damage=_near(),
        fluency=_near(), within=True,
    )  # fmt: skip
    record = TuningRecord(
        **_ABOUT, budget={"damage": 0.1}, trials=[trial], failed=0, pareto=sample_document().pareto, confirmation=None
    )
    return [record.to_json().encode()]


def _ablation(folder):
    points = [SweepPoint(value=1.0, gain=_near(), fluency=_near())]
    return [AblationRecord(**_ABOUT, sweeps=[Sweep(setting="gamma", points=points)], notes=["x"]).to_json().encode()]


def _tasks(path):
    for one in read_tasks(path).questions:
        assert one.options[one.right] == one.answer
        assert encodable(one.text)


def _verdicts(path):
    journal = VerdictJournal(path)
    try:
        for one in journal._known.values():
            assert one.rating is None or 1 <= one.rating <= 5
        journal.add("0" * 64, "judge", "trait", Verdict(3.0))
    finally:
        journal.close()


_TASK = (
    '{"question": "2 + 2?", "options": ["3", "4"], "answer": "4"}\n'
    '{"question": "1 + 1?", "options": ["2", "4"], "answer": "2"}\n'
)


_VERDICT = {"key": "a" * 64, "judge": "j", "what": "trait", "rating": 3}


def _task_file(path):
    """What is let through names no code: neither by a tag, nor by a key, in the file or in what it includes."""
    check_task_file(path)
    for file in (path, path.parent / "base.yaml"):
        for token in yaml.scan(file.read_bytes()):
            assert not isinstance(token, yaml.TagToken) or _is_plain(*token.value), file
    assert b"trust_remote_code:" not in path.read_bytes()


def _is_plain(handle, name):
    """Whether a tag is one of YAML's own: ``!``, ``!!str`` or ``!<tag:yaml.org,2002:str>``."""
    if handle is None:
        return name == "!" or (name.startswith("tag:yaml.org,2002:") and "python" not in name)
    return handle == "!!" and "python" not in name


def _task_folder(folder):
    (folder / "base.yaml").write_text("output_type: multiple_choice\nmetric_list:\n  - metric: acc\n")
    return [_YAML.encode()]


_YAML = """task: ours
include: base.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: &choices ["a", "b"]
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
metadata: {version: 1.0, again: *choices}
"""


def _completion(path):
    """What an endpoint answers, read by the library of the endpoint's makers and by ours, without a network."""
    import httpx2
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    body = path.read_bytes()
    headers = {"content-type": "application/json"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=body))
    endpoint = Endpoint(EndpointSettings("http://127.0.0.1:1/v1", "m"))

    async def once():
        endpoint._client = AsyncOpenAI(
            base_url="http://127.0.0.1:1/v1", api_key="k", http_client=DefaultAsyncHttpxClient(transport=transport)
        )
        try:
            return await endpoint._once(Request(({"role": "user", "content": "2 + 2?"},), 0, 9, 0.0))
        finally:
            await endpoint.close()

    found = asyncio.run(once())
    assert isinstance(found.text, str)
    assert min(found.tokens_in, found.tokens_out) >= 0
    assert found.cut in (True, False)


def _whoami(path):
    """What the Hub, or a mirror of it, says of a token."""
    fault = _fault(json.loads(path.read_bytes()), "owner/name")
    assert fault is None or 0 < len(fault) < 300


_WHO = {
    "type": "user",
    "name": "me",
    "orgs": [{"name": "owner"}],
    "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"global": [], "scoped": [
        {"entity": {"name": "owner"}, "permissions": ["repo.write"]}
    ]}}},
}  # fmt: skip
_ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
}

TARGETS = {
    "evaluation": Target("json", "e.json", lambda folder: [sample_document(questions=6).to_json().encode()], _document),
    "report-page": Target("json", "e.json", lambda folder: [sample_document(questions=2).to_json().encode()], _page),
    "tuning": Target("json", "t.json", _tuning, lambda path: read_tuning(path).to_json()),
    "ablation": Target("json", "a.json", _ablation, lambda path: read_ablation(path).to_json()),
    "tasks-jsonl": Target("lines", "t.jsonl", plain(_TASK), _tasks),
    "tasks-csv": Target("text", "t.csv", plain("question,option1,option2,answer\nOne?,1,2,1\nTwo?,3,4,4\n"), _tasks),
    "passages": Target("lines", "p.jsonl", plain('{"text": "Rain is water."}\n'), read_passages),
    "card": Target("text", "card.md", plain("# Card\n<!-- npti-export evaluation -->\n"), check_card),
    "verdicts": Target("lines", "v.jsonl", journal(_VERDICT), _verdicts),
    "task-file": Target("text", "t.yaml", _task_folder, _task_file),
    "whoami": Target(
        "json", "w.json", plain(json.dumps(_WHO)), _whoami, (ValueError, RecursionError)
    ),  # of the library
    "completion": Target("json", "c.json", plain(json.dumps(_ANSWER)), _completion),
}
