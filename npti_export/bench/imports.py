"""Personas, questions and inventories from elsewhere, into folders of traits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from npti_export.bench import PERSONAS, QUESTIONS, read_personas, read_questions, shipped_folder
from npti_export.bench.definition import FILE_NAME, TraitDefinition, read_definition
from npti_export.bench.inventories import SUFFIXES, inventory_items
from npti_export.bench.lines import PLACEHOLDER, Fault, read_bytes
from npti_export.bench.published_layout import INVENTORY, import_layout, is_layout
from npti_export.bench.reading import Faults, text_fault, text_lines
from npti_export.errors import BenchError, OutputError
from npti_export.files import atomic_output, check_place, check_writable, translate_os_errors
from npti_export.temporaries import TemporaryFolder
from npti_export.traits import FACETS

TEXTS = (".txt", ".text", ".md")


@dataclass(frozen=True)
class How:
    """What the lines of a plain text file are, and how an inventory is read.

    Attributes:
        kind: of plain text.
        pole: of its personas.
        split: of its questions.
        columns: headers of an inventory by what they mean.
        sheet: of an XLSX, None for the first.
    """

    kind: Literal["questions", "personas"] = "questions"
    pole: str = "+"
    split: str = "search"
    columns: Mapping[str, str] = field(default_factory=dict)
    sheet: str | None = None


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        counts: by trait: ``+`` and ``-`` personas, ``search`` and ``test`` questions, inventory ``items``.
        columns: headers that were read, by what they mean.
        faults: what was left out.
        repeated: lines that the folder had already.
    """

    counts: dict[str, Counter[str]]
    columns: dict[str, str]
    faults: Faults
    repeated: int = 0


def import_source(source: Path, out: Path, how: How, *, skip_bad: bool, force: bool) -> Imported:
    """Import the published layout (a folder), an inventory (JSON Lines, CSV, XLSX) or plain text.

    Args:
        source: file or folder.
        out: the layout's and an inventory's traits get a folder each in it; plain text goes into it, a trait's folder.
        how: what cannot be told from the source.
        skip_bad: leave malformed lines out, and count them.
        force: replace what an earlier import wrote.

    Raises:
        BenchError: malformed lines that are not to be skipped, or nothing readable.
        OutputError: something is there already, or cannot be written.
    """
    faults = Faults(skip=skip_bad)
    if source.is_dir():
        if not is_layout(source):
            raise BenchError(
                f"{source}: is no published layout; that has description.json, search/ and test/ with a file a trait"
            )
        return Imported(import_layout(source, out, faults, force=force), {}, faults)
    if not source.is_file():
        raise BenchError(f"{source}: there is no such file or folder")
    suffix = source.suffix.lower()
    if suffix in SUFFIXES:
        return _import_inventory(source, out, how, faults, force=force)
    if suffix in TEXTS:
        return _import_text(source, out, how, faults)
    raise BenchError(
        f"{source}: its ending says nothing; inventories end in {', '.join(SUFFIXES)}, plain text in {', '.join(TEXTS)}"
    )


def _import_inventory(source: Path, out: Path, how: How, faults: Faults, *, force: bool) -> Imported:
    check_place(out, 0)
    counts: dict[str, Counter[str]] = {}
    columns: dict[str, str] = {}
    with TemporaryFolder() as staged, ExitStack() as stack:
        streams: dict[str, IO[str]] = {}
        for item in inventory_items(source, how.columns, how.sheet, faults, columns):
            trait = item["trait"]
            if trait not in streams:
                if len(streams) == 200:  # open files
                    raise BenchError(f"{source}: names more than 200 traits; is {columns['trait']!r} the right column?")
                path = staged / f"{trait}.jsonl"
                streams[trait] = stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            streams[trait].write(json.dumps(item, ensure_ascii=False) + "\n")
            counts.setdefault(trait, Counter())["items"] += 1
        faults.check()
        if not counts:
            raise BenchError(f"{source}: holds no item{f'; {faults.first[0]}' if faults.first else ''}")
        stack.close()
        places = {trait: _inventory_folder(out, trait, counts) / INVENTORY for trait in sorted(counts)}
        for path in places.values():
            if path.exists():
                check_writable(path, force=force)
        for trait, path in places.items():
            with translate_os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_output(path, force=force) as temporary:
                shutil.copyfile(Path(staged) / f"{trait}.jsonl", temporary)
    return Imported(counts, columns, faults)


def _inventory_folder(out: Path, trait: str, counts: Mapping[str, Any]) -> Path:
    """``out/trait``, or ``out`` where that is the trait's own folder."""
    if not (out / FILE_NAME).is_file():
        return out / trait
    name = read_definition(out).name
    others = sorted(counts.keys() - {name})
    if others:
        raise OutputError(f"{out}: is the folder of {name}, and the inventory has {', '.join(others)}, too")
    return out


def _definition(folder: Path) -> TraitDefinition:
    if (folder / FILE_NAME).is_file():
        return read_definition(folder)
    name = folder.resolve().name.lower()
    if name in FACETS:
        return read_definition(shipped_folder(name))
    raise BenchError(
        f"{folder}: is no trait's folder, as it has no {FILE_NAME}; make one by npti-export bench new {name}"
    )


def _import_text(source: Path, out: Path, how: How, faults: Faults) -> Imported:
    """Add the lines of a text file to a trait's folder; placeholders of the same pole or split go."""
    definition = _definition(out)
    personas = how.kind == "personas"
    key, value = ("pole", how.pole) if personas else ("split", how.split)
    path = out / (PERSONAS if personas else QUESTIONS)
    kept, there = _kept(path, definition, key, value)
    made = not out.exists()
    with translate_os_errors(out):
        out.mkdir(exist_ok=True)
    try:
        added, repeated = _add(source, path, kept, there, {key: value}, faults)
    except BaseException:
        if made:
            out.rmdir()
        raise
    return Imported({definition.name: Counter({value: added})}, {}, faults, repeated)


def _add(
    source: Path, path: Path, kept: list[bytes], there: set[int], tag: dict[str, str], faults: Faults
) -> tuple[int, int]:
    """Write what stays and what is new; return how many are new, and how many were there."""
    added = repeated = 0
    with atomic_output(path, force=True) as temporary:
        with temporary.open("wb") as stream:
            stream.writelines(line + b"\n" for line in kept)
            for number, text in _texts(source, faults):
                if hash(text) in there:  # 64 bits for each text, so that files of any size go through
                    repeated += 1
                    continue
                there.add(hash(text))
                item = {**tag, "text": text, "source": {"file": source.name, "line": number}}
                stream.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
                added += 1
        faults.check()
        if not added:
            had = f"; all {repeated} were there already" if repeated else ""
            raise BenchError(f"{source}: holds no line that could be added{had}")
    return added, repeated


def _kept(path: Path, definition: TraitDefinition, key: str, value: str) -> tuple[list[bytes], set[int]]:
    """Lines of the folder's file that stay, and hashes of the texts among them of that pole or split."""
    if not path.exists():
        return [], set()
    data, faults = read_bytes(path), list[Fault]()
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not data.strip():
        return [], set()
    read = read_personas if key == "pole" else read_questions
    items = read(data, path.parent, definition, faults)
    if faults:
        raise BenchError(f"{faults[0]}; mend that first")
    same = {item.line: item.text for item in items if getattr(item, key) == value}
    gone = {line for line, text in same.items() if text.lstrip().startswith(PLACEHOLDER)}
    kept = [line for number, line in enumerate(lines, 1) if number not in gone and line.strip()]
    return kept, {hash(text) for line, text in same.items() if line not in gone}


def _texts(source: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    for number, line in text_lines(source, faults):
        text = line.strip()
        wrong = text_fault(text) if text else None
        if wrong is not None:
            faults.add(source, number, wrong)
        elif text:
            yield number, text
