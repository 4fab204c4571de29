"""Whatever reads a file or a text of foreign origin is reached by a target of the fuzzers, or is said here not to be.

Readers are found by what they call, targets are run under a profiler: a new reader without a target fails the test.
"""

import ast
import sys
import threading

import fuzz_run
from fuzz_targets import TARGETS, loaded
from test_hostile import named
from test_structure import FILES, PACKAGE

PARSERS = {
    "json.loads", "json.load", "tomllib.loads", "tomllib.load", "safe_open", "yaml.compose_all", "yaml.safe_load",
    "csv.reader", "csv.DictReader", "sqlite3.connect", "np.frombuffer", "np.fromfile", "np.memmap", "struct.unpack",
    "struct.unpack_from", "zipfile.ZipFile", "base64.b64decode", "ElementTree.parse", "open",
}  # fmt: skip
METHODS = {"read_text", "read_bytes", "from_pretrained", "model_validate", "model_validate_json", "get_tensor", "open"}
UNREACHED = {
    "of our own making, out of this very process": {
        "dial/run.py:_index", "evaluate/assemble.py:assemble", "evaluate/card.py:check_same_rule",
        "evaluate/supplements.py:steering", "export/lora.py:LoraFile.write", "gguf/writer.py:patch_values",
        "identify/collect.py:_origin", "pipeline.py:_report", "placing.py:_rename_without_links",
        "report_page/page.py:_resource",
    },
    "of our own making, in a process of its own": {
        "gguf/quantiser.py:_read_matrix", "template_trial.py:limit", "template_trial.py:main",
    },
    "opens a runtime, not a file": {
        "evaluate/others.py:Others._method", "evaluate/others.py:Others._chance",
        "evaluate/others.py:Others._fine_tuned", "tuning/trial.py:Measure.answered", "tuning/trial.py:Measure.steered",
    },
    "bytes for a digest or a comparison, of which nothing is read": {"files.py:holds_other", "files.py:sampled_sha256"},
    "reads the job's own recipe, and profiles by their readers": {"profile_io.py:check_may_be"},
    "numbers in the memory of llama.cpp": {"runtimes/llamacpp/library.py:tensor_values"},
}  # fmt: skip


def functions(tree, above=()):
    """All of a module, with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        inside = above
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = (*above, node.name)
            if not isinstance(node, ast.ClassDef):
                yield node, ".".join(inside)
        yield from functions(node, inside)


def own_calls(function):
    """Calls in a function, without those in functions inside it."""
    left = list(ast.iter_child_nodes(function))
    while left:
        node = left.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if isinstance(node, ast.Call):
                yield node
            left += ast.iter_child_nodes(node)


def reads(call):
    if named(call.func) in PARSERS:
        return True
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in METHODS:
        return False
    modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return call.func.attr != "open" or not modes or modes[0].startswith("r")


def readers():
    """By file and first line, as the profiler sees them, the names of all functions that read."""
    found = {}
    for path in FILES:
        for node, name in functions(ast.parse(path.read_text(encoding="utf-8"))):
            if any(map(reads, own_calls(node))):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                found[str(path), first] = f"{path.relative_to(PACKAGE).as_posix()}:{name}"
    return found


def test_intact_files_are_accepted_and_every_reader_is_reached(tmp_path):
    known, reached = readers(), set()
    assert len(known) > 100

    def see(frame, event, _argument):
        if event == "call":
            reached.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    for name in TARGETS.keys() - {"report-page"}:  # which reads what "evaluation" reads, and draws it
        path, seeds = fuzz_run.prepared(name, tmp_path)
        few = [fuzz_run.make_input(name, seeds, 1, number) for number in range(2)]  # some readers look at what is odd
        for data in [*seeds, *(few if name not in loaded.TARGETS else ())]:
            fuzz_run._fresh(path, data)
            sys.setprofile(see)
            threading.setprofile(see)
            try:
                said = fuzz_run.try_target(name, path)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
            assert not said.startswith("FAULT"), name
            assert said == "accepted" or data is not seeds[0], name  # other seeds are material for mutations
    exempt = set().union(*UNREACHED.values())
    left = {name for place, name in known.items() if place not in reached}
    assert left - exempt == set(), "no target reads what these read"
    assert exempt - left == set(), "is reached, or is gone"


def test_that_readers_are_found():
    tree = ast.parse(
        "class A:\n def one(self, p):\n  return p.open('rb')\n def two(self, p):\n  p.open('wb')\n  p.write_text('')\n"
        "@cache\ndef three(t):\n def four():\n  return json.loads(t)\n return four\n"
    )
    found = [name for node, name in functions(tree) if any(map(reads, own_calls(node)))]
    assert found == ["A.one", "three.four"]
