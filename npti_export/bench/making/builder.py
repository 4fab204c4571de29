"""The build itself: orders go out, answers come back, and what passes every filter is kept, until each cell is full."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from npti_export.bench.making.filters import Candidate, filters, first_fault
from npti_export.bench.making.folder import Folder
from npti_export.bench.making.journal import Journal, Record
from npti_export.bench.making.judge import Judge
from npti_export.bench.making.ngrams import grams
from npti_export.bench.making.parse import read_items
from npti_export.bench.making.plan import Cell, Order, Plan
from npti_export.bench.making.prompts import generator_messages
from npti_export.bench.making.report import Report, report, write_outputs
from npti_export.bench.making.store import Store
from npti_export.errors import BenchError, NptiError
from npti_export.generators.base import Generator, Request, UnusableAnswerError

_AHEAD = 8  # orders under way or finished for each one that the generator takes at once, while the first is awaited
_MOST_UNUSABLE = 25  # answers in a row that cannot be used: something is wrong that waiting does not mend
_TOKENS_A_WORD = 1.8  # generous: English takes 1.3 with its punctuation
_TOKENS_MORE = 120


@dataclass(frozen=True)
class Options:
    """How a build is done; none of it says what comes out, so each may be changed when it goes on.

    Attributes:
        rounds: how often a cell that still lacks items is asked for them.
        max_tokens: longest answer; 0 takes what the items need.
        keep_rejected: whether to write ``rejected.jsonl``.
        force: begin anew where a folder holds a build.
        price_in: of a million tokens of prompts, in any currency, or None.
        price_out: of a million tokens of answers.
    """

    rounds: int = 8
    max_tokens: int = 0
    keep_rejected: bool = False
    force: bool = False
    price_in: float | None = None
    price_out: float | None = None


@dataclass(frozen=True)
class Tally:
    """How far a build is, over all its runs."""

    kept: int
    wanted: int
    rejected: int
    tokens_in: int
    tokens_out: int


class Display(Protocol):
    """Is shown progress. Both return at once."""

    def update(self, tally: Tally) -> None:
        """How far it is."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


def answer_tokens(plan: Plan, ask: int) -> int:
    """Room for an answer of ``ask`` items as long as they may be."""
    return int(ask * plan.words[1] * _TOKENS_A_WORD) + _TOKENS_MORE


def build(
    plan: Plan, folder: Folder, generator: Generator, judge: Judge | None, options: Options, display: Display
) -> Report:
    """Build a bench, or go on with one. What is finished is in the folder even if this raises or is interrupted.

    Raises:
        BenchError: the folder belongs to another plan or process, or the endpoint does not answer.
        ModelError: the local model fails.
        OutputError: the folder cannot be written.
        DiskFullError: no room.
    """
    with folder.opened(plan, force=options.force):
        builder = _Builder(plan, folder, generator, judge, options, display)
        try:
            asyncio.run(builder.run())
        except BaseException:
            with suppress(NptiError):
                builder.recover()
                builder.finish()
            raise
        finally:
            builder.close()
        return builder.report


class _Builder:
    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        generator: Generator,
        judge: Judge | None,
        options: Options,
        display: Display,
    ) -> None:
        self._plan, self._folder, self._options, self._display = plan, folder, options, display
        self._generator, self._judge = generator, judge
        self._cells, self._rules = plan.cells(), filters(plan)
        self._wanted = sum(cell.wanted for cell in self._cells)
        self._journal = Journal(folder.journal)
        try:
            self._store = Store(folder.store)
            if self._journal.mended:
                display.note("the last answer had not been written whole; it is asked for again")
            # Answers that came before those in front of them; what an order cost is never paid twice.
            self._saved = {record.order: record for record in self._journal.records(self._store.done)}
        except BaseException:
            self._journal.close()  # which lets go of its lock
            raise
        self._unusable = 0
        self._begun = time.monotonic()
        self.report: Report = {}

    def close(self) -> None:
        self._store.close()
        self._journal.close()

    def recover(self) -> None:
        """Back to the last commit, as an order may be half taken in; and on from there with what the journal has."""
        self._store.close()
        self._store = Store(self._folder.store)
        saved = {record.order: record for record in self._journal.records(self._store.done)}
        for order in self._orders():
            if order.number not in saved:
                break
            self._take(order, saved[order.number])
        self._store.commit()

    def finish(self) -> None:
        """Write the outputs; needs everything committed."""
        about = {"generator": self._generator.about(), "judge": self._judge and self._judge.generator.about()}
        prices = (self._options.price_in, self._options.price_out)
        self.report = report(self._plan, self._cells, self._store, about, prices)
        write_outputs(
            self._plan, self._cells, self._store, self._folder, self.report, rejects=self._options.keep_rejected
        )

    async def run(self) -> None:
        try:
            if self._store.turn_begins < 0:
                self._store.begin_turn(0, self._missing())
            self._show()
            while True:
                await self._round()
                missing = self._missing()
                if not missing or self._store.turn + 1 >= self._options.rounds:
                    break
                self._store.begin_turn(self._store.turn + 1, missing)
        finally:
            await self._generator.close()
            if self._judge is not None and self._judge.generator is not self._generator:
                await self._judge.generator.close()
        self._store.totals["milliseconds"] += round(1000 * (time.monotonic() - self._begun))
        self._store.commit()
        self.finish()

    def _missing(self) -> list[tuple[int, int]]:
        taken = self._store.taken
        lacks = ((c.number, sum(size - taken[c.number, split] for split, size in c.quotas)) for c in self._cells)
        return [(number, count) for number, count in lacks if count]

    def _orders(self) -> Iterator[Order]:
        """What is left of this round."""
        owed, store = self._store.owed(), self._store
        lacking = [(cell, owed[cell.number]) for cell in self._cells if cell.number in owed]
        orders = self._plan.round_orders(store.turn, store.turn_begins, lacking)
        return islice(orders, store.done - store.turn_begins, None)

    async def _round(self) -> None:
        """Results are taken in the order of the orders, so the same answers always give the same bench."""
        orders, gate = self._orders(), asyncio.Semaphore(self._generator.concurrency)
        pending: deque[tuple[Order, asyncio.Task[Record]]] = deque()
        try:
            while True:
                for order in islice(orders, _AHEAD * self._generator.concurrency - len(pending)):
                    pending.append((order, asyncio.create_task(self._fulfil(order, gate))))
                if not pending:
                    return
                order, task = pending[0]
                record = await task
                pending.popleft()
                self._take(order, record)
                self._show()
                await asyncio.sleep(0)  # a finished task does not let the others go on
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)

    async def _fulfil(self, order: Order, gate: asyncio.Semaphore) -> Record:
        saved = self._saved.pop(order.number, None)
        if saved is not None:
            return saved
        async with gate:
            record = await self._ask(order)
            self._journal.append(record)
        if not record.fault:
            self._unusable = 0
        else:
            self._unusable += 1
            if self._unusable >= _MOST_UNUSABLE:
                raise BenchError(
                    f"{_MOST_UNUSABLE} answers in a row could not be used; of the last one: {record.fault}"
                )
        return record

    async def _ask(self, order: Order) -> Record:
        plan = self._plan
        longest = self._options.max_tokens or answer_tokens(plan, order.ask)
        request = Request(generator_messages(plan, order), order.seed, longest, plan.temperature)
        try:
            answer = await self._generator.answer(request)
        except UnusableAnswerError as error:
            return Record(order.number, "", fault=str(error))
        tokens_in, tokens_out, requests = answer.tokens_in, answer.tokens_out, 1
        text = answer.text.encode("utf-8", "replace").decode()  # JSON may hold halves of surrogate pairs, a file not
        fault = "" if text.strip() else "it is empty; a model that reasons first needs more --max-tokens"
        record = Record(order.number, text, answer.cut, fault, tokens_in, tokens_out)
        if fault or self._judge is None:
            return record
        candidates = self._candidates(order, record)
        verdicts: list[bool | None] = [None] * len(candidates)
        # What is a copy of something kept now will be one later, too, and needs no judge.
        doubtful = [
            at
            for at, one in enumerate(candidates)
            if first_fault(one, self._rules) is None and self._store.twin(grams(one.text)) is None
        ]
        if doubtful:
            found, judged = await self._judge.verdicts(
                order.cell.facet, [candidates[at].text for at in doubtful], order.seed
            )
            for at, verdict in zip(doubtful, found, strict=True):
                verdicts[at] = verdict
            tokens_in, tokens_out, requests = tokens_in + judged.tokens_in, tokens_out + judged.tokens_out, 2
        return Record(order.number, text, answer.cut, "", tokens_in, tokens_out, requests, verdicts)

    def _candidates(self, order: Order, record: Record) -> list[Candidate]:
        items = read_items(record.text, order.ask)
        last = len(items) - 1
        return [Candidate(text, order.cell.person, record.cut and at == last) for at, text in enumerate(items)]

    def _take(self, order: Order, record: Record) -> None:
        candidates = self._candidates(order, record)
        verdicts = record.verdicts or []
        if len(verdicts) != len(candidates):
            verdicts = [None] * len(candidates)
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            self._take_item(order, candidate, verdict)
        totals = self._store.totals
        totals["answers"] += 1
        totals["unusable"] += bool(record.fault)
        totals["items"] += len(candidates)
        for name in ("requests", "tokens_in", "tokens_out"):
            totals[name] += getattr(record, name)
        self._store.finish_order()

    def _take_item(self, order: Order, candidate: Candidate, verdict: bool | None) -> None:
        store, cell, keep = self._store, order.cell, self._options.keep_rejected
        split, fault = self._split(cell), first_fault(candidate, self._rules)
        if fault is None and split is None:
            fault = "surplus", "its cell is full"
        if fault is None:
            found = grams(candidate.text)
            twin = store.twin(found)
            if twin is not None:
                fault = "duplicate", f"like: {store.text(twin)}" if keep else "like another"
            elif self._judge is not None and not verdict:
                fault = "judge", "the judge gave no clear verdict" if verdict is None else "the poles would not differ"
            else:
                assert split is not None
                store.keep(cell.number, split, order.number, order.seed, candidate.text, found)
                return
        assert fault is not None
        store.reject(cell.number, order.number, order.seed, *fault, candidate.text, keep=keep)

    def _split(self, cell: Cell) -> str | None:
        """Which split a cell's next item goes to: drawn, in proportion to what each lacks."""
        taken = self._store.taken
        lacks = [(split, size - taken[cell.number, split]) for split, size in cell.quotas]
        total = sum(count for _, count in lacks)
        if not total:
            return None
        place = random.Random(f"{self._plan.seed}/{cell.number}/{total}").randrange(total)
        for split, count in lacks:
            place -= count
            if place < 0:
                return split
        raise AssertionError

    def _show(self) -> None:
        totals = self._store.totals
        self._display.update(
            Tally(totals["kept"], self._wanted, totals["rejected"], totals["tokens_in"], totals["tokens_out"])
        )
