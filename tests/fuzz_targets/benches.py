"""Benches: traits, personas and questions, what they are imported from, and what building one keeps."""

import json
import shutil
import sqlite3

from own_trait import write_trait

from fuzz_targets.target import Target, journal, plain
from npti_export.bench import load_bench
from npti_export.bench.definition import read_definition
from npti_export.bench.imports import How, import_source
from npti_export.bench.lines import encodable
from npti_export.bench.making.folder import Folder, identity
from npti_export.bench.making.journal import Journal, Record
from npti_export.bench.making.ngrams import grams
from npti_export.bench.making.plan import Plan
from npti_export.bench.making.store import Store
from npti_export.bench.making.topics import read_topics
from npti_export.evaluate.inventory.items import read_inventory


def _definition(path):
    found = read_definition(path.parent)
    assert all(map(encodable, [found.name, found.description, found.poles.high.name, found.poles.low.name]))
    assert json.loads(found.model_dump_json())["name"] == found.name


def _bench(path):
    bench = load_bench("pirate", path.parent)
    assert bench.pole("+")
    assert bench.split("test")
    assert all(encodable(one.text) and one.text.strip() for one in (*bench.personas, *bench.questions))


def _answers(path):
    journal = Journal(path)
    try:
        for one in journal.records(0):
            assert isinstance(one.text, str)
            assert isinstance(one.order, int)
    finally:
        journal.close()


def _plan_of(folder):
    return Plan("questions", read_definition(folder), (("search", 8), ("test", 2)), "writer")


def _plan(path):
    root = path.parent / "build"
    shutil.rmtree(root, ignore_errors=True)
    (root / "work").mkdir(parents=True)
    (root / "work" / "plan.json").write_bytes(path.read_bytes())
    (root / "work" / "answers.jsonl").write_bytes(b"")
    with Folder(root).opened(_plan_of(path.parent), force=False):
        pass


def _plan_folder(folder):
    shutil.rmtree(folder)
    write_trait(folder)
    return [json.dumps(identity(_plan_of(folder)), indent=1).encode()]


def _store(path):
    for name in (f"{path.name}-wal", f"{path.name}-shm", f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)
    store = Store(path)
    try:
        assert type(store.twin(grams(_KEPT))) in (int, type(None))
        store.keep(0, "search", 0, 0, "How do you spend an evening alone at home?")
        store.finish_order()
        store.commit()
        list(store.items())
        list(store.rejects())
    finally:
        store.close()


def _store_folder(folder):
    store = Store(folder / "s.sqlite")
    store.begin_turn(0, [(0, 3)])
    store.keep(0, "search", 0, 7, _KEPT)
    store.reject(0, 0, 7, "words", "too short", "Why?", keep=True)
    store.finish_order()
    store.commit()
    store.close()
    with sqlite3.connect(folder / "s.sqlite") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return [(folder / "s.sqlite").read_bytes()]


def _inventory(path):
    for item in read_inventory(path):
        assert item.keyed in ("+", "-")
        assert item.text.strip()
        assert encodable(item.text)


def _import(source, above=0):
    """Of a text for a trait, or of the published layout, whose folder is so many above the file's."""

    def read(path):
        folder = path.parents[above]
        out = folder.with_name("out") if source == "layout" else folder / "trait"
        shutil.rmtree(out, ignore_errors=True)
        if source == "text":
            write_trait(out)
        found = import_source(folder if source == "layout" else path, out, How(), skip_bad=False, force=True)
        assert sum(sum(counts.values()) for counts in found.counts.values()) > 0
        for file in out.rglob("*.jsonl"):
            for line in file.read_text(encoding="utf-8").split("\n"):
                assert not line or isinstance(json.loads(line), dict)

    return read


def _text_folder(folder):
    write_trait(folder / "trait")
    return [b"How do you do?\nWhat is that?\n"]


def _layout(folder):
    (folder / "search").mkdir()
    (folder / "test").mkdir(exist_ok=True)
    line = json.dumps({"Openness": "You love art.", "Openness_reversed": "You avoid art."})
    (folder / "description.json").write_text(line + "\n")
    (folder / "search" / "Openness.json").write_text('{"question": "What do you paint?"}\n')
    return [b'{"question": "What do you see?"}\n{"question": "And then?"}\n']


def _described(folder):
    (folder / "test").mkdir()
    (folder / "test" / "Openness.json").write_bytes(_layout(folder)[0])
    return [(folder / "description.json").read_bytes()]


def with_trait(file, *names):
    """A trait's folder around the file; its own content by name."""

    def prepare(folder):
        shutil.rmtree(folder)
        write_trait(folder)
        return [(folder / name).read_bytes() for name in names or (file,)]

    return prepare


def _xlsx(folder):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "trait", "keyed"], ["I love art.", "Openness", "+"], ["I avoid art.", "O", "-"]):
        book.active.append(row)
    book.save(folder / "i.xlsx")
    return [(folder / "i.xlsx").read_bytes()]


_ITEMS = (
    '{"text": "I love art.", "trait": "openness", "keyed": "+"}\n{"text": "I avoid art.", "trait": "O", "keyed": -1}\n'
)


_KEPT = "What do you do when a plan falls through at the last minute?"
_RECORD = vars(Record(0, "1. What now?", verdicts=[True, None]))


TARGETS = {
    "trait.toml": Target("text", "trait.toml", with_trait("trait.toml"), _definition),
    "personas": Target("lines", "personas.jsonl", with_trait("personas.jsonl"), _bench),
    "questions": Target("lines", "questions.jsonl", with_trait("questions.jsonl"), _bench),
    "answers": Target("lines", "a.jsonl", journal(_RECORD), _answers),
    "plan": Target("json", "plan.json", _plan_folder, _plan),
    "store": Target("sqlite", "s.sqlite", _store_folder, _store),
    "inventory-jsonl": Target("lines", "i.jsonl", plain(_ITEMS), _inventory),
    "inventory-csv": Target("text", "i.csv", plain("text,trait,keyed\nI love art.,O,+\nI hide.,E,-\n"), _inventory),
    "inventory-xlsx": Target("zip", "i.xlsx", _xlsx, _inventory),
    "layout": Target("lines", "test/Openness.json", _layout, _import("layout", 1)),
    "description.json": Target("lines", "description.json", _described, _import("layout")),
    "plain-text": Target("text", "q.txt", _text_folder, _import("text")),
    "topics": Target("text", "t.txt", plain("work\nfriends\n"), read_topics),
}
