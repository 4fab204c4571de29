"""What a build has come to: ``build.json``, the bench's own files, and what one would cost beforehand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from npti_export.bench.making.folder import Folder, identity
from npti_export.bench.making.plan import Cell, Plan
from npti_export.bench.making.prompts import JUDGE_VERSION, PROMPT_VERSIONS, generator_messages, judge_messages
from npti_export.bench.making.store import Store
from npti_export.version import __version__

Report = dict[str, Any]

RULES = ("format", "language", "length", "leakage", "person", "surplus", "duplicate", "judge")
"""Every reason for which an item is rejected, in the order in which they are looked for."""

_LETTERS_A_TOKEN = 4.0  # of English, about
_TOKENS_A_WORD = 1.35
_SAMPLED_ORDERS = 50


def short_cells(cells: Iterable[Cell], store: Store) -> list[dict[str, Any]]:
    """Cells that lack items, with how many of each split."""
    short = []
    for cell in cells:
        for split, size in cell.quotas:
            lacks = size - store.taken[cell.number, split]
            if lacks:
                named = {"pole": cell.pole, "facet": cell.facet, "topic": cell.topic, "person": cell.person}
                named |= {"split": split}
                short.append({**{name: value for name, value in named.items() if value}, "lacks": lacks})
    return short


def report(
    plan: Plan,
    cells: list[Cell],
    store: Store,
    about: Mapping[str, Any],
    prices: tuple[float | None, float | None],
) -> Report:
    """Everything that ``build.json`` says. Counts are of all runs together, times of those that were not killed."""
    kept: Counter[str] = Counter()
    by_number = {cell.number: cell for cell in cells}
    for (number, split), count in store.taken.items():
        kept[split or by_number[number].pole] += count
    totals, short = store.totals, short_cells(cells, store)
    return {
        "npti_export": __version__,
        "complete": not short,
        "plan": identity(plan),
        **about,
        "kept": dict(sorted(kept.items())),
        "rejected": {rule: store.reasons[rule] for rule in RULES if store.reasons[rule]},
        "items": totals["items"],
        "answers": totals["answers"],
        "unusable_answers": totals["unusable"],
        "requests": totals["requests"],
        "rounds": store.turn + 1,
        "tokens": {"in": totals["tokens_in"], "out": totals["tokens_out"]},
        "cost": cost(totals["tokens_in"], totals["tokens_out"], prices),
        "seconds": round(totals["milliseconds"] / 1000, 1),
        "short": short,
    }


def cost(tokens_in: float, tokens_out: float, prices: tuple[float | None, float | None]) -> float | None:
    """What so many tokens cost, in the currency of the prices of a million; None where none is given."""
    if prices == (None, None):
        return None
    return round((tokens_in * (prices[0] or 0) + tokens_out * (prices[1] or 0)) / 1e6, 4)


def write_outputs(
    plan: Plan, cells: list[Cell], store: Store, folder: Folder, summary: Report, *, rejects: bool
) -> None:
    """Write the bench's file, ``rejected.jsonl`` if it is wanted, and ``build.json`` last."""
    by_number = {cell.number: cell for cell in cells}
    with folder.output(f"{plan.what}.jsonl") as temporary:
        _write(temporary, _lines(plan, by_number, store))
    if rejects:
        with folder.output("rejected.jsonl") as temporary:
            _write(temporary, _rejects(plan, by_number, store))
    with folder.output("build.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _place(cell: Cell) -> dict[str, str]:
    if cell.pole:
        return {"pole": cell.pole, "facet": cell.facet}
    return {"facet": cell.facet, "topic": cell.topic, "person": cell.person}


def _source(plan: Plan, order: int, seed: int) -> dict[str, Any]:
    source = {"model": plan.model, "prompt": PROMPT_VERSIONS[plan.what], "seed": seed, "order": order}
    source |= {"temperature": plan.temperature}
    return source | ({"judge": plan.judge, "judge_prompt": JUDGE_VERSION} if plan.judge else {})


def _lines(plan: Plan, cells: Mapping[int, Cell], store: Store) -> Iterator[dict[str, Any]]:
    for number, split, order, seed, text in store.items():
        head = {"split": split} if split else {}
        yield {**head, **_place(cells[number]), "text": text, "source": _source(plan, order, seed)}


def _rejects(plan: Plan, cells: Mapping[int, Cell], store: Store) -> Iterator[dict[str, Any]]:
    for number, order, seed, rule, fault, text in store.rejects():
        reason = {"rule": rule, "fault": fault}
        yield {**reason, **_place(cells[number]), "text": text, "source": _source(plan, order, seed)}


def estimate(plan: Plan, rounds: int, prices: tuple[float | None, float | None]) -> dict[str, Any]:
    """What a build would ask for: if every item is kept, and at most, if none is.

    Tokens are reckoned: four letters each of the prompts, 1.35 a word of answers half-way between their limits.
    """
    cells = plan.cells()
    owed = [(cell, cell.wanted) for cell in cells]
    orders = asked = sampled = letters = 0
    for order in plan.round_orders(0, 0, owed):
        orders, asked = orders + 1, asked + order.ask
        if sampled < _SAMPLED_ORDERS:
            sampled += 1
            letters += sum(len(message["content"]) for message in generator_messages(plan, order))
    tokens_in = orders * letters / sampled / _LETTERS_A_TOKEN
    tokens_out = asked * sum(plan.words) / 2 * _TOKENS_A_WORD
    requests = orders
    if plan.judge:
        requests *= 2
        facet = plan.definition.facet_names[0]
        tokens_in += (
            orders * len(judge_messages(plan.definition, facet, [])[1]["content"]) / _LETTERS_A_TOKEN + tokens_out
        )
        tokens_out += asked * 12
    return {
        "cells": len(cells),
        "items": sum(cell.wanted for cell in cells),
        "orders": orders,
        "requests": requests,
        "requests_at_most": requests * rounds,
        "tokens": {"in": math.ceil(tokens_in), "out": math.ceil(tokens_out)},
        "cost": cost(tokens_in, tokens_out, prices),
        "cost_at_most": cost(tokens_in * rounds, tokens_out * rounds, prices),
    }
