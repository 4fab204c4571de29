"""Texts: of the command line, and answers of models."""

import json

from click import UsageError

from fuzz_targets.target import Target, plain, text
from npti_export.bench.making.parse import read_items, read_verdicts
from npti_export.benches import bench_folder
from npti_export.cli.endpoints import json_fields
from npti_export.compiler.kinds import parse_program
from npti_export.dial.index import parse_mix, parse_poles
from npti_export.evaluate.judge.prompts import read_rating
from npti_export.evaluate.judge.spec import parse_judge
from npti_export.generators.address import is_address, public_address
from npti_export.traits import parse_trait, parse_whole


def _address(text):
    assert isinstance(public_address(text), str)
    if is_address(text):
        assert text.lower().startswith("http")
        assert "@" not in public_address(text).partition("/")[0]


def _trait(text):
    spec = parse_trait(text)
    assert parse_trait(str(spec), known=[spec.trait]) == spec


def _program(text):
    kind = parse_program(text)
    assert parse_program(str(kind)) == kind


def _fields(text):
    json.dumps(json_fields("--judge-extra", [text]))


def _rating(text):
    found = read_rating(text)
    assert found is None or found in (1, 2, 3, 4, 5)


def _items(text):
    assert len(read_items(text, 3)) <= 6
    assert len(read_verdicts(text, 3)) == 3


_SAID = ("1. One?\n2. Two?", '["One?", "Two?"]', '{"verdicts": [{"question": 1, "differ": true}]}')


TARGETS = {
    "trait": Target("text", "t", plain("agreeableness+:0.5", "calm", "./pirate+"), text(_trait)),
    "whole-trait": Target("text", "t", plain("openness", "./pirate"), text(parse_whole)),
    "bench-folder": Target("text", "t", plain("openness", "./pirate", "~nobody/pirate"), text(bench_folder)),
    "mix": Target("text", "t", plain("extraversion+:0.7,calm", "calm,moody:2"), text(parse_mix)),
    "poles": Target("text", "t", plain("extraversion+,calm", "all"), text(parse_poles)),
    "judge": Target("text", "t", plain("http://127.0.0.1:8080/v1=qwen", "judge.gguf"), text(parse_judge)),
    "address": Target("text", "t", plain("http://127.0.0.1:8080/v1", "https://[::1]:1/v1"), text(_address), ()),
    "program": Target("text", "t", plain("budget:5%", "lowrank:4", "kl:0.1", "exact"), text(_program)),
    "fields": Target("text", "t", plain("top_p=0.9", 'stop=["a"]'), text(_fields), (UsageError,)),
    "rating": Target("text", "t", plain('{"rating": 4}', "Rating: 3/5"), text(_rating), ()),
    "items": Target("text", "t", plain(*_SAID), text(_items), ()),
}
