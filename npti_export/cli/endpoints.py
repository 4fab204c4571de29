"""Options about judges, and what options about endpoints have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from npti_export.cli.options import FILE, Command, decorated

if TYPE_CHECKING:
    from npti_export.evaluate.judge.spec import JudgeSpec
    from npti_export.loader import RuntimeSettings

FIELDS = ("seed", "temperature", "max_tokens", "response_format")  # of a request, that an endpoint may not take
_ABOUT_ENDPOINTS = ("key_env", "concurrency", "timeout", "patience", "max_tokens", "omit", "extra")


def json_fields(option: str, given: Sequence[str]) -> dict[str, Any]:
    """Fields of a request from ``KEY=JSON``.

    Raises:
        click.UsageError: one is none.
    """
    fields = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise click.UsageError(f"{option} {one[:60]}: give a field and a JSON value, such as top_p=0.9") from None
    return fields


def judge_options(command: Command) -> Command:
    """Which judges rate answers, and how they are asked."""
    return decorated(
        command,
        [
            click.option(
                "--judge", "judges", multiple=True, metavar="URL=MODEL|FILE.gguf", help="A model that rates the answers"
            ),
            click.option("--judge-journal", type=FILE, metavar="FILE", help="Keeps its verdicts, to go on from"),
            click.option(
                "--judge-key-env",
                multiple=True,
                metavar="NAME",
                help="Variable with its key; one for all, or one for each URL in order [default: OPENAI_API_KEY]",
            ),
            click.option(
                "--judge-max-tokens",
                type=click.IntRange(1),
                metavar="N",
                help="Longest verdict; more for a model that reasons first [default: 512]",
            ),
            click.option(
                "--judge-concurrency", type=click.IntRange(1, 1024), metavar="N", help="Requests at once [default: 8]"
            ),
            click.option(
                "--judge-timeout", type=click.FloatRange(1), metavar="S", help="Of one request [default: 120]"
            ),
            click.option(
                "--judge-patience",
                type=click.FloatRange(0),
                metavar="S",
                help="How long to go on asking one that does not answer [default: 120]",
            ),
            click.option(
                "--judge-omit",
                multiple=True,
                type=click.Choice(FIELDS),
                help="Leave out of requests what the endpoint does not take",
            ),
            click.option(
                "--judge-extra", multiple=True, metavar="KEY=JSON", help='Add to requests, as reasoning_effort="low"'
            ),
        ],
    )


def judges_of(options: dict[str, Any], settings: RuntimeSettings) -> tuple[JudgeSpec, ...]:
    """Take those options out of ``options``, but for the journal.

    Raises:
        EvaluationError: a judge that is none.
        click.UsageError: an option that is about no judge that was given.
    """
    from npti_export.evaluate.judge.spec import parse_judge

    judges = [
        parse_judge(text, threads=settings.threads, gpu_layers=settings.gpu_layers) for text in options.pop("judges")
    ]
    given = {name: options.pop(f"judge_{name}") for name in _ABOUT_ENDPOINTS}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    asked = [one for one in judges if one.url is not None]
    if given and not asked:
        name = next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--judge-{name} is about a judge behind an address; give --judge URL=MODEL")
    keys = given.pop("key_env", ())
    if len(keys) not in (0, 1, len(asked)):
        raise click.UsageError(
            f"--judge-key-env: {len(keys)} for {len(asked)} judges; give one for all, or one for each"
        )
    if "omit" in given:
        given["omit"] = frozenset(given["omit"])
    if "extra" in given:
        given["extra"] = json_fields("--judge-extra", given["extra"])
    found, number = [], 0
    for one in judges:
        if one.url is not None:
            key = {"key_variable": keys[number % len(keys)]} if keys else {}
            one, number = replace(one, **given, **key), number + 1
        found.append(one)
    return tuple(found)
