"""What a base holds beside the MLPs that are widened: tensors of no layer, and bytes of no tensor."""

from __future__ import annotations

from npti_export.architectures import FFN_DOWN, FFN_GATE, FFN_UP
from npti_export.errors import GGUFError
from npti_export.export.widen import CHUNK
from npti_export.gguf.reader import GGUFFile, align

MOST_GAPS = 16 << 20  # bytes of a base that belong to no tensor, beyond what alignment takes


def check_rest(base: GGUFFile) -> None:
    """Raise if an MLP belongs to no layer, or if more lies between the tensors than a steered file carries.

    Raises:
        GGUFError: see above.
    """
    layers = base.require_int(f"{base.architecture}.block_count")
    mlps = {f"{stem.format(layer)}.weight" for stem in (FFN_GATE, FFN_UP, FFN_DOWN) for layer in range(layers)}
    used = base.data_start
    for tensor in base.tensors:
        used += align(tensor.nbytes, base.alignment)
        if is_mlp(tensor.name) and tensor.name not in mlps:
            raise GGUFError(f"{base.path}: {tensor.name} belongs to none of the {layers} layers; the file is damaged")
    if base.size > used + MOST_GAPS:
        raise GGUFError(
            f"{base.path}: {(base.size - used) >> 20} MB of it belong to no tensor; it is damaged, download it again"
        )


def is_mlp(name: str) -> bool:
    """Whether a tensor is one that baking widens or adds."""
    return name.endswith(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight", "ffn_gate.bias"))


def gaps_of(base: GGUFFile) -> bytes:
    """What lies between the tensors and after the last, all of it in a row; nothing where it is all zeros.

    Raises:
        GGUFError: more than the metadata of a file can carry.
    """
    kept, length, blank = bytearray(), 0, True
    position = base.data_start
    ends = [(one.offset, one.offset + one.nbytes) for one in sorted(base.tensors, key=lambda one: one.offset)]
    with base.path.open("rb") as stream:
        for start, end in [*ends, (base.size, base.size)]:
            stream.seek(position)
            while position < start and (chunk := stream.read(min(CHUNK, start - position))):
                length, position = length + len(chunk), position + len(chunk)
                if blank and chunk.count(0) != len(chunk):
                    kept, blank = bytearray(length - len(chunk)), False
                if not blank:
                    kept += chunk
                if len(kept) > MOST_GAPS:
                    raise GGUFError(f"{base.path}: more than {MOST_GAPS >> 20} MB lie between tensors; it is damaged")
            position = end
    return bytes(kept)
