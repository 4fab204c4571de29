"""Models split into several files, as llama.cpp's gguf-split does: NAME-00001-of-0000N.gguf and so on.

llama.cpp is given the first, which has all metadata, and finds the others by their names in the same folder; each says
which of how many it is (src/llama-model-loader.cpp, src/llama.cpp: llama_split_path).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

from npti_export.errors import GGUFError, OutputError
from npti_export.gguf.cursor import INT32, UINT16
from npti_export.gguf.reader import GGUFFile, read_gguf

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
# Keys that say how a model is split, and their types (llama.cpp's tools/gguf-split and src/llama-model-loader.cpp).
_KINDS = {"split.no": UINT16, "split.count": UINT16, "split.tensors.count": INT32}
_NAMED = 3  # missing files that a message names


def read_model(path: Path) -> GGUFFile:
    """Read the header of a model: of one file, or of all the files that it is split into, as one.

    Raises:
        GGUFError: as :func:`npti_export.gguf.reader.read_gguf`; a part other than the first, called otherwise than
            llama.cpp expects, missing, or of another model.
    """
    first = read_gguf(path)
    count = _number(first, "split.count") if "split.count" in first.by_key else 1
    if count < 2:
        return first
    number, match = _number(first, "split.no"), _NAME.fullmatch(path.name)
    if number != 0:
        name = _named(match["stem"] if match else "NAME", 0, count)
        raise GGUFError(f"{path}: is part {number + 1} of {count} of a model; give the first, {name}")
    if match is None or (int(match["number"]), int(match["count"])) != (1, count):
        raise GGUFError(
            f"{path}: is the first of {count} files of a model, and llama.cpp finds the others by its name; "
            f"call it {_named('NAME', 0, count)} again, and the others alike"
        )
    paths = [path, *(path.with_name(_named(match["stem"], other, count)) for other in range(1, count))]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        names = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        raise GGUFError(f"{path}: the model is incomplete without {names}; put them into the same folder")
    shards = (first, *(read_gguf(one) for one in paths[1:]))
    tensors = tuple(itertools.chain.from_iterable(shard.tensors for shard in shards))
    for place, shard in enumerate(shards):
        _check_shard(shard, place, count, len(tensors))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError(f"{path}: two of its {count} files have the same tensor; download them again")
    return replace(first, tensors=tensors, size=sum(shard.size for shard in shards), shards=shards)


def _check_shard(shard: GGUFFile, number: int, count: int, tensors: int) -> None:
    for key, wanted in (("split.no", number), ("split.count", count), ("split.tensors.count", tensors)):
        found = _number(shard, key)
        if found != wanted:
            raise GGUFError(
                f"{shard.path}: {key} is {found}, not {wanted}, so it is not part {number + 1} of this model; "
                "download all of its files again"
            )


def _number(header: GGUFFile, key: str) -> int:
    entry = header.by_key.get(key)
    if entry is None or entry.kind != _KINDS[key] or entry.value < 0:
        raise GGUFError(f"{header.path}: metadata key {key} is missing or not a number; the file is damaged")
    return int(entry.value)


def _named(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def shard_paths(path: Path, count: int) -> list[Path]:
    """Where a model of ``count`` files goes that is asked for as ``path``, a plain name or that of the first file.

    Raises:
        OutputError: the name of another file than the first, or of another count.
    """
    if count == 1:
        return [path]
    match = _NAME.fullmatch(path.name)
    if match is None:
        stem = path.name.removesuffix(".gguf")
    elif (int(match["number"]), int(match["count"])) == (1, count):
        stem = match["stem"]
    else:
        name = _named(match["stem"], 0, count)
        raise OutputError(
            f"{path}: the model has {count} files; name the first of them, {name}, or {match['stem']}.gguf"
        )
    return [path.with_name(_named(stem, number, count)) for number in range(count)]


def named_shards(path: Path) -> list[Path]:
    """The files that a name stands for: itself, or all parts where it is the name of the first of several."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["number"]) != 1 or int(match["count"]) == 0:
        return [path]
    return shard_paths(path, int(match["count"]))


def first_in(folder: Path) -> Path:
    """The first file of the split model in a folder of its own."""
    return next(folder.glob("*-00001-of-?????.gguf"))
