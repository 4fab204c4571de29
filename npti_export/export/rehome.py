"""Write a family as another that has a place for what it lacks.

That is qwen2 as llama, whose MLPs may have biases, and both as deci, whose layers may differ in width. llama.cpp loads
and computes the same for llama and deci (src/models/llama.cpp and deci.cpp, line by line: norms, rotary embedding with
its factors, attention with its biases and scales, MLP with its biases, output), as long as every layer has heads and an
MLP; only that a draft model can see each layer's input in llama alone. qwen2 differs in one thing:

llama.cpp computes both alike but for the dimensions that its rotary embedding pairs: (j, j + d/2) of each head of size
d in qwen2 (LLAMA_ROPE_TYPE_NEOX), (2j, 2j + 1) in llama (LLAMA_ROPE_TYPE_NORM). Scores are sums over dimensions, so
reordering the rows of the q and k projections alike, and their biases, leaves them the same. Whole rows move, so
quantised bytes are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from npti_export.architectures import RAGGED, Layout, check_ragged, gguf_family
from npti_export.compiler.program import Indices
from npti_export.errors import GGUFError, ModelError
from npti_export.gguf.cursor import INT32, UINT32
from npti_export.gguf.reader import GGUFFile, layer_count

_REORDERED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
# Tensors of qwen2 files (src/models/qwen2.cpp of llama.cpp) that llama has a place for, too.
_SHARED = re.compile(
    r"(token_embd|output_norm|output)\.weight"
    r"|blk\.\d+\.(attn_norm|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
    r"|blk\.\d+\.attn_[qkv]\.(weight|bias)"
)
# Tensors of llama files that deci has a place for, too; scales are loaded alike for all families (src/llama-model.cpp).
_LLAMA = re.compile(
    r"token_embd\.weight|output_norm\.weight|output\.(weight|scale|input_scale)"
    r"|rope_(freqs|factors_long|factors_short)\.weight"
    r"|blk\.\d+\.(attn_norm|ffn_norm)\.weight"
    r"|blk\.\d+\.attn_(q|k|v|qkv|output)\.(weight|bias|scale|input_scale)"
    r"|blk\.\d+\.ffn_(gate|up|down)\.(weight|bias)"
)


@dataclass(frozen=True)
class Home:
    """How a steered file is called, and how its rows are ordered, as against its base.

    Attributes:
        base: ``general.architecture`` of the base.
        steered: that of the steered file.
        head: size of the heads whose q and k rows are reordered; 0 where nothing is.
    """

    base: str
    steered: str
    head: int = 0

    def steered_key(self, key: str) -> str:
        """A metadata key of the base, as the steered file has it."""
        return _renamed(key, self.base, self.steered)

    def base_key(self, key: str) -> str:
        """A metadata key of the steered file, as the base has it."""
        return _renamed(key, self.steered, self.base)

    def steered_order(self, name: str) -> Indices | None:
        """Row ``i`` of each head of the steered tensor is row ``order[i]`` of the base's; None where nothing moves."""
        if not self.head or not _REORDERED.fullmatch(name):
            return None
        return np.arange(self.head, dtype=np.int64).reshape(2, -1).T.ravel()

    def base_order(self, name: str) -> Indices | None:
        """The inverse of :meth:`steered_order`."""
        order = self.steered_order(name)
        return None if order is None else np.argsort(order)


def home_of(base: GGUFFile, layout: Layout = "uniform") -> Home:
    """Where a steered file of ``base`` lives.

    Raises:
        ArchitectureError: a family that is not in the table, or that cannot be ragged.
        GGUFError: it must be re-homed, and its heads are not what it says.
        ModelError: it must be re-homed, and holds something that its new home has no place for.
    """
    family = gguf_family(base.architecture, str(base.path))
    steered = family.name if family.bake in (None, "itself") else "llama"
    if layout == "ragged":
        check_ragged(family, str(base.path))
        steered = RAGGED
    home = rehomed(base, family.name, steered)
    if home.steered == home.base:
        return home
    other = "take --layout uniform" if family.bake == "itself" else "take --format peft"
    where = f"{base.path}: a steered {home.base} file is written as {home.steered}, "
    known = _SHARED if home.head else _LLAMA
    for tensor in base.tensors:
        if not known.fullmatch(tensor.name):
            raise ModelError(f"{where}which has no place for the tensor {tensor.name}; {other}")
    for entry in base.keys:
        if entry.key.startswith(f"{home.steered}."):
            raise ModelError(f"{where}but it has a key {entry.key} already; convert the model again")
    rotated = base.number(f"{home.base}.rope.dimension_count")
    if home.head and rotated not in (None, home.head):
        raise ModelError(f"{where}but it rotates {rotated} of {home.head} dimensions of a head; take --format peft")
    if home.steered == RAGGED:
        _check_head_counts(base)
    return home


def rehomed(header: GGUFFile, base: str, steered: str) -> Home:
    """The home of a file of the architecture ``base`` that becomes, or was made, one of ``steered``.

    Raises:
        GGUFError: see :func:`check_heads`; rows of all families but llama are reordered.
    """
    if steered == base or base == "llama":
        return Home(base, steered)
    home = Home(base, steered, head_size(header))
    check_heads(header, home)
    return home


def _check_head_counts(base: GGUFFile) -> None:
    """Raise unless all layers have as many heads, and at least one: to deci, others are layers of another kind.

    Raises:
        GGUFError: see above.
    """
    layers = layer_count(base)
    for name in ("attention.head_count", "attention.head_count_kv"):
        key = f"{base.architecture}.{name}"
        entry = base.by_key.get(key)
        if entry is None and name.endswith("_kv"):  # then as many as there are heads
            continue
        if entry is not None and entry.array in ((UINT32, layers), (INT32, layers)):
            counts = set(entry.value)
            if len(counts) == 1 and min(counts) > 0:
                continue
        base.require_int(key)


def check_heads(header: GGUFFile, home: Home) -> None:
    """Raise unless rows can be reordered in groups of a head.

    Raises:
        GGUFError: heads of an odd size, or a tensor that is not made of them.
    """
    if home.head % 2 or home.head < 2:
        raise GGUFError(f"{header.path}: its heads have {home.head} dimensions, which cannot be; the file is damaged")
    hidden = header.require_int(f"{header.architecture}.embedding_length")
    for tensor in header.tensors:
        found = _REORDERED.fullmatch(tensor.name)
        if found is None:
            continue
        shape = (hidden, tensor.shape[-1]) if found[1] == "weight" else tensor.shape[-1:]
        whole = tensor.nbytes % tensor.shape[-1] == 0  # else there are blocks across the elements of a vector
        if tensor.shape != shape or tensor.shape[-1] % home.head or not whole:
            raise GGUFError(
                f"{header.path}: {tensor.name}, {tensor.shape}, is not made of heads of {home.head} dimensions; "
                "the file is damaged"
            )


def head_size(header: GGUFFile) -> int:
    """Dimensions of an attention head: given, or a head's share of the residual stream, as llama.cpp has it.

    Raises:
        GGUFError: the keys are missing.
    """
    prefix = header.architecture
    if f"{prefix}.attention.key_length" in header.by_key:
        return header.require_int(f"{prefix}.attention.key_length")
    return header.require_int(f"{prefix}.embedding_length") // header.require_int(f"{prefix}.attention.head_count")


def _renamed(key: str, old: str, new: str) -> str:
    return f"{new}.{key.removeprefix(old + '.')}" if key.startswith(f"{old}.") else key
