"""Judges at work: an endpoint that writes its verdict, a local model whose probabilities are read."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from npti_export.errors import BenchError, EvaluationError
from npti_export.evaluate.judge.prompts import BEGINNINGS, RATINGS, SCHEMA, read_rating
from npti_export.evaluate.judge.spec import JudgeSpec
from npti_export.evaluate.judge.verdicts import Asked, Verdict, unreadable
from npti_export.evaluate.options import Options, choose, find_options
from npti_export.files import sampled_sha256
from npti_export.generators.address import public_address
from npti_export.generators.base import RefusedError, Request, UnavailableError, UnusableAnswerError
from npti_export.generators.endpoint import Endpoint, EndpointSettings

if TYPE_CHECKING:
    from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

Done = Callable[[int, Verdict | None], None]
"""Told the place of a request and its verdict; None where none came, which may be asked for again."""
_MOST_UNUSABLE = 25  # in a row, with not one readable verdict so far: something is wrong that more requests do not mend
_MOST_SILENT = 8  # requests in a row that got no answer for as long as the user is willing to wait
_BATCH = 32  # prompts of a local judge between two entries in the journal


class Rater(Protocol):
    """A judge that can be asked."""

    name: str
    """What a report calls it."""
    identity: str
    """What its verdicts are kept under."""

    def check(self, asked: Asked) -> None:
        """Ask once, without patience: whether anything is there that answers.

        Raises:
            EvaluationError: nothing, or it refuses.
            ModelError: the model cannot be run.
        """

    def rate(self, requests: Sequence[Asked], done: Done) -> None:
        """Ask for ratings in the given order; each is handed over as soon as it is there.

        Raises:
            EvaluationError: it cannot judge.
            BenchError: the endpoint refuses, or does not answer.
        """


class EndpointRater:
    """Implements :class:`Rater` with an OpenAI-compatible endpoint.

    Args:
        spec: with a URL.
        note: told, in a sentence, what the user should know.

    Raises:
        BenchError: the address is none, or the packages of the extra ``bench`` are missing.
    """

    def __init__(self, spec: JudgeSpec, note: Callable[[str], None]) -> None:
        assert spec.url is not None
        self._spec, self._note = spec, note
        self.name = spec.model
        self.identity = f"{public_address(spec.url)} {spec.model}"
        self._settings = EndpointSettings(
            url=spec.url,
            model=spec.model,
            key_variable=spec.key_variable,
            concurrency=spec.concurrency,
            timeout=spec.timeout,
            patience=spec.patience,
            omit=spec.omit,
            extra=spec.extra,
            option="--judge",
            flags=None,  # evaluate has none for these
        )
        self._endpoint = Endpoint(self._settings, note)
        self._schema, self._settled = True, False
        self._readable = False
        self._unusable = self._silent = 0

    def check(self, asked: Asked) -> None:
        """See :class:`Rater`."""
        hasty = EndpointRater(replace(self._spec, patience=0.0), lambda _text: None)
        try:
            asyncio.run(hasty._once(asked))
        except UnusableAnswerError:  # it answers, and the next answer may be better
            return
        except BenchError as error:
            raise EvaluationError(f"--judge {self.name}: {error}") from error

    async def _once(self, asked: Asked) -> None:
        try:
            await self._first_text(asked)
        finally:
            await self._endpoint.close()

    def rate(self, requests: Sequence[Asked], done: Done) -> None:
        """See :class:`Rater`."""
        asyncio.run(self._rate(requests, done))

    async def _rate(self, requests: Sequence[Asked], done: Done) -> None:
        first = min(1, len(requests))  # alone: it finds out about the schema
        waiting = iter(list(enumerate(requests))[first:])

        async def work() -> None:
            for place, asked in waiting:
                done(place, await self._verdict(asked))

        workers: list[asyncio.Task[None]] = []
        try:
            for place in range(first):
                done(place, await self._verdict(requests[place]))
            workers += [asyncio.create_task(work()) for _ in range(min(self._spec.concurrency, len(requests)))]
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._endpoint.close()

    async def _verdict(self, asked: Asked) -> Verdict | None:
        try:
            text = await self._text(asked)
        except UnusableAnswerError as error:
            verdict = Verdict(None, str(error))
        except UnavailableError as error:
            self._silent += 1
            if self._silent >= _MOST_SILENT:
                raise EvaluationError(
                    f"--judge {self.name}: {error}; what was judged is kept where there is a --judge-journal"
                ) from error
            return None
        else:
            rating = read_rating(text)
            verdict = unreadable(text) if rating is None else Verdict(rating)
        self._silent = 0
        self._readable |= verdict.rating is not None
        self._unusable = 0 if verdict.rating is not None else self._unusable + 1
        if self._unusable >= _MOST_UNUSABLE and not self._readable:
            raise EvaluationError(
                f"--judge {self.name}: {_MOST_UNUSABLE} verdicts in a row could not be read; of the last one: "
                f"{verdict.fault}; take a judge that follows instructions"
            )
        return verdict

    async def _text(self, asked: Asked) -> str:
        """The judge's words; held to the schema unless the endpoint does not take one."""
        if not self._settled:
            return await self._first_text(asked)
        return (await self._endpoint.answer(self._request(asked, self._schema))).text

    async def _first_text(self, asked: Asked) -> str:
        """The same while it is not known whether the endpoint takes a schema.

        Some that do not refuse it, others (llama-cpp-python's server) fail with 500, as if they were overloaded. So a
        failure with it is no reason to wait, but to ask without it, and then once more with it.
        """
        hasty = Endpoint(replace(self._settings, patience=0), lambda _text: None)
        refused = False
        try:
            try:
                text = (await hasty.answer(self._request(asked, True))).text
            except (RefusedError, UnavailableError) as error:
                if isinstance(error, RefusedError) and error.code not in (400, 422):
                    raise
                refused = isinstance(error, RefusedError)
                text = (await self._endpoint.answer(self._request(asked, False))).text
                if not refused:
                    text, refused = await self._once_more(hasty, asked, text)
        finally:
            await hasty.close()
        if refused and self._schema:
            self._schema = False
            self._note(f"{self.name} takes no JSON schema; its verdicts are read as they come")
        self._settled = True
        return text

    async def _once_more(self, hasty: Endpoint, asked: Asked, text: str) -> tuple[str, bool]:
        """The words with a schema, now that the endpoint answers, else those without; and whether it is the reason."""
        try:
            return (await hasty.answer(self._request(asked, True))).text, False
        except (RefusedError, UnavailableError):
            return text, True

    def _request(self, asked: Asked, schema: bool) -> Request:
        return Request(asked.messages, asked.seed, self._spec.max_tokens, 0.0, SCHEMA if schema else None)


class LocalRater:
    """Implements :class:`Rater` with a GGUF: the rating is the expected one under the probabilities of 1 to 5.

    The model answers nothing; what is read is what it would write after the beginning of an answer, so even a small
    model gives a verdict on everything.

    Args:
        spec: without a URL.

    Raises:
        ModelError: there is no such file.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        from npti_export.models import resolve_model

        path = Path(spec.model)
        self._path = path if path.is_file() else resolve_model(spec.model).path
        self._spec, self.name = spec, self._path.name
        self.identity = f"{self._path.name} {_sampled_digest(self._path)}"

    def check(self, asked: Asked) -> None:
        """See :class:`Rater`."""
        with self._opened() as (runtime, options):
            choose(runtime, [asked.messages], options)

    @contextmanager
    def _opened(self) -> Iterator[tuple[LlamaCppRuntime, Options]]:
        from npti_export.runtimes.llamacpp.context import Settings
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        settings = Settings(threads=self._spec.threads, gpu_layers=self._spec.gpu_layers)
        with LlamaCppRuntime(self._path, settings, listens=False) as runtime:
            labels = [str(rating) for rating in RATINGS]
            found = (find_options(runtime, labels, beginning) for beginning in BEGINNINGS)
            options = next((one for one in found if one is not None), None)
            if options is None:
                raise EvaluationError(
                    f"--judge {self.name}: 1 to 5 are not single tokens at the head of its answers; take another "
                    "model, or serve this one and give URL=MODEL"
                )
            yield runtime, options

    def rate(self, requests: Sequence[Asked], done: Done) -> None:
        """See :class:`Rater`. The file is loaded for as long as this runs."""
        with self._opened() as (runtime, options):
            for places in _batches(requests):
                choice = choose(runtime, [requests[place].messages for place in places], options)
                expected = choice.shares @ np.array(RATINGS, np.float64)
                for place, rating in zip(places, expected.tolist(), strict=True):
                    done(place, Verdict(min(5.0, max(1.0, rating))))  # a sum of shares may miss the ends by a rounding


def open_judges(specs: Sequence[JudgeSpec], note: Callable[[str], None]) -> list[Rater]:
    """Judges, checked as far as can be without asking them; where two share a name, it says where they are.

    Raises:
        EvaluationError: none, or one is given twice.
        BenchError: see :class:`EndpointRater`.
        ModelError: see :class:`LocalRater`.
    """
    if not specs:
        raise EvaluationError("no judge; give --judge URL=MODEL or --judge FILE.gguf")
    raters: list[EndpointRater | LocalRater] = [
        EndpointRater(spec, note) if spec.url is not None else LocalRater(spec) for spec in specs
    ]
    twice = [name for name, count in Counter(rater.identity for rater in raters).items() if count > 1]
    if twice:
        raise EvaluationError(f"--judge: {twice[0]} is given twice")
    names = Counter(rater.name for rater in raters)
    for rater in raters:
        if names[rater.name] > 1:
            rater.name = rater.identity
    return list(raters)


def _batches(requests: Sequence[Asked]) -> list[list[int]]:
    """Places of requests, in their order, as many as go into one call: of one kind, as these begin alike."""
    batches: list[list[int]] = []
    for what in dict.fromkeys(request.what for request in requests):
        places = [place for place, request in enumerate(requests) if request.what == what]
        batches += [places[start : start + _BATCH] for start in range(0, len(places), _BATCH)]
    return batches


def _sampled_digest(path: Path) -> str:
    try:
        return sampled_sha256(path)[:16]
    except OSError as error:
        raise EvaluationError(f"--judge {path}: cannot be read ({error.strerror})") from error
