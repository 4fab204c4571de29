"""The last filter: would the two poles answer differently? A model says so, several questions at once."""

from __future__ import annotations

from npti_export.bench.definition import TraitDefinition
from npti_export.bench.making.parse import read_verdicts
from npti_export.bench.making.prompts import JUDGE_SCHEMA, judge_messages
from npti_export.generators.base import Answer, Generator, Request, UnusableAnswerError

_TOKENS_EACH, _TOKENS_MORE = 24, 64  # an entry of the JSON, spaced generously; what stands around them


class Judge:
    """Asks a model about an order's questions.

    Args:
        generator: the model.
        definition: of the trait.
        max_tokens: longest answer; 0 takes what the JSON needs, which is too little for a model that reasons first.
        schema: whether the endpoint is to hold the answer to a JSON schema.
    """

    def __init__(
        self, generator: Generator, definition: TraitDefinition, *, max_tokens: int = 0, schema: bool = True
    ) -> None:
        self.generator = generator
        self._definition, self._max_tokens, self._schema = definition, max_tokens, schema

    async def verdicts(self, facet: str, texts: list[str], seed: int) -> tuple[list[bool | None], Answer]:
        """Whether the poles would differ at each text; None where no verdict came, or contradictory ones.

        Returns:
            The verdicts, and what the answer cost.

        Raises:
            UnavailableError: none came, though waited for.
            BenchError: it will not come however often it is asked.
        """
        request = Request(
            judge_messages(self._definition, facet, texts),
            seed,
            self._max_tokens or _TOKENS_MORE + _TOKENS_EACH * len(texts),
            0.0,
            JUDGE_SCHEMA if self._schema else None,
        )
        try:
            answer = await self.generator.answer(request)
        except UnusableAnswerError:
            return [None] * len(texts), Answer("")
        return read_verdicts(answer.text, len(texts)), answer
