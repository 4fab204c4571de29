"""Decoding of many prompts, greedy unless told otherwise: continuous batching, and shared beginnings computed once."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.runtimes.base import Exchange
from npti_export.runtimes.llamacpp.context import Context, Row

_KEPT_BYTES = 1 << 30  # of shared beginnings

Choose = Callable[[npt.NDArray[np.float32]], int]
"""Picks the next token of one answer, given its logits."""
Watch = Callable[[Sequence[int]], None]
"""Told before each decoding step which prompt (by its index) each row belongs to; an empty list is a prompt pass."""


@dataclass
class Savings:
    """What shared beginnings saved.

    Attributes:
        prompt_tokens: of all prompts.
        computed: those that were really processed.
    """

    prompt_tokens: int = 0
    computed: int = 0


@dataclass
class _Answer:
    """One prompt on its way."""

    index: int
    prompt: tuple[int, ...]
    shared: int
    slot: int = -1
    response: list[int] = field(default_factory=list)

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """The tokens that the penalty is for; one that is there twice is penalised once."""
        return np.array([*self.prompt, *self.response])


class Beginnings:
    """What the KV cache holds after the beginnings that prompts share (an instruction, a persona).

    Each is computed by itself in an empty cache, so an answer does not depend on what was asked before it: a run that
    was interrupted and goes on computes the same as one that was not.
    """

    def __init__(self) -> None:
        self.savings = Savings()
        self._kept: OrderedDict[tuple[int, ...], bytes] = OrderedDict()

    def prepare(self, context: Context, beginnings: Iterable[tuple[int, ...]]) -> None:
        """Compute those that are not kept yet; leaves the context empty."""
        context.clear()
        for tokens in dict.fromkeys(beginnings):
            if tokens and tokens not in self._kept:
                context.decode([Row(token, at, 0, False) for at, token in enumerate(tokens)])
                self.savings.computed += len(tokens)
                self._kept[tokens] = context.save(0)
                context.clear()

    def load(self, context: Context, tokens: tuple[int, ...], slot: int) -> None:
        """Let an empty sequence begin with prepared tokens."""
        context.load(self._kept[tokens], slot)
        self._kept.move_to_end(tokens)

    def trim(self) -> None:
        """Forget those not used for longest, beyond a gigabyte."""
        while sum(map(len, self._kept.values())) > _KEPT_BYTES:
            self._kept.popitem(last=False)


class Decoder:
    """Answers prompts in a context, several at once.

    A prompt takes the place of an answer that is finished, so the batch stays full.

    Args:
        context: to be emptied.
        sequences: how many prompts at once; the cache has room for the longest ones.
        is_end: whether a token ends an answer.
        beginnings: kept from one call to the next.
        penalty: divides positive logits of tokens that prompt or answer hold already, multiplies negative ones.
        max_new_tokens: longest answer.
        watch: told of each pass.
        samplers: what picks each prompt's tokens; None takes the likeliest ones.
    """

    def __init__(
        self,
        context: Context,
        is_end: Callable[[int], bool],
        beginnings: Beginnings,
        *,
        sequences: int,
        penalty: float,
        max_new_tokens: int,
        watch: Watch | None = None,
        samplers: Sequence[Choose] | None = None,
    ) -> None:
        self._samplers = samplers
        self._context, self._is_end, self._beginnings = context, is_end, beginnings
        self._penalty, self._limit, self._sequences = penalty, max_new_tokens, sequences
        self._watch = watch or (lambda _rows: None)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        shared: Sequence[int] | None = None,
        group: Callable[[int], int] = lambda _index: 0,
    ) -> list[Exchange]:
        """Answers in the order of the prompts.

        Args:
            prompts: token ids, none empty.
            shared: how many first tokens of each prompt others begin with, too.
            group: rows of a step are ordered by this number of their prompt.
        """
        self._watch(())
        # The last token is always computed, since its logits are wanted.
        lengths = shared or [0] * len(prompts)
        waiting = deque(
            _Answer(index, tuple(prompt), min(length, len(prompt) - 1))
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        self._beginnings.prepare(self._context, (answer.prompt[: answer.shared] for answer in waiting))
        free = list(range(self._sequences))
        active: list[_Answer] = []
        finished: list[_Answer] = []
        while waiting or active:
            if waiting and free:
                fresh = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                self._admit(fresh, free)
                active += fresh
            else:
                active.sort(key=lambda answer: (group(answer.index), answer.slot))
                self._step(active)
            for answer in [answer for answer in active if self._is_finished(answer)]:
                active.remove(answer)
                finished.append(answer)
                free.append(answer.slot)
                self._context.forget(answer.slot)
        self._beginnings.trim()
        finished.sort(key=lambda answer: answer.index)
        return [Exchange(answer.prompt, tuple(answer.response)) for answer in finished]

    def _is_finished(self, answer: _Answer) -> bool:
        return len(answer.response) == self._limit or self._is_end(answer.response[-1])

    def _admit(self, fresh: list[_Answer], free: list[int]) -> None:
        self._watch(())
        rows = []
        for answer in fresh:
            answer.slot = free.pop(0)
            if answer.shared:
                self._beginnings.load(self._context, answer.prompt[: answer.shared], answer.slot)
            last = len(answer.prompt) - 1
            rows += [Row(answer.prompt[at], at, answer.slot, at == last) for at in range(answer.shared, last + 1)]
            self._beginnings.savings.prompt_tokens += len(answer.prompt)
        self._beginnings.savings.computed += len(rows)
        for answer, row in zip(fresh, self._context.decode(rows), strict=True):
            self._choose(answer, row)

    def _step(self, active: list[_Answer]) -> None:
        self._watch([answer.index for answer in active])
        rows = [
            Row(answer.response[-1], len(answer.prompt) + len(answer.response) - 1, answer.slot, True)
            for answer in active
        ]
        for answer, row in zip(active, self._context.decode(rows), strict=True):
            self._choose(answer, row)

    def _choose(self, answer: _Answer, logits: npt.NDArray[np.float32]) -> None:
        if self._penalty != 1:
            seen = answer.seen
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * self._penalty, values / self._penalty)
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise ModelError(f"{self._context.model.path}: computes logits that are not numbers; get the file again")
        if self._samplers is not None:
            token = self._samplers[answer.index](logits)
        answer.response.append(token)
