"""A folder to fill in: what ``bench new`` writes. Every text is a placeholder, with which no bench loads."""

from __future__ import annotations

import json
from pathlib import Path

from npti_export.bench import PERSONAS, QUESTIONS
from npti_export.bench.definition import FILE_NAME, check_name
from npti_export.bench.lines import PLACEHOLDER
from npti_export.errors import BenchError, OutputError
from npti_export.files import atomic_directory
from npti_export.traits import EVERYDAY, FACETS

_DEFINITION = """\
# A trait of your own. `npti-export bench lint {name}` says what is still missing or weak;
# then `npti-export --trait ./{name}+ --out model.gguf`.
name = "{name}" # lower-case letters, digits, - and _
description = "{mark}: what the trait is about, in a sentence."
# Words that no question may hold, beside the names of the trait and its poles: an answer would follow the word.
forbidden = []

[poles.high] # {name}+
name = "{low_mark}-high" # an adjective, lower case
description = "{mark}: what somebody at this pole is like, in a sentence or two."

[poles.low] # {name}-; the opposite, or plainly ordinary
name = "{low_mark}-low"
description = "{mark}: what somebody at this pole is like."

# Three sides of the trait or more, so that no single topic or manner passes for it.
[[facets]]
name = "{low_mark} one"
high = "{mark}: what somebody at the high pole does"
low = "{mark}: what somebody at the low pole does"

[[facets]]
name = "{low_mark} two"
high = "{mark}: another side"
low = "{mark}: of the low pole"
"""


def definition_to_fill_in(name: str) -> str:
    """A ``trait.toml`` of placeholders, with comments."""
    return _DEFINITION.format(name=name, mark=PLACEHOLDER, low_mark=PLACEHOLDER.lower())


def check_own_name(name: str) -> None:
    """Raise unless a trait of one's own may be called so.

    Raises:
        BenchError: ill-formed, or one of our names.
    """
    check_name(name)
    if name in FACETS or name in EVERYDAY:
        means = "one of the Big Five" if name in FACETS else f"which means {EVERYDAY[name]}"
        raise BenchError(f"{name!r}: is taken, {means}; choose another name")


def scaffold(name: str, parent: Path) -> Path:
    """Write a trait's folder of placeholders.

    Returns:
        It, ``parent / name``.

    Raises:
        BenchError: the name is ill-formed or taken.
        OutputError: the folder exists, or cannot be made.
    """
    check_own_name(name)
    folder = parent / name
    if folder.exists():
        raise OutputError(f"{folder}: exists already; choose another name, or fill that one in")
    facets = [f"{PLACEHOLDER.lower()} one", f"{PLACEHOLDER.lower()} two"]
    personas = [
        {"pole": sign, "text": f"{PLACEHOLDER}: You are … (50 to 75 plain, general words at pole {sign})", "facet": one}
        for sign in "+-"
        for one in facets
    ]
    asks = f"{PLACEHOLDER}: an everyday situation in which the two poles would answer differently. What do you do?"
    questions = [
        {"split": split, "text": asks, "facet": facet, "topic": "work", "person": "second"}
        for split in ("search", "test")
        for facet in facets
    ]
    with atomic_directory(folder) as temporary:
        (temporary / FILE_NAME).write_text(definition_to_fill_in(name), encoding="utf-8")
        for file, items in ((PERSONAS, personas), (QUESTIONS, questions)):
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (temporary / file).write_text(text, encoding="utf-8")
    return folder
