"""What a base holds beside the MLPs that are widened: tensors of no layer, and bytes of no tensor."""

from __future__ import annotations

from npti_export.errors import GGUFError
from npti_export.export.layout import mlp_tensor
from npti_export.export.widen import CHUNK
from npti_export.gguf.reader import GGUFFile, align, mlp_widths

MOST_GAPS = 16 << 20  # bytes of a base that belong to no tensor, beyond what alignment takes


def check_rest(base: GGUFFile) -> None:
    """Raise if an MLP belongs to no layer, or if more lies between the tensors than a steered file carries.

    Raises:
        GGUFError: see above.
    """
    widths = mlp_widths(base)
    for part in base.parts:
        used = part.data_start
        for tensor in part.tensors:
            used += align(tensor.nbytes, part.alignment)
            layer, kind = mlp_tensor(tensor.name) or (0, "")
            if kind and not (layer < len(widths) and widths[layer]):
                raise GGUFError(
                    f"{part.path}: {tensor.name} belongs to none of the {len(widths)} layers; the file is damaged"
                )
        if part.size > used + MOST_GAPS:
            raise GGUFError(
                f"{part.path}: {(part.size - used) >> 20} MB of it belong to no tensor; it is damaged, "
                "download it again"
            )


def gaps_of(base: GGUFFile) -> bytes:
    """What lies between the tensors of a file and after the last, in a row; nothing where it is all zeros.

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
