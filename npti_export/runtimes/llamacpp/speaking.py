"""One conversation in llama.cpp: answers that come token by token, and a cache that goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from npti_export.errors import ModelError
from npti_export.runtimes.llamacpp.context import Context, Row
from npti_export.runtimes.llamacpp.decoding import Choose
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

_USUAL_ROOM = 4096  # tokens of a conversation, where the model was trained on as many
_INCOMPLETE = "\ufffd"  # what half a character is decoded to


class Speaker:
    """Answers prompts that mostly begin like the one before.

    Args:
        runtime: of one sequence; used for nothing else meanwhile.
    """

    def __init__(self, runtime: LlamaCppRuntime) -> None:
        self._runtime, self._held = runtime, list[int]()
        self.room = runtime.settings.context or min(_USUAL_ROOM, runtime.model.trained_context)

    def speak(self, prompt: Sequence[int], *, max_new_tokens: int, choose: Choose) -> Iterator[str]:
        """The answer in pieces of text, as it comes; to be closed before the next one begins.

        Args:
            prompt: token ids; with the answer they fit in ``room``.
            max_new_tokens: longest answer.
            choose: picks each token, given its logits.

        Raises:
            ModelError: llama.cpp fails, or its logits are not numbers.
        """
        context = self._runtime.context(self.room, 1)
        answer: list[int] = []
        shown = ""
        fresh = list(prompt)
        while len(answer) < max_new_tokens:
            token = self._next(context, fresh, choose)
            if self._runtime.chat.is_end(token):
                break
            answer.append(token)
            fresh = [*prompt, *answer]
            # Decoded as a whole: a character may be spread over several tokens.
            whole = self._runtime.decode(answer)
            if not whole.endswith(_INCOMPLETE):
                yield whole[len(shown) :]
                shown = whole
        rest = self._runtime.decode(answer)[len(shown) :]
        if rest:
            yield rest

    def _next(self, context: Context, tokens: list[int], choose: Choose) -> int:
        """The token behind ``tokens``, of which those are computed that the cache does not hold."""
        same = next((at for at, pair in enumerate(zip(self._held, tokens, strict=False)) if pair[0] != pair[1]), None)
        kept = min(len(self._held) if same is None else same, len(tokens) - 1)
        self._held = []  # unless all goes well
        context.forget(0, kept)
        rows = [Row(token, kept + at, 0, kept + at == len(tokens) - 1) for at, token in enumerate(tokens[kept:])]
        logits = context.decode(rows)[0]
        if not np.isfinite(logits.max()):
            raise ModelError(f"{self._runtime.model.path}: computes logits that are not numbers; get the file again")
        self._held = tokens
        return choose(logits)
