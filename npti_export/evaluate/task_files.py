"""Task files of lm-evaluation-harness: whether one would run Python code that came with it.

Its loader imports what ``!function`` names from beside the file, and depending on its version takes other tags of YAML
that make any object. Metrics that it does not know are loaded from a script, and data sets may come with code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npti_export.errors import EvaluationError

_PLAIN = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "binary", "value", "merge", "seq", "map")
}
_TRUST = "pass --trust-remote-code if you trust it"
_LARGEST = 1 << 20  # bytes; task files have a few thousand
_METRIC = re.compile(r"\w+")  # anything else is a path, or a repository


def check_task_file(path: Path) -> None:
    """Raise if a task file, or one that it includes, names code to run.

    Raises:
        EvaluationError: it does, or cannot be read.
    """
    seen: set[Path] = set()
    left = [path]
    while left:
        one = left.pop()
        if one.resolve() in seen:
            continue
        seen.add(one.resolve())
        for key, value in _entries(one):
            # relative to where the process runs, or to the file that includes it: versions differ
            for name in (node.value for node in _scalars(value)):
                if key.value == "include" or name.endswith((".yaml", ".yml")):
                    left += [place for place in (Path(name), one.parent / name) if _is_there(place)]
            if key.value == "trust_remote_code":
                raise _refused(one, key, "lets a data set run its own code")
            if key.value == "metric" and not all(_METRIC.fullmatch(node.value) for node in _scalars(value)):
                raise _refused(one, value, "loads a metric's own code")


def _entries(path: Path) -> Iterator[tuple[Any, Any]]:
    """Keys and values of all mappings in a file, as nodes of YAML: nothing is made of them."""
    import yaml

    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise EvaluationError(f"--harness {path}: is larger than a task file can be")
        roots = list(yaml.compose_all(data, Loader=yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())[:300]
        raise EvaluationError(f"--harness {path}: cannot be read as YAML ({words})") from error
    left, seen = list(roots), set()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an alias may lead back to what it stands in
            continue
        seen.add(id(node))
        if node.tag not in _PLAIN:
            raise _refused(path, node, f"({node.tag}) runs Python code that comes with it")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                left += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    yield key, value
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _scalars(node: Any) -> list[Any]:
    """A node's values: of one value, or a flat list of such."""
    several = node.value if isinstance(node.value, list) else [node]
    return [one for one in several if isinstance(getattr(one, "value", None), str)]


def _refused(path: Path, node: Any, what: str) -> EvaluationError:
    return EvaluationError(f"--harness {path}: line {node.start_mark.line + 1} {what}; {_TRUST}")
