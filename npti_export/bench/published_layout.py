"""The layout in which the NPTI authors published their personas and questions (paper: arXiv 2410.12327).

``description.json`` has one JSON object a line, whose keys are traits with a capital letter, ``Openness``, and with
``_reversed`` for the low pole; ``search/Openness.json`` and ``test/Openness.json`` have one ``{"question": …}`` a line.
In some copies ``questions/`` stands for ``test/``. Facets, topics and persons have no place in it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from npti_export.bench import PERSONAS, QUESTIONS, SPLITS, TraitBench
from npti_export.bench.definition import FILE_NAME
from npti_export.bench.reading import Faults, text_fault, text_lines
from npti_export.bench.scaffold import check_own_name, definition_to_fill_in
from npti_export.errors import BenchError, OutputError, shortened
from npti_export.files import atomic_directory, check_directory_writable
from npti_export.traits import FACETS

DESCRIPTION, REVERSED = "description.json", "_reversed"
FOLDERS = {"search": "search", "test": "test", "questions": "test"}  # of the layout, and the split that each holds
INVENTORY = "inventory.jsonl"
_PARTS = {FILE_NAME, PERSONAS, QUESTIONS, INVENTORY}
_MOST_TRAITS = 100


def is_layout(folder: Path) -> bool:
    """Whether a folder has any part of the layout."""
    return (folder / DESCRIPTION).is_file() or any((folder / name).is_dir() for name in FOLDERS)


def _is_exported(folder: Path) -> bool:
    inside = [entry.relative_to(folder) for entry in folder.rglob("*") if not entry.is_dir()]
    return Path(DESCRIPTION) in inside and all(
        one == Path(DESCRIPTION) or (len(one.parts) == 2 and one.parts[0] in SPLITS and one.suffix == ".json")
        for one in inside
    )


def is_imported(folder: Path) -> bool:
    """Whether a folder holds nothing but traits' folders, and these nothing but what an import writes."""
    entries = list(folder.iterdir())
    return bool(entries) and all(
        entry.is_dir() and {inner.name for inner in entry.iterdir()} <= _PARTS for entry in entries
    )


def export_layout(benches: Sequence[TraitBench], out: Path, *, force: bool) -> None:
    """Write benches in the published layout; facets, topics and persons are lost.

    Args:
        benches: of different traits.
        out: folder to write.
        force: replace an earlier export.

    Raises:
        BenchError: two benches of one trait, or a trait's name that the layout would read as another's low pole.
        OutputError: see :func:`npti_export.files.check_directory_writable`.
    """
    names = Counter(bench.trait for bench in benches)
    for name, count in names.items():
        if count > 1:
            raise BenchError(f"{name}: is given twice; give each trait once")
        if name.endswith(REVERSED):
            raise BenchError(f"{name}: ends in {REVERSED}, which is the low pole in the published layout; rename it")
    with atomic_directory(out, force=force, ours=_is_exported) as folder:
        poles = {bench.trait.capitalize(): bench.pole("+") for bench in benches}
        poles |= {bench.trait.capitalize() + REVERSED: bench.pole("-") for bench in benches}
        rows = itertools.zip_longest(*poles.values())
        _write(
            folder / DESCRIPTION,
            ({key: one.text for key, one in zip(poles, row, strict=True) if one is not None} for row in rows),
        )
        for split in SPLITS:
            (folder / split).mkdir()
            for bench in benches:
                path = folder / split / f"{bench.trait.capitalize()}.json"
                _write(path, ({"question": one.text} for one in bench.split(split)))


def _write(path: Path, items: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as stream:  # escaped, as published, for readers of any age
        stream.writelines(json.dumps(item) + "\n" for item in items)


def import_layout(source: Path, out: Path, faults: Faults, *, force: bool) -> dict[str, Counter[str]]:
    """Turn the published layout into one folder a trait; a line is held in memory at a time.

    A trait that is none of the Big Five gets a ``trait.toml`` to fill in.

    Args:
        source: folder of the layout.
        out: folder to write, with a folder a trait.
        faults: gets malformed lines.
        force: replace an earlier import.

    Returns:
        By trait, how many ``+`` and ``-`` personas, ``search`` and ``test`` questions were written.

    Raises:
        BenchError: a malformed line that is not to be skipped, nothing readable, or a bad or taken name.
        OutputError: see :func:`npti_export.files.check_directory_writable`.
    """
    if out.resolve() == source.resolve() or source.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out}: holds what is to be imported; name another folder by --out")
    if (source / "test").is_dir() and (source / "questions").is_dir():
        raise BenchError(f"{source}: has test/ and questions/, which are both for test questions; remove one of them")
    check_directory_writable(out, force=force, ours=is_imported)
    found: dict[str, Counter[str]] = {}
    with atomic_directory(out, force=force, ours=is_imported) as folder, ExitStack() as stack:
        streams: dict[tuple[str, str], IO[str]] = {}
        for file, name, item in _items(source, faults):
            trait = _trait(source, item["source"]["file"], name, found)
            if (trait, file) not in streams:
                (folder / trait).mkdir(exist_ok=True)
                path = folder / trait / file
                streams[trait, file] = stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            streams[trait, file].write(json.dumps(item, ensure_ascii=False) + "\n")
            found[trait][item.get("pole") or item["split"]] += 1
        faults.check()
        if not found:
            raise BenchError(f"{source}: holds nothing that could be read as the published layout{_first(faults)}")
        for trait in found.keys() - FACETS.keys():
            (folder / trait / FILE_NAME).write_text(definition_to_fill_in(trait), encoding="utf-8")
        stack.close()  # before the folder is renamed, which Windows refuses while files are open
    return found


def _first(faults: Faults) -> str:
    return f"; {faults.first[0]}" if faults.first else ""


def _trait(source: Path, file: str, name: str, found: dict[str, Counter[str]]) -> str:
    trait = name.lower()
    if trait not in found:
        if trait not in FACETS:
            try:
                check_own_name(trait)
            except BenchError as error:
                raise BenchError(f"{source / file}: {error}") from error
        if len(found) == _MOST_TRAITS:
            raise BenchError(f"{source / file}: names more than {_MOST_TRAITS} traits")
        found[trait] = Counter()
    return trait


def _items(source: Path, faults: Faults) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """File to write to, trait as named, and item."""
    for key, text, where in _texts(source / DESCRIPTION, DESCRIPTION, faults):
        low = key.endswith(REVERSED)
        yield PERSONAS, key.removesuffix(REVERSED), {"pole": "-" if low else "+", "text": text, "source": where}
    for folder, split in FOLDERS.items():
        if not (source / folder).is_dir():
            continue
        for path in sorted((source / folder).glob("*.json")):
            for key, text, where in _texts(path, f"{folder}/{path.name}", faults):
                if key == "question":
                    yield QUESTIONS, path.stem, {"split": split, "text": text, "source": where}


def _texts(path: Path, called: str, faults: Faults) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, text and source of each entry of each line's object."""
    if not path.is_file():
        return
    for number, line in text_lines(path, faults):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(path, number, f"not a JSON object ({error})")
            continue
        if not isinstance(item, dict) or not item:
            faults.add(path, number, "not a JSON object")
            continue
        if called != DESCRIPTION and "question" not in item:
            faults.add(path, number, f"has keys {shortened(', '.join(item), 200)}, and 'question' is needed")
            continue
        for key, value in item.items():
            wrong = text_fault(value) if called == DESCRIPTION or key == "question" else None
            if wrong is not None:
                faults.add(path, number, f"{shortened(key)} {wrong}")
            else:
                yield key, value, {"file": called, "line": number}
