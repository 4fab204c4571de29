"""Drawing the next token by chance, for text that is to vary; identification and evaluation are greedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

MIN_P = 0.05  # llama.cpp's default: tokens below this share of the likeliest one's probability are never drawn


class Sampler:
    """Draws the tokens of one answer.

    The chain is the end of llama.cpp's default one: min-p, then temperature.

    Args:
        temperature: 0 takes the likeliest token.
        seed: of this answer; the same logits give the same tokens.
        check: called before each token; what it raises ends the decoding.
    """

    def __init__(self, temperature: float, seed: int, check: Callable[[], None] = lambda: None) -> None:
        self._temperature, self._check = temperature, check
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, given ``[vocabulary]`` finite logits."""
        self._check()
        if self._temperature == 0:
            return int(logits.argmax())
        (kept,) = np.nonzero(logits >= logits.max() + np.float32(np.log(MIN_P)))
        scaled = logits[kept].astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled.max())
        return int(self._random.choice(kept, p=weights / weights.sum()))
