"""Where everything lies: a steered file's keys and tensors from its base's, and the base's from the steered file's.

Both directions are here because :func:`npti_export.export.gguf.plan_bake` tries the way back before it writes anything.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence

from npti_export.errors import GGUFError
from npti_export.export.rehome import Home, head_size
from npti_export.gguf.blocks import block_shape
from npti_export.gguf.reader import SCALARS, GGUFFile, TensorInfo
from npti_export.gguf.writer import NewTensor, encode_header, encode_uint32, encode_value, lay_out

PREFIX = "npti."
FORMAT = 2  # of the npti.* keys and of what strip expects
FORMAT_KEY = "npti.format"
SHA256 = "npti.base.sha256"
BYTES = "npti.base.bytes"
TENSORS = "npti.base.tensors"  # how many of the file's tensors are the base's: the first ones
HEADER = "npti.base.header"  # where it cannot be worked out
GAPS = "npti.base.gaps"  # bytes between tensors, where they are not zero
OFF_GATES = "npti.base.gate_biases"  # float32 gate biases of the base where the steered file has OFF_BIAS
_ARCHITECTURE = "npti.base.architecture"
_WIDTH = "npti.base.feed_forward_length"
_COUNT = "npti.base.split.tensors.count"

_MLP = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)")
_ARRAY = 9  # a value's type tag, ggml docs/gguf.md

Entry = tuple[str, bytes]  # a metadata key and its encoded value


def mlp_tensor(name: str) -> tuple[int, str] | None:
    """The layer and the kind, such as ``gate.weight``, of a tensor whose size goes with the width of an MLP."""
    match = _MLP.fullmatch(name)
    if match is None or (match[2], match[3]) == ("down", "bias"):
        return None
    return int(match[1]), f"{match[2]}.{match[3]}"


def with_width(tensor: TensorInfo | NewTensor, widths: Sequence[int]) -> NewTensor:
    """The tensor in a model whose layers have MLPs of these widths."""
    found = mlp_tensor(tensor.name)
    if found is None:
        return NewTensor(tensor.name, tensor.shape, tensor.type_id, tensor.nbytes)
    layer, kind = found
    width = widths[layer]
    shape = (width, tensor.shape[1]) if kind == "down.weight" else (*tensor.shape[:-1], width)
    block, nbytes = block_shape(tensor.type_id, tensor.name)
    return NewTensor(tensor.name, shape, tensor.type_id, math.prod(shape) // block * nbytes)


def header_of(like: GGUFFile, keys: Sequence[Entry], tensors: Sequence[NewTensor]) -> tuple[bytes, list[NewTensor]]:
    """Header bytes and placed tensors of a file without quirks, of the version and alignment of ``like``."""
    placed = lay_out(tensors, like.alignment)
    return encode_header(like.version, keys, placed, like.alignment), placed


def steered_keys(part: GGUFFile, home: Home, widths: Sequence[int], tensor_count: int) -> list[Entry]:
    """The keys of a steered file or shard: those of its base, what changed in them, and what they were before.

    Args:
        part: the base, or one shard of it.
        home: of the steered file.
        widths: of its MLPs, one a layer.
        tensor_count: tensors in all its shards together.
    """
    changed: dict[str, bytes] = {}
    for entry in part.keys:
        if entry.key == f"{home.base}.feed_forward_length":
            changed[entry.key] = _same_array(entry.raw, widths) or encode_uint32(widths[0])
        elif entry.key == "general.architecture" and home.steered != home.base:
            changed[entry.key] = encode_value(home.steered)
        elif entry.key == "split.tensors.count":
            changed[entry.key] = _same_scalar(entry.raw, tensor_count)
    keys = [(home.steered_key(entry.key), changed.get(entry.key, entry.raw)) for entry in part.keys]
    return keys + [(_former(key, home), part.by_key[key].raw) for key in changed]


def base_keys(keys: Iterable[Entry], home: Home) -> list[Entry]:
    """The keys of the base: undoes :func:`steered_keys`."""
    held = dict(keys)
    names = [(home.base_key(key), raw) for key, raw in held.items() if not key.startswith(PREFIX)]
    return [(key, held.get(_former(key, home), raw)) for key, raw in names]


def _former(key: str, home: Home) -> str:
    """The key that holds what ``key`` was in the base, for those that change."""
    changing = {
        f"{home.base}.feed_forward_length": _WIDTH,
        "general.architecture": _ARCHITECTURE,
        "split.tensors.count": _COUNT,
    }
    return changing.get(key, "")


def steered_home(steered: GGUFFile) -> Home:
    """The home of a steered file, as it says itself."""
    base = steered.get(_ARCHITECTURE, steered.architecture)
    if base == steered.architecture:
        return Home(steered.architecture, steered.architecture)
    return Home(str(base), steered.architecture, head_size(steered))


def base_widths(steered: GGUFFile, widths: Sequence[int]) -> list[int]:
    """Widths of the base's MLPs; ``widths`` are the steered file's.

    Raises:
        GGUFError: not said, or more than the steered file has.
    """
    stored = steered.get(_WIDTH)
    result = stored if isinstance(stored, list) else [stored] * len(widths)
    if len(result) != len(widths) or not all(isinstance(one, int) and one >= 0 for one in result):
        raise GGUFError(f"{steered.path}: {_WIDTH} is missing or not a width a layer; the file is damaged")
    if any(one > now for one, now in zip(result, widths, strict=True)):
        raise GGUFError(f"{steered.path}: is narrower than its base; it is damaged")
    return result


def _same_array(raw: bytes, values: Sequence[int]) -> bytes | None:
    """The values as an array of the same type as ``raw`` is, or None where that is none."""
    kind, inner = struct.unpack_from("<II", raw.ljust(8, b"\0"))
    if kind != _ARRAY:
        return None
    return struct.pack(f"<IIQ{len(values)}{SCALARS[inner]}", _ARRAY, inner, len(values), *values)


def _same_scalar(raw: bytes, value: int) -> bytes:
    (kind,) = struct.unpack_from("<I", raw)
    return struct.pack(f"<I{SCALARS[kind]}", kind, value)
