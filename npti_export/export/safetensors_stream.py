"""Write a safetensors file tensor by tensor, so that memory is bounded by the largest of them.

Layout after the format's description (huggingface/safetensors, README): the header's length as uint64, a JSON header
padded with spaces, the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written; ``make`` is called when its turn comes.

    Attributes:
        name: as in the file.
        shape: of the tensor.
        dtype: as safetensors calls it, such as ``BF16``.
        make: gives the tensor, of this shape and dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def write_safetensors(tensors: Iterable[OutTensor], path: Path) -> None:
    """Write the tensors in their order.

    Raises:
        ValueError: a tensor is not what it was announced to be.
    """
    import torch

    planned = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in planned:
            data = tensor.make().detach().cpu().contiguous()
            if tuple(data.shape) != tensor.shape or data.nbytes != tensor.nbytes:
                raise ValueError(
                    f"{tensor.name}: is {tuple(data.shape)} {data.dtype}, not {tensor.shape} {tensor.dtype}"
                )
            stream.write(data.view(-1).view(torch.uint8).numpy().data)
