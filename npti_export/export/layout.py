"""Where everything lies: a steered file's keys and tensors from its base's, and the base's from the steered file's.

Both directions are here because :func:`npti_export.export.gguf.plan_bake` tries the way back before it writes anything.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from npti_export.errors import GGUFError
from npti_export.export.rehome import Home, rehomed
from npti_export.gguf.blocks import block_shape
from npti_export.gguf.cursor import ARRAY, INT32, SCALARS
from npti_export.gguf.reader import GGUFFile, KeyValue, TensorInfo, widths_of
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
_KEPT = "npti.base.kept."  # and the name of a bias of the base that something was added to: its bytes
_ARCHITECTURE = "npti.base.architecture"
_WIDTH = "npti.base.feed_forward_length"
_COUNT = "npti.base.split.tensors.count"

_MLP = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.ffn_(gate|up|down)\.(weight|bias)")  # as llama.cpp spells them

_DOWN_BIAS = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.ffn_down\.bias")

Entry = tuple[str, bytes]  # a metadata key and its encoded value


def kept_key(name: str) -> str:
    """The key that holds a whole bias of the base, as adding to floats cannot be undone."""
    return _KEPT + name


def down_bias_layer(name: str) -> int | None:
    """The layer of a down projection's bias, None for every other tensor."""
    match = _DOWN_BIAS.fullmatch(name)
    return None if match is None else int(match[1])


def mlp_tensor(name: str) -> tuple[int, str] | None:
    """The layer and the kind, such as ``gate.weight``, of a tensor whose size goes with the width of an MLP."""
    match = _MLP.fullmatch(name)
    if match is None or (match[2], match[3]) == ("down", "bias"):
        return None
    return int(match[1]), f"{match[2]}.{match[3]}"


def with_width(tensor: TensorInfo | NewTensor, widths: Sequence[int], path: Path) -> NewTensor:
    """The tensor of the file ``path`` in a model whose layers have MLPs of these widths.

    Raises:
        GGUFError: there is no such layer or it has no MLP, or a tensor of this shape and type can have no such width.
    """
    found = mlp_tensor(tensor.name)
    if found is None:
        return NewTensor(tensor.name, tensor.shape, tensor.type_id, tensor.nbytes)
    layer, kind = found
    width = widths[layer] if layer < len(widths) else 0
    if not width:
        raise GGUFError(f"{path}: {tensor.name} belongs to none of the {len(widths)} layers; the file is damaged")
    block, nbytes = block_shape(tensor.type_id, tensor.name)
    shape = (width, *tensor.shape[1:]) if kind == "down.weight" else (*tensor.shape[:-1], width)
    if len(shape) != (2 if kind.endswith("weight") else 1) or shape[0] % block:
        raise GGUFError(f"{path}: {tensor.name}, {tensor.shape}, cannot have {width} neurons; the file is damaged")
    return NewTensor(tensor.name, shape, tensor.type_id, math.prod(shape) // block * nbytes)


def header_of(like: GGUFFile, keys: Sequence[Entry], tensors: Sequence[NewTensor]) -> tuple[bytes, list[NewTensor]]:
    """Header bytes and placed tensors of a file without quirks, of the version and alignment of ``like``."""
    placed = lay_out(tensors, like.alignment)
    return encode_header(like.version, keys, placed, like.alignment), placed


def steered_keys(part: GGUFFile, home: Home, widths: Sequence[int], tensor_count: int, *, first: bool) -> list[Entry]:
    """The keys of a steered file or shard: those of its base, what changed in them, and what they were before.

    Args:
        part: the base, or one shard of it.
        home: of the steered file.
        widths: of its MLPs, one a layer.
        tensor_count: tensors in all its shards together.
        first: not another shard than the first, of which llama.cpp reads no more than how the model is split.
    """
    changed: dict[str, bytes] = {}
    for entry in part.keys:
        if entry.key == "split.tensors.count" and entry.kind == INT32:
            changed[entry.key] = struct.pack("<Ii", INT32, tensor_count)
        elif entry.key == f"{home.base}.feed_forward_length" and first:
            changed[entry.key] = _encoded(widths, entry)
        elif entry.key == "general.architecture" and home.steered != home.base and first:
            changed[entry.key] = encode_value(home.steered)
    names = (home.steered_key(entry.key) if first else entry.key for entry in part.keys)
    keys = [(name, changed.get(entry.key, entry.raw)) for name, entry in zip(names, part.keys, strict=True)]
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
    """The home of a steered file, as it says itself.

    Raises:
        GGUFError: its heads are not what it says.
    """
    base = steered.text(_ARCHITECTURE) or steered.architecture
    return rehomed(steered, base, steered.architecture)


def base_widths(steered: GGUFFile, widths: Sequence[int]) -> list[int]:
    """Widths of the base's MLPs; ``widths`` are the steered file's.

    Raises:
        GGUFError: not said, or more than the steered file has.
    """
    result = widths_of(steered, _WIDTH, len(widths))
    if any(one > now for one, now in zip(result, widths, strict=True)):
        raise GGUFError(f"{steered.path}: is narrower than its base; it is damaged")
    return result


def _encoded(widths: Sequence[int], old: KeyValue) -> bytes:
    """The widths as one number, if that was so and they are equal; else as an array, of the type of the old one."""
    if old.array is None and len(set(widths)) == 1:
        return encode_uint32(widths[0])
    inner = INT32 if old.array is None else old.array[0]
    return struct.pack(f"<IIQ{len(widths)}{SCALARS[inner]}", ARRAY, inner, len(widths), *widths)
