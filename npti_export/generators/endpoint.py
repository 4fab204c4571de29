"""Any endpoint that speaks OpenAI's chat completions: llama-server, vLLM, Ollama, LM Studio, or a paid one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from npti_export.errors import BenchError, shortened
from npti_export.generators.address import is_address, public_address
from npti_export.generators.base import Answer, RefusedError, Request, UnavailableError, UnusableAnswerError

LONGEST_ANSWER = 1 << 20  # bytes of a response's body: a hundred times what is asked for
_TRIES = 3  # for an answer that can be read
_LIBRARY_RETRIES = 2  # openai's own: it waits as Retry-After says, up to two minutes
_LONGEST_PAUSE = 60.0  # seconds between later tries
_NAMES_SHOWN = 200


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is spoken to.

    Attributes:
        url: where its API begins, such as ``http://127.0.0.1:8080/v1``.
        model: as the endpoint calls it.
        key_variable: environment variable that holds the key; a local server needs none.
        concurrency: requests at once.
        timeout: seconds that one request may take.
        patience: seconds to go on asking where no answer comes at all.
        omit: fields of a request that the endpoint does not take: seed, temperature, max_tokens, response_format.
        extra: further fields of each request.
        option: of the command line that gave the address, for messages.
        flags: what those for ``omit`` and ``extra`` begin with, for messages; None where there are none.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 300.0
    patience: float = 600.0
    omit: frozenset[str] = frozenset()
    extra: dict[str, Any] = field(default_factory=dict)
    option: str = "--endpoint"
    flags: str | None = "--"


class Endpoint:
    """Implements :class:`npti_export.generators.base.Generator`.

    Args:
        settings: how it is spoken to.
        note: told, in a sentence, when the endpoint has to be waited for.

    Raises:
        BenchError: the URL is none, or the packages of the extra ``bench`` are missing.
    """

    def __init__(self, settings: EndpointSettings, note: Callable[[str], None] = lambda _text: None) -> None:
        try:
            import openai
            import tenacity
        except ModuleNotFoundError as error:
            raise BenchError(f"{settings.option} needs {error.name}: pip install 'npti-export[bench]'") from error
        if not is_address(settings.url):
            raise BenchError(
                f"{settings.option} {public_address(settings.url)}: give its address without a key, such as "
                "http://127.0.0.1:8080/v1"
            )
        parts = urlsplit(settings.url)
        self.settings, self.concurrency, self._note = settings, settings.concurrency, note
        self._openai, self._tenacity = openai, tenacity
        self._key = os.environ.get(settings.key_variable, "")
        if not self._key.isascii() or not self._key.isprintable():
            raise BenchError(f"{settings.key_variable}: holds characters that no key has; set it again")
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            note(f"the key in {settings.key_variable} goes to {parts.hostname} unencrypted, as the address is http")
        self._client: Any = None

    def about(self) -> dict[str, Any]:
        """See :class:`npti_export.generators.base.Generator`."""
        return {
            "endpoint": public_address(self.settings.url),
            "model": self.settings.model,
            "concurrency": self.concurrency,
        }

    async def close(self) -> None:
        """See :class:`npti_export.generators.base.Generator`."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def answer(self, request: Request) -> Answer:
        """See :class:`npti_export.generators.base.Generator`."""
        tenacity = self._tenacity
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(UnusableAnswerError),
            stop=tenacity.stop_after_attempt(_TRIES),
            reraise=True,
        )
        answer: Answer = await retrying(self._patiently, request)
        return answer

    async def _patiently(self, request: Request) -> Answer:
        tenacity, patience = self._tenacity, self.settings.patience
        backoff = tenacity.wait_random_exponential(multiplier=1, max=_LONGEST_PAUSE)

        def pause(state: Any) -> float:
            return max(float(backoff(state)), _retry_after(state.outcome.exception()))

        def waits(state: Any) -> None:
            self._note(f"{state.outcome.exception()}; asked again in {state.next_action.sleep:.0f} s")

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            wait=pause,
            stop=tenacity.stop_before_delay(patience),
            before_sleep=waits,
            reraise=True,
        )
        answer: Answer = await retrying(self._once, request)
        return answer

    async def _once(self, request: Request) -> Answer:
        openai = self._openai
        if self._client is None:
            self._client = self._connect()
        # The library bounds each wait for bytes, the response hook each body; this bounds what neither foresees.
        limit = (_LIBRARY_RETRIES + 1) * (2 * self.settings.timeout + 120)
        call: Awaitable[Any] = self._client.chat.completions.create(**self._fields(request))
        try:
            return _read(await asyncio.wait_for(call, limit))
        except openai.APIStatusError as error:
            raise self._status(error) from error
        except (openai.APITimeoutError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"{self._where}: no answer within {self.settings.timeout:g} s") from error
        except openai.APIResponseValidationError as error:
            raise UnusableAnswerError(f"{self._where}: answers something that is no chat completion") from error
        except openai.APIConnectionError as error:
            cause = self._scrubbed(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise UnavailableError(f"{self._where}: cannot be reached ({cause})") from error
        except openai.OpenAIError as error:
            raise BenchError(f"{self._where}: {self._scrubbed(str(error))}") from error
        except (ValueError, RecursionError) as error:  # a body that says JSON and is none
            raise UnusableAnswerError(f"{self._where}: answers with broken JSON") from error

    def _connect(self) -> Any:
        bounded = _bounding(self.settings.timeout)
        limits = self._openai.DefaultAsyncHttpxClient(
            event_hooks={"response": [bounded]}, headers={"Accept-Encoding": "identity"}
        )
        return self._openai.AsyncOpenAI(
            base_url=self.settings.url,
            api_key=self._key or "none",
            max_retries=_LIBRARY_RETRIES,
            timeout=self.settings.timeout,
            http_client=limits,
        )

    def _fields(self, request: Request) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "seed": request.seed,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        if request.schema is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": request.schema},
            }
        sent = {name: value for name, value in fields.items() if name not in self.settings.omit}
        return {
            "model": self.settings.model,
            "messages": list(request.messages),
            **sent,
            "extra_body": self.settings.extra or None,
        }

    def _status(self, error: Any) -> BenchError:
        words = self._scrubbed(str(error))
        code = error.status_code
        spent = getattr(error, "code", None) == "insufficient_quota"
        if (code in (408, 409, 429) or code >= 500) and not spent:
            return UnavailableError(f"{self._where}: answers {code} ({words})")
        flags = self.settings.flags
        fields = "seed, temperature, max_tokens or response_format"
        other = f"; if it does not know {fields}, which it is sent, take another endpoint"
        leave_out = f"; if it does not know a field, leave that out by {flags}omit {fields}"
        hint = {
            400: other if flags is None else f"{leave_out}, or add what it wants by {flags}extra",
            401: f"; set its key in the environment variable {self.settings.key_variable}",
            403: f"; the key in {self.settings.key_variable} may not do this",
            404: "; check the address, which mostly ends in /v1, and the model's name",
            422: other if flags is None else f"; leave out what it does not take by {flags}omit",
        }.get(code, "")
        return RefusedError(f"{self._where}: answers {code} ({words}){hint}", code)

    @property
    def _where(self) -> str:
        return public_address(self.settings.url)

    def _scrubbed(self, text: str) -> str:
        """Words of an endpoint, short, in one line, without the key, which some repeat."""
        if self._key:
            text = text.replace(self._key, "***")
        return shortened(" ".join("".join(char if char.isprintable() else " " for char in text).split()), _NAMES_SHOWN)


def _retry_after(error: BaseException | None) -> float:
    """Seconds that a refusal says to wait; longer ones than the library waits for come through to here."""
    response = getattr(error.__cause__ if error else None, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else 0.0
    except (KeyError, ValueError):
        return 0.0
    return seconds if seconds > 0 else 0.0


def _bounding(timeout: float) -> Callable[[Any], Awaitable[None]]:
    """A hook of the HTTP client that bounds the size of each body, and the time that it takes to come."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream, self._begun = stream, time.monotonic()

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._stream:
                size += len(chunk)
                if size > LONGEST_ANSWER:
                    raise UnusableAnswerError(f"an answer is longer than {LONGEST_ANSWER >> 20} MiB")
                if time.monotonic() - self._begun > timeout:
                    raise httpx2.ReadTimeout("the body takes too long")
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def bound(response: Any) -> None:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":  # was not asked for, and a small body may unpack to any size
            raise UnusableAnswerError(f"the endpoint packs its answers ({shortened(encoding)}), though asked not to")
        response.stream = Bounded(response.stream)

    return bound


def _read(completion: Any) -> Answer:
    """The first choice of a completion. Types are checked, since the library takes what comes."""
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    content = getattr(message, "content", None)
    if not isinstance(content, str):
        if message is not None and content is None:  # a refusal, or an answer all spent on reasoning
            content = ""
        else:
            raise UnusableAnswerError("the endpoint answers without a text")
    assert isinstance(choices, list)
    usage = getattr(completion, "usage", None)
    counts = (getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens"))
    tokens_in, tokens_out = (count if type(count) is int and 0 <= count < 1 << 40 else 0 for count in counts)
    return Answer(content, getattr(choices[0], "finish_reason", None) == "length", tokens_in, tokens_out)
