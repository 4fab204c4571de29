"""What comes next after each of many prompts that begin alike: the beginning is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from npti_export.runtimes.base import shared_length
from npti_export.runtimes.llamacpp.context import Context, Row

_AT_ONCE = 16  # prompts: attention looks at the cells of all of them


def last_logits(
    make_context: Callable[[int, int], Context], limit: int, prompts: Sequence[Sequence[int]]
) -> npt.NDArray[np.float32]:
    """Next-token logits ``[prompts, vocabulary]`` after the last token of each prompt.

    Args:
        make_context: gives a context of so many cells and sequences.
        limit: cells that there may be, 0 for any number.
        prompts: token ids, none empty.

    Raises:
        ModelError: llama.cpp fails, or the limit is too small for a single prompt.
    """
    given = [tuple(prompt) for prompt in prompts]
    # The last token of each is always computed, since its logits are wanted.
    shared = min(shared_length(given), min(map(len, given)) - 1)
    tail = max(map(len, given)) - shared
    fitting = max(1, (limit - shared) // tail) if limit else _AT_ONCE
    count = min(_AT_ONCE, fitting, len(given))
    context = make_context(shared + count * tail, count)
    context.clear()
    if shared:
        context.decode([Row(token, at, 0, False) for at, token in enumerate(given[0][:shared])])
        for other in range(1, count):
            context.share(0, other)
    found = []
    for start in range(0, len(given), count):
        piece = given[start : start + count]
        rows = [
            Row(token, at, number, at == len(prompt) - 1)
            for number, prompt in enumerate(piece)
            for at, token in enumerate(prompt[shared:], shared)
        ]
        found.append(context.decode(rows).copy())
        for number in range(len(piece)):
            context.forget(number, shared)
    return np.concatenate(found)
