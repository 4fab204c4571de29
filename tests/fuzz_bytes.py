"""Mutations of files that are no GGUF: bytes, words, lines, JSON trees, safetensors headers, archives, databases."""

import copy
import io
import json
import sqlite3
import struct
import tempfile
import zipfile
from contextlib import closing
from pathlib import Path

NASTY = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e300, -1e300, 1e-320, 2**31, 2**32, 2**40, 2**63, 2**64, -(2**63),
    10**400, float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "-1", "1e999", "nan", "none", "\0", "a\nb",
    "../../x", "/etc/passwd", "..\\x", "C:\\x", "~", "\ud800", "\u202e", "\x1b]0;x\x07", "<script>", "9" * 5000,
    "a" * 70000, [], {}, [[]], [None], {"": None}, [1, 2, 3], ["a"], {"a": {"b": []}}, "openness+", "llama", "npti",
]  # fmt: skip
WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xff", b"\r", b"\n", b"\r\n", b'"', b"'", b'"""', b",",
    b";", b"\t", b"[", b"]", b"{", b"}", b"[[", b"=", b".", b":", b"#", b"\\", b"\\u0000", b"\\ud800", b"nan", b"inf",
    b"-1", b"1e400", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"../", b"/", b"~", b"+", b"-", b"true", b"1979-05-27",
    b'extends = "npti"\n', b"{{", b"}}", b"{%", b"%}", b"<!--", b"---\n", b"a" * 70000, "−é🙂\u202e".encode(),
    b"\x1b[2J", b"option1", b",,,,,", b"PLACEHOLDER",
]  # fmt: skip


def bytes_(rng, data, others):
    """Flip, cut, repeat, splice."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not data:
            return bytes(rng.randbytes(rng.randrange(40)))
        place = rng.randrange(len(data))
        end = min(len(data), place + rng.choice([1, 2, 4, 8, 64, len(data)]))
        match rng.randrange(8):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place:end] = rng.randbytes(end - place)
            case 2:
                del data[place:end]
            case 3:
                data[place:place] = data[place:end]
            case 4:
                data[place:place] = rng.choice(WORDS)
            case 5:
                data[place : place + 8] = struct.pack(
                    "<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
                )
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[place:end] = other[start : start + 64]
            case 7:
                del data[place:]
    return bytes(data)


def text(rng, data, others):
    """Words put in, taken out, swapped."""
    if rng.random() < 0.2:
        return bytes_(rng, data, others)
    parts = data.replace(b"\n", b" \n ").split(b" ")
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(parts) + 1)
        match rng.randrange(5):
            case 0:
                parts.insert(place, rng.choice(WORDS))
            case 1:
                parts[place : place + 1] = []
            case 2:
                parts[place : place + 1] = [rng.choice(WORDS)]
            case 3:
                parts += parts[place:]
            case 4 if place < len(parts):
                word = parts[place]
                at = rng.randrange(len(word) + 1)
                parts[place] = word[:at] + rng.choice(WORDS) + word[at:]
    return b" ".join(parts)


def tree(rng, value):
    """A JSON value with one or a few places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = [(holder, key) for holder, key in _places(value)]
        if not places:
            return rng.choice(NASTY)
        holder, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(NASTY))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[rng.choice(["", "x", "auto_map", "__class__", str(key) + "x", "3", "-1", "\ud800"])] = (
                    rng.choice(NASTY)
                )
            case 5:
                other, its = rng.choice(places)
                if its in other if isinstance(other, dict) else its < len(other):
                    holder[key] = copy.deepcopy(other[its])
            case 6 if isinstance(holder, list):
                holder += holder[-1:] * rng.choice([1, 2, 300])
    return value


def _places(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def json_(rng, data, others):
    if rng.random() < 0.25:
        return text(rng, data, others) if rng.random() < 0.5 else bytes_(rng, data, others)
    if rng.random() < 0.02:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900])
    try:
        return dumped(tree(rng, json.loads(data)))
    except ValueError:
        return bytes_(rng, data, others)


def dumped(value):
    """JSON as it comes, with numbers of any length, NaN, and half a surrogate pair escaped."""
    return json.dumps(value).encode()


def lines(rng, data, others):
    """JSON Lines: one line's tree, or the lines as text."""
    parts = data.split(b"\n")
    place = rng.randrange(len(parts))
    if rng.random() < 0.3:
        return text(rng, data, others)
    parts[place] = json_(rng, parts[place], others)
    return b"\n".join(parts)


def safetensors(rng, data, others):
    """The header's tree, its length, or the numbers behind it."""
    choice = rng.random()
    if choice < 0.25:
        return bytes_(rng, data, others)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if choice < 0.45:
        body = bytearray(body)
        for _ in range(rng.choice([1, 3])):
            place = rng.randrange(0, max(1, len(body) - 4), 4)
            body[place : place + 4] = rng.choice(
                [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", rng.randbytes(4)]
            )
    elif choice < 0.6 and "__metadata__" in header:  # the JSON inside the metadata
        key = rng.choice(sorted(header["__metadata__"]))
        header["__metadata__"][key] = json_(rng, header["__metadata__"][key].encode(), others).decode(
            "utf-8", "replace"
        )
    elif choice < 0.8:
        name = rng.choice(sorted(header))
        match rng.randrange(4):
            case 0:
                header[name + "x"] = header.pop(name)
            case 1 if "dtype" in header[name]:
                header[name]["dtype"] = rng.choice(
                    ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "X", "C64"]
                )
            case 2 if "shape" in header[name]:
                header[name]["shape"] = rng.choice(
                    [[], [0], [1] * 40, [2**40], [2**62, 4], [len(body)], header[name]["shape"][::-1]]
                )
            case _:
                del header[name]
    else:
        header = tree(rng, header)
    head = dumped(header)
    declared = len(head) if rng.random() < 0.9 else rng.choice([0, 1, 2**31, 2**40, 2**64 - 1, len(head) + 1])
    return struct.pack("<Q", declared) + head + bytes(body)


def zip_(rng, data, others):
    """One part of an archive as text or bytes, one that unpacks to much more, or the archive's own bytes."""
    if rng.random() < 0.3:
        return bytes_(rng, data, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {one.filename: archive.read(one) for one in archive.infolist()}
    name = rng.choice(sorted(parts))
    match rng.randrange(6):
        case 0 | 1 | 2:
            parts[name] = _markup(rng, parts[name])
        case 3:
            parts[name] = bytes_(rng, parts[name], others)
        case 4:
            del parts[name]
        case 5:
            parts[rng.choice([name, "xl/x.xml", "../../x.xml"])] = b"<a>" * rng.choice([10, 100_000])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])) as archive:
        for one, content in parts.items():
            archive.writestr(one, content)
    return made.getvalue()


def _markup(rng, data):
    values = [
        b"",
        b"-1",
        b"1e400",
        b"XFD1048576",
        b"A0",
        b"s",
        b"inlineStr",
        b"b",
        b"e",
        b"d",
        b"99999999",
        b"n",
        b"\xff",
        b"A1:ZZ9",
    ]
    parts = data.split(b'"')
    if len(parts) < 3:
        return data[: rng.randrange(len(data) + 1)]
    for _ in range(rng.choice([1, 2, 4])):
        parts[rng.randrange(1, len(parts), 2)] = rng.choice(values)
    return b'"'.join(parts)


def sqlite(rng, data, others):
    """A few cells of a database, a row, or a whole table; or its bytes."""
    if rng.random() < 0.2:
        return bytes_(rng, data, others)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.sqlite"
        path.write_bytes(data)
        with closing(sqlite3.connect(path)) as database:
            database.text_factory = bytes
            try:
                _tables(rng, database)
                database.commit()
            except sqlite3.Error:  # a constraint of the table, or the data were damaged before
                pass
        return path.read_bytes()


def _tables(rng, database):
    names = [row[0].decode() for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for _ in range(rng.choice([1, 1, 2, 4])):
        filled = [name for name in names if database.execute(f'SELECT 1 FROM "{name}"').fetchone()]
        if not filled:
            return
        table = rng.choice(filled)
        columns = [row[1].decode() for row in database.execute(f'PRAGMA table_info("{table}")')]
        column, (row,) = rng.choice(columns), rng.choice(database.execute(f'SELECT rowid FROM "{table}"').fetchall())
        match rng.randrange(9):
            case 0:
                database.execute(f'DELETE FROM "{table}" WHERE rowid = ?', (row,))
            case 1:
                database.execute(f'DROP TABLE "{table}"')
                return
            case 2:
                database.execute(f'UPDATE "{table}" SET "{column}" = CAST("{column}" AS BLOB)')
            case _:
                (old,) = database.execute(f'SELECT "{column}" FROM "{table}" WHERE rowid = ?', (row,)).fetchone()
                database.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (_cell(rng, old), row))


def _cell(rng, old):
    """Another value: of the old one's JSON, if it is any, or any that SQLite can hold."""
    if isinstance(old, bytes) and rng.random() < 0.5:
        return json_(rng, old, [old]).decode("utf-8", "replace")
    value = rng.choice(NASTY)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(min(value, 10**300))
    return value if isinstance(value, int | float | None) else str(value).encode("utf-8", "replace").decode()


KINDS = {
    "bytes": bytes_, "text": text, "json": json_, "lines": lines, "safetensors": safetensors, "zip": zip_,
    "sqlite": sqlite,
}  # fmt: skip


def mutated(rng, kind, seeds):
    """An intact file, mutated."""
    return KINDS[kind](rng, rng.choice(seeds), seeds)
