"""A GGUF on this machine, in llama.cpp, without a server: many answers decoded together."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any

from npti_export.errors import ModelError
from npti_export.generators.base import Answer, Request, UnusableAnswerError
from npti_export.models import ModelSource
from npti_export.runtimes.llamacpp.context import Settings

_REPETITION_PENALTY = 1.1  # as where answers are counted: keeps small models from listing one thing over and over


class StoppedError(Exception):
    """Ends a batch whose answers nobody waits for any more; never leaves this module."""


class LocalModel:
    """Implements :class:`npti_export.generators.base.Generator`.

    Requests that wait while a batch is decoded make the next batch. The same request may come out differently in
    another batch, as sums of floating-point numbers depend on what is computed beside them.

    Args:
        source: the model.
        settings: of llama.cpp.
        batch: sequences decoded together.

    Raises:
        ModelError: llama.cpp does not run it.
    """

    def __init__(self, source: ModelSource, settings: Settings, batch: int) -> None:
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        if source.kind != "gguf":
            raise ModelError(
                f"{source.name}: is a transformers model; give a .gguf file, or serve it and give --endpoint"
            )
        self._runtime = LlamaCppRuntime(source.path, settings, sequences=batch, listens=False)
        self._source, self._batch = source, batch
        self.concurrency = 2 * batch  # one batch waits while another is decoded
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._stopped = threading.Event()
        self._decoding = threading.Lock()

    def about(self) -> dict[str, Any]:
        """See :class:`npti_export.generators.base.Generator`."""
        return {"file": self._source.path.name, "model": self._source.name, "batch": self._batch}

    async def close(self) -> None:
        """See :class:`npti_export.generators.base.Generator`."""
        self._stopped.set()
        if self._worker is not None:
            await asyncio.gather(self._worker, return_exceptions=True)
        # Tasks end at once when they are cancelled, their thread at its next token: nothing is freed under it.
        with self._decoding:
            self._runtime.close()

    async def answer(self, request: Request) -> Answer:
        """See :class:`npti_export.generators.base.Generator`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # others that are asked for at the same moment join the batch
        while self._waiting and not self._stopped.is_set():
            taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            taken = [one for one in taken if not one[1].cancelled()]
            requests = [request for request, _ in taken]
            # Shielded, since a thread cannot be cancelled: it sees at its next token that it is to stop.
            thread = asyncio.ensure_future(asyncio.to_thread(self._decode, requests))
            try:
                answers = await asyncio.shield(thread)
            except asyncio.CancelledError:
                self._stopped.set()
                await asyncio.gather(thread, return_exceptions=True)
                raise
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(taken, answers, strict=True):
                if not future.done():
                    _settle(future, answer)

    def _decode(self, requests: list[Request]) -> list[Answer]:
        with self._decoding:
            self._check()
            return self._decoded(requests)

    def _decoded(self, requests: list[Request]) -> list[Answer]:
        from npti_export.runtimes.llamacpp.sampling import Sampler

        runtime = self._runtime
        prompts = [runtime.encode(request.messages) for request in requests]
        samplers = [Sampler(request.temperature, request.seed, self._check) for request in requests]
        longest = max(request.max_tokens for request in requests)
        exchanges = runtime.generate(
            prompts, max_new_tokens=longest, repetition_penalty=_REPETITION_PENALTY, samplers=samplers
        )
        return [
            Answer(
                runtime.decode(exchange.response),
                not runtime.chat.is_end(exchange.response[-1]),
                len(exchange.prompt),
                len(exchange.response),
            )
            for exchange in exchanges
        ]

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StoppedError


def _settle(future: asyncio.Future[Answer], answer: Answer) -> None:
    if answer.text.strip():
        future.set_result(answer)
    else:
        future.set_exception(UnusableAnswerError("the model answers nothing"))
