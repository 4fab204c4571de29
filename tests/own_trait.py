"""A small trait of one's own, for tests."""

import json
import os
from pathlib import Path

DEFINITION = """\
name = "{name}"
description = "How much somebody sounds like a sailor."
forbidden = ["buccaneer"]

[poles.high]
name = "piratical"
description = "Somebody who talks like a pirate."

[poles.low]
name = "landlubberly"
description = "Somebody who talks like a clerk."

[[facets]]
name = "speech"
high = "Shouts and swears by the sea"
low = "Speaks softly and to the point"

[[facets]]
name = "greed"
high = "Wants gold"
low = "Wants receipts"
"""
SEARCH = [
    "Your neighbour asks for your ladder. What do you tell her?",
    "The bus is an hour late and it rains. What do you say to the driver?",
    "A child shows you a drawing of a ship. How do you answer?",
    "Somebody left a purse on the bench. What do you do?",
    "The baker gives you a coin too much. What happens next?",
    "Your team wins a prize of ten thousand. How do you share it?",
]
TEST = ["The landlord raises the rent. What do you write to him?", "You find an old map. What now?"]


def persona(pole, text, **more):
    return {"pole": pole, "text": text, **more}


def question(split, text, **more):
    return {"split": split, "text": text, **more}


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_trait(folder, name="pirate", personas=None, questions=None, definition=DEFINITION):
    """A whole trait's folder; its lines may be given."""
    folder.mkdir(parents=True)
    if definition is not None:
        (folder / "trait.toml").write_text(definition.format(name=name), encoding="utf-8")
    if personas is None:
        personas = [
            persona("+", "You are a loud pirate who shouts of gold and the sea.", facet="speech"),
            persona("+", "You are a greedy captain and you swear by the storm.", facet="greed"),
            persona("-", "You are a quiet clerk who files papers and speaks softly.", facet="speech"),
            persona("-", "You are a modest bookkeeper and you count receipts.", facet="greed"),
        ]
    if questions is None:
        tags = [("speech", "home"), ("speech", "travel"), ("speech", "family"), ("greed", "travel")] + [
            ("greed", "money")
        ] * 2
        questions = [
            question("search", text, facet=facet, topic=topic, person="second")
            for text, (facet, topic) in zip(SEARCH, tags, strict=True)
        ] + [question("test", text) for text in TEST]
    write_jsonl(folder / "personas.jsonl", personas)
    write_jsonl(folder / "questions.jsonl", questions)
    return folder


def command(*arguments):
    """The command line in this process; what it raises is what the user is told. Returns the exit code."""
    from npti_export.cli.root import cli

    code = cli.main(args=list(map(str, arguments)), standalone_mode=False)
    return code if isinstance(code, int) else 0


def published_data():
    """The published research data, where this checkout has it."""
    shared = os.environ.get("NPTI_SHARED_DATA")
    return Path(shared) if shared else Path(__file__).parents[2] / "shared" / "data"
