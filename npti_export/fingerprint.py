"""A model's identity: a digest of its norm weights.

Every quantisation keeps norms exactly, so a float checkpoint and the GGUF files made from it share one fingerprint.
So does a fine-tune that froze its norms (a merged LoRA): verification notices when the two differ in what they say.
Models that add 1 to a norm weight before they multiply have the sum in their GGUF files: a weight counts as what is
left of it after adding 1 and subtracting it again in float32, which is the same for both.
A model loaded in 16 bits has rounded norms: their digests are kept beside the exact one, so that it is known, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256, as 64 hexadecimal digits, of the norm weights as float32.

    Attributes:
        float32: of the weights as they are.
        bfloat16: of the weights rounded to bfloat16.
        float16: of the weights rounded to float16.
    """

    float32: str
    bfloat16: str
    float16: str

    def of_dtype(self, dtype: str) -> str:
        """The digest of the model loaded in a dtype; other dtypes than the three have none."""
        return {"float32": self.float32, "bfloat16": self.bfloat16, "float16": self.float16}.get(dtype, "")


def fingerprint(norms: Iterable[npt.NDArray[np.float32]], offset: float = 0.0) -> Fingerprint:
    """The identity of a model with these norm weights, in the order of its layers, the last norm at the end.

    Args:
        norms: one vector a norm, without the offset.
        offset: what the model adds to each weight, ``norm_offset`` of its architecture.
    """
    digests = [hashlib.sha256() for _ in range(3)]
    for weights in norms:
        exact = np.ascontiguousarray(weights, np.float32)
        if offset:
            exact = (exact + np.float32(offset)) - np.float32(offset)
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16).astype(np.float32)
        for digest, values in zip(digests, (exact, _bfloat16(exact), half), strict=True):
            digest.update(values.tobytes())
    return Fingerprint(*(digest.hexdigest() for digest in digests))


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounded to the nearest bfloat16, ties to even, as float32."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)
