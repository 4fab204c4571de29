"""Benches and inventories from elsewhere are read whole, or what is wrong with them is named."""

import codecs
import csv
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_trait import command, published_data, write_jsonl, write_trait

from npti_export.bench import load_bench
from npti_export.bench.imports import How, import_source
from npti_export.bench.lines import LONGEST_TEXT
from npti_export.bench.published_layout import export_layout
from npti_export.benches import load_benches
from npti_export.errors import BenchError, NptiError, OutputError
from npti_export.traits import FACETS, parse_trait

PIRATE = Path(__file__).parents[1] / "examples" / "traits" / "pirate"
# The published shape, written out by hand.
DESCRIPTIONS = [
    {"Openness": "You love new things.", "Openness_reversed": "You love old things.", "Trust": "You trust."},
    {"Openness": "You dream – a lot."},
]
ITEMS = [
    {"trait": "extraversion", "keyed": "+", "text": "Am the life of the party."},
    {"trait": "extraversion", "keyed": "-", "text": "Say little, and softly."},
    {"trait": "sea-legs", "keyed": "+", "text": "Love “waves”."},
]


def bring(source, out, skip_bad=False, force=False, **how):
    return import_source(source, out, How(**how), skip_bad=skip_bad, force=force)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "npti"
    for name in ("search", "test"):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "Openness.json", [{"question": f"What do you {name}?"}])
    write_jsonl(folder / "description.json", DESCRIPTIONS)
    return folder


def test_the_published_layout(layout, tmp_path):
    done = bring(layout, tmp_path / "out")
    assert {trait: dict(counts) for trait, counts in done.counts.items()} == {
        "openness": {"+": 2, "-": 1, "search": 1, "test": 1},
        "trust": {"+": 1},
    }
    personas = read(tmp_path / "out" / "openness" / "personas.jsonl")
    assert [(one["pole"], one["text"]) for one in personas] == [
        ("+", "You love new things."),
        ("-", "You love old things."),
        ("+", "You dream – a lot."),
    ]
    assert personas[2]["source"] == {"file": "description.json", "line": 2}
    assert {path.name for path in (tmp_path / "out" / "openness").iterdir()} == {"personas.jsonl", "questions.jsonl"}
    bench = load_benches([parse_trait("openness+")], tmp_path / "out")["openness"]
    assert [one.text for one in bench.search()] == ["What do you search?"]
    assert bench.personas[0].facet is None


def test_a_trait_of_their_own_is_to_be_defined(layout, tmp_path):
    write_jsonl(layout / "search" / "Trust.json", [{"question": "Who do you lend it to?"}])
    bring(layout, tmp_path / "out")
    with pytest.raises(BenchError, match=r"trait\.toml: 'description' is still a placeholder"):
        load_bench("trust", tmp_path / "out" / "trust")


def test_there_and_back(tmp_path):
    benches = [load_bench(trait) for trait in FACETS] + [load_bench("pirate", PIRATE)]
    export_layout(benches, tmp_path / "npti", force=False)
    lines = read(tmp_path / "npti" / "description.json")
    assert lines[0].keys() == {one.capitalize() + end for one in [*FACETS, "pirate"] for end in ("", "_reversed")}
    assert lines[-1].keys() == {one.capitalize() + end for one in FACETS for end in ("", "_reversed")}
    assert (tmp_path / "npti" / "description.json").read_bytes().isascii()
    assert read(tmp_path / "npti" / "test" / "Pirate.json")[0].keys() == {"question"}
    bring(tmp_path / "npti", tmp_path / "back")
    for bench in benches:
        folder = tmp_path / "back" / bench.trait
        personas, questions = read(folder / "personas.jsonl"), read(folder / "questions.jsonl")
        for sign in "+-":
            assert [one["text"] for one in personas if one["pole"] == sign] == [one.text for one in bench.pole(sign)]
        for split in ("search", "test"):
            texts = [one["text"] for one in questions if one["split"] == split]
            assert texts == [one.text for one in bench.split(split)]


def test_the_published_data(tmp_path):
    data = published_data() / "npti"
    if not data.is_dir():
        pytest.skip("the published research data is not part of this checkout")
    done = bring(data, tmp_path / "out")
    traits = ("agreeableness", "extraversion", "openness")
    assert done.counts == {trait: {"+": 80, "-": 80, "test": 90} for trait in traits}
    benches = [load_bench("openness")]
    export_layout(benches, tmp_path / "ours", force=False)
    theirs = read(data / "description.json")[0].keys()
    assert read(tmp_path / "ours" / "description.json")[0].keys() <= theirs
    with pytest.raises(BenchError, match="no question of split 'search'"):
        load_benches([parse_trait("openness+")], tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("description.json", "{", "description.json:3: not a JSON object ("),
        ("description.json", "[1]", "description.json:3: not a JSON object"),
        ("description.json", '{"Openness": 5}', "description.json:3: 'Openness' must be a non-empty text"),
        (
            "description.json",
            json.dumps({"Openness": "x" * 9000}),
            "description.json:3: 'Openness' has 9000 characters",
        ),
        ("search/Openness.json", '{"query": "Why?"}', "Openness.json:2: has keys 'query', and 'question' is needed"),
        ("test/Openness.json", '{"question": " "}', "Openness.json:2: 'question' must be a non-empty text"),
        ("test/Openness.json", '{"question": "\\ud800"}', "Openness.json:2: 'question' holds half a surrogate pair"),
    ],
)
def test_malformed_lines_are_named_or_counted(layout, tmp_path, file, line, says):
    good = bring(layout, tmp_path / "good").counts
    with (layout / file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(BenchError) as error:
        bring(layout, tmp_path / "out")
    assert says in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "npti"]
    done = bring(layout, tmp_path / "out", skip_bad=True)
    assert done.faults.count == 1
    assert says in str(done.faults.first[0])
    assert done.counts == good


@pytest.mark.parametrize("name", ["Calm", "no name", "Openness_twice_reversed_", "x" * 80])
def test_names_that_no_trait_can_have(layout, tmp_path, name):
    write_jsonl(layout / "description.json", [{name: "You are."}])
    with pytest.raises(BenchError, match=r"description\.json: "):
        bring(layout, tmp_path / "out", skip_bad=True)


def test_nothing_readable(layout, tmp_path):
    for path in layout.rglob("*.json"):
        path.write_text("no JSON\n")
    with pytest.raises(BenchError, match=r"holds nothing that could be read .*description\.json:1: not a JSON object"):
        bring(layout, tmp_path / "out", skip_bad=True)
    (layout / "questions").mkdir()
    with pytest.raises(BenchError, match="has test/ and questions/"):
        bring(layout, tmp_path / "out")
    (tmp_path / "other").mkdir()
    with pytest.raises(BenchError, match="no published layout"):
        bring(tmp_path / "other", tmp_path / "out")
    with pytest.raises(BenchError, match="there is no such file"):
        bring(tmp_path / "nothing.csv", tmp_path / "out")
    (tmp_path / "x.xls").write_bytes(b"")
    with pytest.raises(BenchError, match="its ending says nothing"):
        bring(tmp_path / "x.xls", tmp_path / "out")


def test_only_imports_are_replaced_and_only_by_force(layout, tmp_path):
    out = tmp_path / "out"
    bring(layout, out)
    with pytest.raises(OutputError, match="exists already; pass --force"):
        bring(layout, out)
    before = read(out / "openness" / "personas.jsonl")
    write_jsonl(layout / "description.json", DESCRIPTIONS[1:])
    bring(layout, out, force=True)
    assert read(out / "openness" / "personas.jsonl") != before
    assert not (out / "trust").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds more than an output of ours"):
        bring(layout, out, force=True)
    with pytest.raises(OutputError, match="holds what is to be imported"):
        bring(layout, tmp_path, force=True)
    export_layout([load_bench("openness")], layout, force=True)
    (layout / "search" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds more"):
        export_layout([load_bench("openness")], layout, force=True)
    with pytest.raises(BenchError, match="given twice"):
        export_layout([load_bench("openness")] * 2, tmp_path / "new", force=False)


def test_memory_does_not_grow_with_the_file(tmp_path):
    folder = tmp_path / "npti"
    folder.mkdir()
    line = json.dumps({"Openness": "You are " + "so " * 1000}) + "\n"
    (folder / "description.json").write_text(line * 10_000)  # 30 MB
    tracemalloc.start()
    try:
        assert bring(folder, tmp_path / "out").counts["openness"]["+"] == 10_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def sheet(path, rows, title="Items"):
    from openpyxl import Workbook

    book = Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def table(path, rows, delimiter=",", encoding="utf-8", end="\r\n"):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


ROWS = [["Nr", "Item", "Domain", "Key"]] + [
    [place, one["text"], one["trait"].replace("-", " ").title(), one["keyed"]] for place, one in enumerate(ITEMS)
]


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: table(folder / "i.csv", ROWS),
        lambda folder: table(folder / "i.csv", ROWS, ";", "utf-8-sig"),
        lambda folder: table(folder / "i.tsv", ROWS, "\t", "utf-16", "\n"),
        lambda folder: table(folder / "i.csv", [[], *ROWS[:2], [], *ROWS[2:]], "|", end="\r"),
        lambda folder: sheet(folder / "i.xlsx", [[], *ROWS]),
    ],
)
def test_inventories(tmp_path, write):
    done = bring(write(tmp_path), tmp_path / "out")
    assert done.columns == {"text": "Item", "trait": "Domain", "keyed": "Key"}
    assert {trait: counts["items"] for trait, counts in done.counts.items()} == {"extraversion": 2, "sea-legs": 1}
    found = [item for trait in sorted(done.counts) for item in read(tmp_path / "out" / trait / "inventory.jsonl")]
    assert found == ITEMS


def test_json_lines_with_facets_and_letters(tmp_path):
    path = tmp_path / "mpi.jsonl"
    write_jsonl(
        path,
        [
            {"text": "Worry a lot.", "label_ocean": "N", "label_raw": "anxiety", "key": 1},
            {"text": "Stay calm.", "label_ocean": "N", "label_raw": "", "key": -1},
        ],
    )
    bring(path, tmp_path / "out")
    assert read(tmp_path / "out" / "neuroticism" / "inventory.jsonl") == [
        {"trait": "neuroticism", "keyed": "+", "text": "Worry a lot.", "facet": "anxiety"},
        {"trait": "neuroticism", "keyed": "-", "text": "Stay calm."},
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "keyed"),
    [
        ([["text", "trait"], ["One.", "E+"], ["Two.", "−E"]], {}, "+-"),
        ([["text", "trait", "reversed"], ["One.", "E", "no"], ["Two.", "E", "TRUE"]], {}, "+-"),
        ([["text", "trait", "reversed"], ["One.", "E", ""], ["Two.", "E", "R"]], {}, "+-"),
        ([["statement", "label", "Key"], ["One.", "E", "- keyed"], ["Two.", "E", "1.0"]], {"trait": "label"}, "-+"),
        (
            [["text", "trait", "key", "sense"], ["One.", "E", "9", "+"], ["Two.", "E", "9", "-1"]],
            {"keyed": "sense"},
            "+-",
        ),
    ],
)
def test_keying(tmp_path, rows, columns, keyed):
    bring(table(tmp_path / "i.csv", rows), tmp_path / "out", columns=columns)
    found = read(tmp_path / "out" / "extraversion" / "inventory.jsonl")
    assert [one["keyed"] for one in found] == list(keyed)
    assert [one["text"] for one in found] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["", "", "E", "+"], "'Item' must be a non-empty text"),
        ([1, "A.", "E", "0"], "'Key' is '0', must be + or -, 1 or -1"),
        ([1, "A.", "Calm", "+"], "'Domain' is no trait: 'calm': is taken, which means neuroticism-"),
        ([1, "A.", "?", "+"], "'Domain' is no trait: '?': cannot be a trait's name"),
        ([1, "A" * 9000, "E", "+"], "'Item' has 9000 characters"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, says):
    rows = [*ROWS[:3], row, *ROWS[3:]]
    with pytest.raises(BenchError) as error:
        bring(table(tmp_path / "i.csv", rows), tmp_path / "out")
    assert f"i.csv:4: {says}" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BenchError) as error:
        bring(sheet(tmp_path / "i.xlsx", rows), tmp_path / "out")
    cell = {"'Item'": "B4", "'Domai": "C4", "'Key' ": "D4"}[says[:6]]
    assert f"i.xlsx:4: sheet 'Items', cell {cell} (" in str(error.value)
    done = bring(tmp_path / "i.xlsx", tmp_path / "out", skip_bad=True)
    assert (done.faults.count, sum(counts["items"] for counts in done.counts.values())) == (1, 3)


@pytest.mark.parametrize(
    ("content", "how", "says"),
    [
        ("text,key\nA.,1\n", {}, "no column for 'trait' among 'text, key'; name it by --column trait=HEADER"),
        ("a,b\nA.,1\n", {}, "no column for 'text'"),
        ("text,trait\nA.,E+\n", {"columns": {"keyed": "sign"}}, "--column keyed=sign: has no such column"),
        ("text,text\nA.,E+\n", {}, "two columns are called 'text'"),
        ("text,trait\nA.,E\n", {}, "there is no column for 'keyed', so a sign is needed"),
        ("text,trait\nA.,E+,x\n", {}, "i.csv:2: has 3 values, where the header has 2 columns"),
        ('text,trait\n"A.,E+\n', {}, "i.csv:2: the row that begins here is not well-formed CSV"),
        ("text,trait\n", {}, "holds no item"),
        ("", {}, "holds no item"),
        ("text,trait\nA.,E+\n", {"sheet": "x"}, "has no sheets; leave --sheet out"),
    ],
)
def test_bad_tables(tmp_path, content, how, says):
    (tmp_path / "i.csv").write_text(content)
    with pytest.raises(BenchError) as error:
        bring(tmp_path / "i.csv", tmp_path / "out", **how)
    assert says in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["i.csv"]


def test_inventories_beside_a_trait_and_by_force(tmp_path):
    folder = write_trait(tmp_path / "pirate")
    items = [{"trait": "pirate", "keyed": "+", "text": "Sing shanties."}]
    write_jsonl(tmp_path / "i.jsonl", items)
    bring(tmp_path / "i.jsonl", folder)
    assert read(folder / "inventory.jsonl") == items
    with pytest.raises(OutputError, match=r"inventory\.jsonl: exists already; pass --force"):
        bring(tmp_path / "i.jsonl", folder)
    bring(tmp_path / "i.jsonl", folder, force=True)
    assert load_bench("pirate", folder).trait == "pirate"
    write_jsonl(tmp_path / "i.jsonl", ITEMS)
    with pytest.raises(OutputError, match="is the folder of pirate, and the inventory has extraversion, sea-legs"):
        bring(tmp_path / "i.jsonl", folder, force=True)


def test_sheets_are_found_by_name(tmp_path):
    from openpyxl import load_workbook

    path = sheet(tmp_path / "i.xlsx", ROWS)
    book = load_workbook(path)
    book.create_sheet("Notes", 0).append(["nothing"])
    book.save(path)
    with pytest.raises(BenchError, match="holds no item"):
        bring(path, tmp_path / "out")
    with pytest.raises(BenchError, match="has no sheet 'None'; it has 'Notes, Items'"):
        bring(path, tmp_path / "out", sheet="None")
    assert len(bring(path, tmp_path / "out", sheet="Items").counts) == 2


def repacked(path, change):
    """An XLSX with its parts changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def bomb(parts):
    parts["xl/media/zeros.bin"] = bytes(80 << 20)


def entities(parts):
    name = "xl/workbook.xml"
    mark = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>'
    parts[name] = b'<?xml version="1.0"?>' + mark.encode() + parts[name][parts[name].index(b"<workbook") :]


def broken_xml(parts):
    parts["xl/worksheets/sheet1.xml"] = parts["xl/worksheets/sheet1.xml"][:300]


def no_workbook(parts):
    del parts["xl/workbook.xml"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (bomb, "unpacks to more than 64 MiB"),
        (entities, "xl/workbook.xml defines XML entities"),
        (broken_xml, "is no XLSX file, or a damaged one"),
        (no_workbook, "is no XLSX file, or a damaged one"),
    ],
)
def test_sheets_that_are_damaged_or_made_to_harm(tmp_path, change, says):
    path = sheet(tmp_path / "i.xlsx", ROWS)
    repacked(path, change)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(BenchError) as error:
            bring(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("Who’s there?\nWhy?\n".encode(), None),
        (codecs.BOM_UTF8 + "Who’s there?\r\n\r\nWhy?".encode(), None),
        ("Who’s there?\nWhy?\n".encode("utf-16"), None),
        (codecs.BOM_UTF16_BE + "Who’s there?\rWhy?\n".encode("utf-16-be"), None),
        ("Who’s there?\nWhy?\n".encode("utf-16-le"), "holds zero bytes, so it is no UTF-8 text"),
        ("Who’s there?\nWhy?\n".encode("utf-32"), "is UTF-32"),
        (b"Why?\nWho\x92s there?\n", "q.txt:2: is not UTF-8"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8\n\x00", "begins like UTF-16 and is not"),
        (b"Why?\n" + b"x" * (LONGEST_TEXT + 1), f"q.txt:2: has {LONGEST_TEXT + 1} characters"),
        (b"x" * (3 << 20) + b"\nWhy?", "q.txt:1: is longer than 1048576 characters"),
        (b" \n\n", "holds no line that could be added"),
    ],
)
def test_encodings_and_line_ends(tmp_path, data, says):
    folder = write_trait(tmp_path / "pirate")
    path = tmp_path / "q.txt"
    path.write_bytes(data)
    before = (folder / "questions.jsonl").read_bytes()
    if says is None:
        assert bring(path, folder, split="test").counts == {"pirate": {"test": 2}}
        added = read(folder / "questions.jsonl")[-2:]
        assert [one["text"] for one in added] == ["Who’s there?", "Why?"]
        assert added[0]["source"] == {"file": "q.txt", "line": 1}
        return
    with pytest.raises(BenchError) as error:
        bring(path, folder, split="test")
    assert says in str(error.value)
    assert (folder / "questions.jsonl").read_bytes() == before


def test_plain_text_is_added(tmp_path):
    folder = write_trait(tmp_path / "pirate")
    before = read(folder / "personas.jsonl")
    path = tmp_path / "p.txt"
    path.write_text(f"You roar.\n{before[0]['text']}\nYou roar.\nYou sing.\n")
    done = bring(path, folder, kind="personas", pole="+")
    assert (done.repeated, done.counts) == (2, {"pirate": {"+": 2}})
    after = read(folder / "personas.jsonl")
    assert after[: len(before)] == before
    assert [(one["pole"], one["text"]) for one in after[len(before) :]] == [("+", "You roar."), ("+", "You sing.")]
    assert len(load_bench("pirate", folder).pole("+")) == 4
    with pytest.raises(BenchError, match="all 4 were there already"):
        bring(path, folder, kind="personas", pole="+")
    bring(path, folder, kind="personas", pole="-")
    with pytest.raises(BenchError, match=r"nowhere: is no trait's folder.*bench new nowhere"):
        bring(path, tmp_path / "nowhere")
    bring(path, tmp_path / "openness")
    assert len(read(tmp_path / "openness" / "questions.jsonl")) == 3
    (folder / "personas.jsonl").write_text("{}\n")
    with pytest.raises(BenchError, match=r"personas\.jsonl:1: has keys .*; mend that first"):
        bring(path, folder, kind="personas", pole="+")


def test_text_takes_the_placeholders_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("bench", "new", "pirate")
    (tmp_path / "q.txt").write_text("Why?\n")
    bring(tmp_path / "q.txt", tmp_path / "pirate")
    questions = read(tmp_path / "pirate" / "questions.jsonl")
    assert [one["text"][:11] for one in questions] == ["PLACEHOLDER", "PLACEHOLDER", "Why?"]
    assert [one["split"] for one in questions] == ["test", "test", "search"]


@given(st.binary(max_size=300), st.sampled_from([".csv", ".tsv", ".jsonl", ".xlsx", ".txt"]), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path_factory, data, suffix, prefixed):
    folder = tmp_path_factory.mktemp("any")
    start = {".csv": b"text,trait\n", ".jsonl": b'{"text": "A", "trait": "E+"}\n', ".xlsx": b"PK\x03\x04"}.get(
        suffix, b""
    )
    path = folder / f"x{suffix}"
    path.write_bytes(start + data if prefixed else data)
    try:
        done = bring(path, folder / "openness", skip_bad=True)
    except NptiError as error:
        assert len(str(error)) < 800
        assert not (folder / "openness").exists()
        return
    assert sum(sum(counts.values()) for counts in done.counts.values()) > 0
    for written in (folder / "openness").rglob("*.jsonl"):
        assert read(written)
