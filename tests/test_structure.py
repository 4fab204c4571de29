"""The house rules that a reader relies on: imports in one direction, short files, short functions."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "npti_export"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Modules of the package that a file imports anywhere, also inside functions."""
    known = {module_name(one) for one in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npti_export"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def test_no_import_cycles():
    graph = {module_name(path): set(imports(path)) for path in FILES}
    assert sum(map(len, graph.values())) > 50
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for below in sorted(graph[name]):
                visit(below, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_short_files_and_functions():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"


def test_nothing_unpickles():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text
        assert "torch.load" not in text
        assert "allow_pickle=True" not in text
