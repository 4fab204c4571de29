"""A GGUF in stock llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.runtimes.base import Message


class LlamaCppRuntime:
    """A model file run the way a user would run it: default KV cache type, default kernels.

    Args:
        path: the GGUF.
        context: longest sequence, in tokens.
        all_logits: keep the logits of every position, which :meth:`logits` needs.
        threads: 0 takes every core that this process may use.

    Raises:
        ModelError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, *, context: int, all_logits: bool = True, threads: int = 0) -> None:
        import llama_cpp

        cores = threads or usable_cores()
        try:
            self._llama: Any = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_batch=context,
                n_threads=cores,
                n_threads_batch=cores,
                logits_all=all_logits,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: llama.cpp cannot load it: {error}") from error

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """``[tokens, vocabulary]`` next-token logits at every position, from an empty cache."""
        self._llama.reset()
        self._llama.eval(list(tokens))
        result: npt.NDArray[np.float32] = self._llama.scores[: len(tokens)].copy()
        return result

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int, repetition_penalty: float) -> str:
        """A greedy answer through the chat template inside the file.

        Raises:
            ModelError: the prompt is longer than the context, or the template fails.
        """
        import jinja2

        self._llama.reset()
        try:
            completion = self._llama.create_chat_completion(
                list(messages), max_tokens=max_new_tokens, temperature=0.0, repeat_penalty=repetition_penalty
            )
        except (ValueError, RuntimeError, jinja2.TemplateError) as error:
            raise ModelError(f"llama.cpp cannot answer: {error}") from error
        return str(completion["choices"][0]["message"]["content"])


def opener(path: Path) -> Callable[[int], AbstractContextManager[Callable[[Sequence[int]], npt.NDArray[np.float32]]]]:
    """Opens the file for sequences up to a length, for as long as a block lasts, and gives its logits."""

    @contextmanager
    def opened(context: int) -> Iterator[Callable[[Sequence[int]], npt.NDArray[np.float32]]]:
        with LlamaCppRuntime(path, context=context) as runtime:
            yield runtime.logits

    return opened


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
