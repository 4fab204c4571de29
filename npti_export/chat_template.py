"""Chat templates are programs that come with a model: whether one may be run at all.

They are rendered in jinja2's sandbox, from which they reach neither files nor our objects. The sandbox bounds no time
and no memory, so a template that is more than loops over the messages is first tried in a process of its own, on short
and long chats of one turn and of many. The bound is on what is tried: a template that waits for a certain word, an hour
or a longer chat still gets past it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npti_export.errors import ModelError, shortened
from npti_export.template_trial import OVER

LONGEST_TEMPLATE = 1 << 20  # characters; the longest in use have some tens of thousands
LONGEST_PROMPT = 1 << 20  # characters that a template may make of a chat
SECONDS, MEGABYTES = 2, 512  # of processor time and memory, for all chats that are tried
_PATIENCE = 60.0  # seconds by the clock, on a machine with much else to do
_TRIAL = Path(__file__).with_name("template_trial.py")
_TEXT = (
    "How are you? I've been up since 6:45 and wrote 3 pages, no more.\n\n- one\n- two: \u201cmaybe\u201d\n\n"
    "```python\nprint({'a': [1, 2.5]})\n```\n<think>Why not?</think> Gr\u00fc\u00dfe, \u4f60\u597d! https://example.org/?a=b&c=d\n"
)
_PLAIN = (
    "Template", "Output", "TemplateData", "If", "For", "Const", "Name", "Getitem", "Getattr", "Compare", "Operand",
    "And", "Or", "Not", "Add", "Concat", "CondExpr",
)  # fmt: skip
_DEEPEST = 2  # loops over the messages inside each other


def check_template(template: str, where: str) -> None:
    """Raise unless a chat template renders the chats that are tried within bounds.

    Args:
        template: its source.
        where: file or model that it came with, for messages.

    Raises:
        ModelError: too long, or it takes too much time, memory or room on a chat of some words or pages, or it could
            not be tried at all.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise ModelError(f"{where}: its chat template has {len(template)} characters, more than any in use; {_MEND}")
    if not _kept_limits(template):
        raise ModelError(
            f"{where}: its chat template takes more than {SECONDS} s, {MEGABYTES} MB or {LONGEST_PROMPT} characters "
            f"for chats of a few words or pages; {_MEND}"
        )


_MEND = "take the model from its maker, or mend it with gguf-py's gguf_new_metadata.py --chat-template"


def check_prompt(text: str, where: str) -> str:
    """What a template made of a chat, unless it is longer than a prompt can be, or no text.

    Raises:
        ModelError: it is.
    """
    if len(text) > LONGEST_PROMPT:
        raise ModelError(f"{where}: its chat template makes {len(text)} characters of a question; {_MEND}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell out
        raise ModelError(
            f"{where}: what its chat template makes of a question is no text ({error.reason}); ask in UTF-8, or {_MEND}"
        ) from error
    return text


@functools.lru_cache(maxsize=64)
def _kept_limits(template: str) -> bool:
    return _is_plain(template) or _tried(template)


def _chats() -> list[list[dict[str, str]]]:
    """Short and long, of one turn and of many, each with a system turn and without."""
    long = _TEXT * 50
    made: list[list[dict[str, str]]] = []
    for lengths in ([12], [12, 5, 4], [len(long)], [300, 3000, len(long), 40, 1000], [50, 100] * 20 + [5000]):
        # an odd number of turns: the last one is the user's; no two begin alike
        turns = [
            {"role": ("user", "assistant")[at % 2], "content": f"{long[at:]}{long[:at]}"[:length]}
            for at, length in enumerate(lengths)
        ]
        made.append(turns)
        made.extend([{"role": "system", "content": text}, *turns] for text in ("You are kind.", long))
    return made


def _tried(template: str) -> bool:
    """Whether the template kept the limits in a process of its own."""
    asked: dict[str, object] = {"template": template, "chats": _chats(), "seconds": SECONDS, "megabytes": MEGABYTES}
    asked["path"] = sys.path  # jinja2 may be anywhere that this process finds it
    command = [sys.executable, "-I", str(_TRIAL)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({**asked, "characters": LONGEST_PROMPT}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 0:
        return True
    if done.returncode == OVER or done.returncode < 0:  # the system ends what takes too much
        return False
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    raise ModelError(f"a chat template could not be tried in a process of its own ({shortened(said[-1])})")


def _is_plain(template: str) -> bool:
    """Whether a template is so simple that its length bounds what it can do."""
    import jinja2

    try:
        tree = jinja2.Environment().parse(template)
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError):
        return False  # whoever renders it in earnest says what is wrong
    return _plain_below(tree, 0)


def _plain_below(node: Any, depth: int) -> bool:
    import jinja2.nodes

    name = type(node).__name__
    if name == "For":
        depth += 1
        if depth > _DEEPEST or node.recursive or not _is_messages(node.iter):
            return False
    elif name == "Filter":
        if node.name != "trim" or node.args or node.kwargs:
            return False
    elif name not in _PLAIN:
        return False
    children: Sequence[jinja2.nodes.Node] = list(node.iter_child_nodes())
    return all(_plain_below(child, depth) for child in children)


def _is_messages(node: Any) -> bool:
    return type(node).__name__ == "Name" and node.name == "messages"
