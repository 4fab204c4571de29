"""Importance matrices of llama.cpp: how much the error of each column of a weight counts when it is quantised.

``llama-imatrix`` sums the squares of what each column is multiplied with. It writes GGUF files, and once wrote files of
its own kind (``.dat``). Both layouts, and what is made of the sums, are from llama.cpp: tools/imatrix/imatrix.cpp
(``save_imatrix``, ``save_imatrix_legacy``), common/imatrix-loader.cpp, tools/quantize/quantize.cpp (``load_imatrix``).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npti_export.errors import GGUFError, ModelError, shortened
from npti_export.files import sha256_file
from npti_export.gguf.blocks import Floats
from npti_export.gguf.cursor import ARRAY, STRING, UINT32
from npti_export.gguf.reader import MAGIC, GGUFFile, TensorInfo, parse_gguf

_F32 = 0
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_LONGEST_NAME = 63  # GGML_MAX_NAME of ggml.h, less the zero at the end
_LONGEST_DATASET = 4096  # a path
_LONGEST_VALUE = 127  # llama_model_kv_override.val_str of llama.h, less the zero at the end
_MAX_ENTRIES = 1 << 16
_MAX_VALUES = 1 << 24  # of an entry; Kimi K2 has 384 experts of 7168 columns, 2.8 million
_MAX_BYTES = 1 << 32  # of a file; Kimi K2's has 1.5 GB
_MAX_INT32 = (1 << 31) - 1
# llama.cpp passes over an entry of another size for these (llama-quant.cpp, tensor_name_match_token_embd).
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_NAMED = 3  # tensors that a message names
_MEND = "make it again with llama.cpp's llama-imatrix, or download it again"


@dataclass(frozen=True)
class Entry:
    """The sums of one tensor: ``size`` float32 values at ``offset`` of the file, one for each column of each matrix.

    ``counts`` ``[matrices]`` float32 is what the sums of each matrix are divided by, all >= 0; a tensor of experts has
    several matrices. Where it is 0 nothing was seen of a matrix, and each of its columns counts 1.
    """

    offset: int
    size: int
    counts: Floats


@dataclass(frozen=True)
class ImportanceMatrix:
    """A file of which every value was read and found good, and none is kept.

    Attributes:
        path: where it is.
        entries: by the name of the tensor.
        dataset: the first text that it was made with, if it says so.
        chunks: how many chunks of text that was; 0 if it does not say.
        digest: SHA-256 of the file.
    """

    path: Path
    entries: dict[str, Entry]
    dataset: str | None
    chunks: int
    digest: str

    @property
    def metadata(self) -> dict[str, str | int]:
        """What ``llama-quantize`` writes about it into a GGUF, in its order, but of the path only the name.

        Texts are cut to 127 bytes as there, but not within a character.
        """
        return {
            "quantize.imatrix.file": _cut(self.path.name),
            **({} if self.dataset is None else {"quantize.imatrix.dataset": _cut(self.dataset)}),
            "quantize.imatrix.entries_count": len(self.entries),
            **({"quantize.imatrix.chunks_count": self.chunks} if self.chunks > 0 else {}),
        }

    def check_for(self, sizes: Mapping[str, int], model: str) -> None:
        """Raise unless it can be of a model.

        Args:
            sizes: of each tensor, the columns of all its matrices together.
            model: for messages.

        Raises:
            ModelError: it has none of these tensors, or one with another number of columns.
        """
        shared = [name for name in self.entries if name in sizes]
        if not shared:
            raise ModelError(
                f"{self.path}: is the importance matrix of another model than {model}, none of whose matrices is among "
                f"its {len(self.entries)} ({listed(self.entries)}); take the one of this model"
            )
        other = [name for name in shared if self.entries[name].size != sizes[name] and name not in _EMBEDDINGS]
        if other:
            differ = [f"{name}: {self.entries[name].size} columns, not {sizes[name]}" for name in other]
            raise ModelError(
                f"{self.path}: is the importance matrix of another model than {model} ({listed(differ)}); take the "
                "one of this model"
            )

    def importance(self, names: Iterable[str]) -> dict[str, Floats]:
        """The mean squares, ``[columns of all matrices]`` float32 each, of those of the named tensors that it has.

        Raises:
            ModelError: the file is not what it was when it was read first.
        """
        found = {}
        try:
            if sha256_file(self.path) != self.digest:
                raise ModelError(f"{self.path}: changed while the job ran; run the command again")
            with self.path.open("rb") as stream:
                for name in names:
                    if name in self.entries:
                        found[name] = _means(stream, self.entries[name], self.path, name)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read again ({error.strerror}); run the command again") from error
        return found


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of either kind, and check every value.

    Memory is bounded: at most one entry is held at a time.

    Raises:
        GGUFError: a GGUF that is malformed.
        ModelError: missing, no importance matrix, or with lengths, names, values or counts that cannot be.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits until someone writes to it
            raise ModelError(f"{path}: is not a file; give an importance matrix of llama.cpp")
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            if size > _MAX_BYTES:
                raise ModelError(f"{path}: has {size >> 30} GB, more than any importance matrix; give another file")
            stream.seek(0)
            is_gguf = size >= 24 and stream.read(4) == MAGIC  # 24: the shortest header
            stream.seek(0)
            if is_gguf:
                entries, dataset, chunks = _read_gguf(stream, parse_gguf(stream, size, path))
            else:
                entries, dataset, chunks = _Legacy(stream, size, path).read()
            for name, entry in entries.items():
                _sums(stream, entry, path, name)
        return ImportanceMatrix(path, entries, dataset, chunks, sha256_file(path))
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def _read_gguf(stream: BinaryIO, header: GGUFFile) -> tuple[dict[str, Entry], str | None, int]:
    """Entries, dataset and chunks of the kind that llama-imatrix writes today; other tensors are passed over."""
    path = header.path
    if header.text("general.type") != "imatrix":
        raise ModelError(f"{path}: is a GGUF, but no importance matrix (general.type); give one of llama.cpp")
    dataset, chunks = _dataset(header), _uint32(header, _CHUNKS)
    _uint32(header, _CHUNK_SIZE)  # llama-quantize refuses a file without it
    found: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        for suffix in (_SUMS, _COUNTS):
            if tensor.name.endswith(suffix):
                found.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor
    if not found or len(found) > _MAX_ENTRIES:
        raise ModelError(f"{path}: has {len(found)} entries, so it is no importance matrix; {_MEND}")
    return {name: _gguf_entry(stream, path, name, pair) for name, pair in found.items()}, dataset, chunks


def _gguf_entry(stream: BinaryIO, path: Path, name: str, pair: dict[str, TensorInfo]) -> Entry:
    if not name or len(pair) < 2:
        raise ModelError(f"{path}: has {name}{next(iter(pair))} without its other half; it is damaged, {_MEND}")
    sums, counts = pair[_SUMS], pair[_COUNTS]
    if sums.type_id != _F32 or counts.type_id != _F32:
        raise ModelError(f"{path}: the sums and counts of {name} are not F32; it is damaged, {_MEND}")
    size, matrices = sums.nbytes // 4, counts.nbytes // 4
    # Where one count is for all matrices, or the sums have one dimension, llama.cpp goes by the numbers alone.
    if size > _MAX_VALUES or size % matrices or sums.rows not in (1, matrices):
        raise ModelError(
            f"{path}: the {size} sums of {name} in {sums.rows} rows do not go with its {matrices} counts; it is "
            f"damaged, {_MEND}"
        )
    stream.seek(counts.offset)
    numbers = np.frombuffer(stream.read(counts.nbytes), "<f4").astype(np.float64)
    if not ((numbers >= 0) & (numbers < 2.0**63)).all():  # also where it is NaN
        raise ModelError(f"{path}: {name}{_COUNTS} has a value that is no number of tokens; it is damaged, {_MEND}")
    return Entry(sums.offset, size, np.floor(numbers + 0.5).astype(np.float32))  # std::lround, then a float


def _dataset(header: GGUFFile) -> str | None:
    entry = header.by_key.get(_DATASETS)
    if entry is None or entry.kind != ARRAY or entry.array is None or entry.array[0] != STRING:
        raise ModelError(f"{header.path}: {_DATASETS} is missing or no list of names; it is damaged, {_MEND}")
    if entry.array[1] > _MAX_ENTRIES:
        raise ModelError(f"{header.path}: {_DATASETS} claims {entry.array[1]} names; it is damaged, {_MEND}")
    names: list[str] = entry.value
    return _checked_dataset(header.path, names[0]) if names else None


def _checked_dataset(path: Path, name: str) -> str:
    if len(name) > _LONGEST_DATASET or not name.isprintable():
        raise ModelError(f"{path}: the name of its data set, {shortened(name)}, cannot be; it is damaged, {_MEND}")
    return name


def _uint32(header: GGUFFile, key: str) -> int:
    entry = header.by_key.get(key)
    if entry is None or entry.kind != UINT32 or entry.value > _MAX_INT32:  # an int in llama-quantize
        raise ModelError(f"{header.path}: {key} is missing or not a uint32 below 2^31; it is damaged, {_MEND}")
    return int(entry.value)


class _Legacy:
    """The older kind, little-endian: a number of entries, each a length, name, divisor, number of values and values.

    Then, where they are there, the number of chunks, and a length and the name of the data set.
    """

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self.stream, self.size, self.path = stream, size, path

    def read(self) -> tuple[dict[str, Entry], str | None, int]:
        """Entries, dataset and chunks; values are passed over."""
        count = self._number("the number of entries", 1, _MAX_ENTRIES)
        entries: dict[str, Entry] = {}
        for place in range(count):
            which = f"entry {place + 1} of {count}"
            name = self._text(f"the name of {which}", self._number(f"the length of {which}'s name", 1, _LONGEST_NAME))
            if name in entries:
                raise ModelError(f"{self.path}: {name} occurs twice; it is damaged, {_MEND}")
            divisor = self._number(f"the number of chunks of {name}", 0, _MAX_INT32)
            size = self._number(f"the number of values of {name}", 1, _MAX_VALUES)
            start = self.stream.tell()
            if start + 4 * size > self.size:
                raise self._truncated(f"the values of {name}")
            # Nothing is divided by 0 here; matrices of which nothing was seen have ones already.
            entries[name] = Entry(start, size, np.array([divisor or 1], np.float32))
            self.stream.seek(start + 4 * size)
        return entries, *self._ending()

    def _ending(self) -> tuple[str | None, int]:
        if self.stream.tell() == self.size:
            return None, 0
        chunks = self._number("the number of chunks", 0, _MAX_INT32)
        if self.stream.tell() == self.size:
            return None, chunks
        length = self._number("the length of its data set's name", 0, _LONGEST_DATASET)
        name = self._text("the name of its data set", length)
        if self.stream.tell() != self.size:
            raise ModelError(f"{self.path}: goes on after its end; it is damaged, {_MEND}")
        return _checked_dataset(self.path, name) if length else None, chunks

    def _number(self, what: str, least: int, most: int) -> int:
        data = self.stream.read(4)
        if len(data) < 4:
            raise self._truncated(what)
        (value,) = struct.unpack("<i", data)
        if not least <= value <= most:
            raise ModelError(
                f"{self.path}: {what} is {value}, not {least} to {most}; it is no importance matrix of llama.cpp, or "
                f"damaged: {_MEND}"
            )
        return int(value)

    def _text(self, what: str, length: int) -> str:
        data = self.stream.read(length)
        if len(data) < length:
            raise self._truncated(what)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if not text.isprintable():
            raise ModelError(f"{self.path}: {what} is no text; it is damaged, {_MEND}")
        return text

    def _truncated(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: ends within {what}; it is truncated, {_MEND}")


def _sums(stream: BinaryIO, entry: Entry, path: Path, name: str) -> Floats:
    stream.seek(entry.offset)
    data = stream.read(4 * entry.size)
    if len(data) < 4 * entry.size:
        raise GGUFError(f"{path}: ends within the values of {name}; it is truncated, {_MEND}")
    values = np.frombuffer(data, "<f4")
    if not ((values >= 0) & (values < np.inf)).all():  # also where it is NaN
        raise ModelError(f"{path}: {name} has a value that is negative or not finite; it is damaged, {_MEND}")
    return values


def _means(stream: BinaryIO, entry: Entry, path: Path, name: str) -> Floats:
    """Sums divided by their counts, in float32 as in llama-quantize; ones where the count is 0."""
    sums, counts = _sums(stream, entry, path, name).reshape(len(entry.counts), -1), entry.counts[:, None]
    return np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0).ravel()


def listed(items: Iterable[str]) -> str:
    """A few of many, for a message."""
    found = list(items)
    return "; ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def _cut(text: str) -> str:
    """At most so many bytes of UTF-8 as llama.cpp has room for; what a file system holds beside text is replaced."""
    return text.encode("utf-8", "replace")[:_LONGEST_VALUE].decode("utf-8", "ignore")
