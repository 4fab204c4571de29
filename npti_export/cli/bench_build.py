"""``npti-export bench build``: a generator model writes questions or personas, and filters decide what is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npti_export.cli.endpoints import FIELDS, json_fields
from npti_export.cli.options import FILE, llama_options, llama_settings
from npti_export.terminal import echo, echo_json, tame_console

if TYPE_CHECKING:
    from npti_export.bench.definition import TraitDefinition
    from npti_export.bench.making.builder import Display
    from npti_export.bench.making.judge import Judge
    from npti_export.bench.making.plan import Plan
    from npti_export.generators.base import Generator

SHORT_EXIT = 5  # some cells did not get their items
_WORDS = {"questions": "8-80", "personas": "25-120"}

SIZES = (
    click.option("--search", type=click.IntRange(0), metavar="N", help="Questions to search with [default: 1000]"),
    click.option("--test", type=click.IntRange(0), metavar="N", help="Questions to test with [default: 200]"),
    click.option("--personas", type=click.IntRange(1), metavar="N", help="Personas a pole [default: 80]"),
    click.option("--topics", type=FILE, metavar="FILE", help="Topics, one a line [default: the shipped bench's 14]"),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the plan and every request"),
    click.option("--per-request", type=click.IntRange(1, 50), default=10, show_default=True, metavar="N",
                 help="Items asked for at once"),
    click.option(
        "--rounds", type=click.IntRange(1), default=8, show_default=True, metavar="N",
        help="How often a cell that still lacks items is asked for them",
    ),
    click.option("--words", metavar="A-B", help="Length of an item [default: 8-80, of a persona 25-120]"),
    click.option("--language", type=click.Choice(["en", "none"]), default="en", show_default=True, help="Filter on it"),
    click.option("--keep-rejected", is_flag=True, help="Write rejected.jsonl, with the reason for each"),
)  # fmt: skip
MODELS = (
    click.option("--endpoint", metavar="URL", help="OpenAI-compatible API, such as http://127.0.0.1:8080/v1"),
    click.option(
        "--model", metavar="NAME|FILE|ID",
        help="As the endpoint calls it; without --endpoint a GGUF file or ID:FILE.gguf [default: the embedded model]",
    ),
    click.option(
        "--api-key-env", default="OPENAI_API_KEY", show_default=True, metavar="NAME",
        help="Environment variable with the key, where the endpoint wants one",
    ),
    click.option("--concurrency", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N",
                 help="Requests to the endpoint, or answers of a local model, at once"),
    click.option("--timeout", type=click.FloatRange(1), default=300, show_default=True, metavar="S",
                 help="How long one request may take"),
    click.option("--patience", type=click.FloatRange(0), default=600, show_default=True, metavar="S",
                 help="How long to go on asking an endpoint that does not answer"),
    click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, metavar="X",
                 help="Of the generator"),
    click.option("--max-tokens", type=click.IntRange(1), metavar="N",
                 help="Longest answer; more for a model that reasons first [default: what the items need]"),
    click.option("--omit", multiple=True, type=click.Choice(FIELDS),
                 help="Leave out of requests what the endpoint does not take"),
    click.option("--extra", multiple=True, metavar="KEY=JSON",
                 help="Add to each request, as max_completion_tokens=4000"),
    click.option("--judge", is_flag=True, help="Keep a question only if a model says that the poles would differ"),
    click.option("--judge-endpoint", metavar="URL", help="Of the judge [default: the generator's]"),
    click.option("--judge-model", metavar="NAME", help="The judge [default: the generator]"),
    click.option("--judge-key-env", metavar="NAME", help="Variable with its key [default: as --api-key-env]"),
    click.option("--price-in", type=click.FloatRange(0), metavar="X", help="Of a million prompt tokens"),
    click.option("--price-out", type=click.FloatRange(0), metavar="X", help="Of a million answered tokens"),
)  # fmt: skip


def _with(decorators: tuple[Callable[[Any], Any], ...]) -> Callable[[Any], Any]:
    def decorated(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorated


@click.command()
@click.argument("trait", metavar="TRAIT|FOLDER")
@click.option("--out", required=True, type=FILE, metavar="DIR", help="Folder to build in, and to go on in")
@click.option("--what", type=click.Choice(["questions", "personas"]), default="questions", show_default=True)
@_with(SIZES)
@_with(MODELS)
@llama_options
@click.option("--dry-run", is_flag=True, help="Say what would be asked, and what it would cost, and stop")
@click.option("--force", is_flag=True, help="Begin anew in a folder that holds a build")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@click.pass_context
def build(context: click.Context, /, trait: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Let a model write a trait's questions or personas, and keep those that pass every filter.

    Facets of the trait are crossed with everyday topics and grammatical persons; each combination gets its share. The
    same command goes on where an earlier one stopped. The exit code is 5 if some combinations were not filled.

    \b
      npti-export bench build extraversion --endpoint http://127.0.0.1:8080/v1 --model qwen3-8b --out extra/
      npti-export bench build ./pirate --search 36000 --test 90 --endpoint https://HOST/v1 --model NAME \\
          --concurrency 64 --price-in 0.05 --price-out 0.4 --out pirate-bench/ --dry-run
      npti-export bench build calm --what personas --personas 80 --model Llama-3.2-3B-Instruct-Q4_K_M.gguf --out p/
    """

    from npti_export.bench.making.report import estimate

    _check_pairs(context, options)
    settings = llama_settings(options)
    plan = _plan(context, trait, options)
    prices = (options["price_in"], options["price_out"])
    if dry_run:
        found = estimate(plan, options["rounds"], prices)
        if as_json:
            echo_json(found)
        else:
            _render_estimate(found, plan, options["rounds"])
        return

    from npti_export.bench.making.builder import Options, build
    from npti_export.bench.making.folder import Folder
    from npti_export.cli.bench_display import RichDisplay, render

    folder, limits = Folder(out), (options["rounds"], options["max_tokens"] or 0, options["keep_rejected"])
    with RichDisplay(tame_console(stderr=True), prices) as display:
        # Mistakes are found before the folder is touched, and a folder of another plan before a model is loaded.
        start, judge = _generator(options, settings, display), _judge_endpoint(options, display)
        with folder.opened(plan, force=options["force"]):
            pass
        generator = start()
        summary = build(
            plan,
            folder,
            generator,
            _judge(plan, options, judge or generator),
            Options(*limits, False, *prices),
            display,
        )
    if as_json:
        echo_json(summary)
    else:
        render(summary, out, tame_console())
    context.exit(0 if summary["complete"] else SHORT_EXIT)


def _check_pairs(context: click.Context, options: dict[str, Any]) -> None:
    """Options that would do nothing must not be taken silently."""
    default = click.core.ParameterSource.DEFAULT

    def refuse(names: tuple[str, ...], why: str) -> None:
        for name in names:
            if context.get_parameter_source(name) not in (default, None):
                raise click.UsageError(f"--{name.replace('_', '-')} {why}")

    if context.params["what"] == "personas":
        refuse(("search", "test", "topics", "judge", "judge_model", "judge_endpoint"), "is about --what questions")
    else:
        refuse(("personas",), "is about --what personas")
    if options["endpoint"] is None:
        refuse(("timeout", "patience", "omit", "extra", "api_key_env"), "is about an --endpoint; give one")
    else:
        refuse(("threads", "gpu_layers", "context", "prompt_batch"), "is of a local model; leave it out")
    if not options["judge"]:
        refuse(("judge_endpoint", "judge_model", "judge_key_env"), "is about --judge; give that, too")
    elif options["judge_endpoint"] is not None and options["judge_model"] is None:
        raise click.UsageError("--judge-endpoint needs --judge-model")
    elif options["judge_model"] is not None and options["endpoint"] is None and options["judge_endpoint"] is None:
        raise click.UsageError("--judge-model needs --judge-endpoint, as the generator is a local model")
    if options["endpoint"] is not None and options["model"] is None:
        raise click.UsageError("no --model; name the one that the endpoint is to use")


def _definition(trait: str) -> TraitDefinition:
    from npti_export.bench import shipped_folder
    from npti_export.bench.definition import read_definition
    from npti_export.traits import parse_whole

    spec = parse_whole(trait)
    return read_definition(spec.folder or shipped_folder(spec.trait))


def _plan(context: click.Context, trait: str, options: dict[str, Any]) -> Plan:
    from npti_export.bench.making.plan import Plan
    from npti_export.bench.making.topics import TOPICS, read_topics
    from npti_export.models import DEFAULT_FILE

    what, model = context.params["what"], options["model"]
    words = re.fullmatch(r"(\d{1,4})-(\d{1,4})", options["words"] or _WORDS[what])
    if words is None or not 1 <= int(words[1]) <= int(words[2]):
        raise click.UsageError(f"--words {options['words']}: give the fewest and the most, such as 8-80")
    given = {name: options[name] for name in ("search", "test")}
    search, test = (
        given[name] if given[name] is not None else size for name, size in (("search", 1000), ("test", 200))
    )
    each = options["personas"] or 80
    if options["endpoint"] is None:  # the name of a file, wherever it lies
        model = Path(model).name if model is not None else DEFAULT_FILE
    return Plan(
        what=what,
        definition=_definition(trait),
        sizes=(("search", search), ("test", test)) if what == "questions" else (("+", each), ("-", each)),
        model=model,
        topics=read_topics(options["topics"]) if options["topics"] is not None else TOPICS,
        seed=options["seed"],
        per_request=options["per_request"],
        words=(int(words[1]), int(words[2])),
        language=options["language"],
        temperature=options["temperature"],
        judge=(options["judge_model"] or model) if options["judge"] else "",
    )


def _generator(options: dict[str, Any], settings: Any, display: Display) -> Callable[[], Generator]:
    """Check what was asked for; what is returned loads it."""
    if options["endpoint"] is not None:
        endpoint = _endpoint(options, options["endpoint"], options["model"], options["api_key_env"], display)
        return lambda: endpoint

    from npti_export.generators.local import LocalModel
    from npti_export.models import resolve_model

    source = resolve_model(options["model"])
    return lambda: LocalModel(source, settings, options["concurrency"])


def _endpoint(options: dict[str, Any], url: str, model: str, key_variable: str, display: Display) -> Generator:
    from npti_export.generators.endpoint import Endpoint, EndpointSettings

    return Endpoint(
        EndpointSettings(
            url,
            model,
            key_variable,
            options["concurrency"],
            options["timeout"],
            options["patience"],
            frozenset(options["omit"]),
            json_fields("--extra", options["extra"]),
        ),
        display.note,
    )


def _judge_endpoint(options: dict[str, Any], display: Display) -> Generator | None:
    """The judge's own, or None where it is the generator."""
    if not (options["judge_endpoint"] or options["judge_model"]):
        return None
    url, model = options["judge_endpoint"] or options["endpoint"], options["judge_model"]
    return _endpoint(options, url, model, options["judge_key_env"] or options["api_key_env"], display)


def _judge(plan: Plan, options: dict[str, Any], generator: Generator) -> Judge | None:
    if not plan.judge:
        return None

    from npti_export.bench.making.judge import Judge

    return Judge(generator, plan.definition, max_tokens=options["max_tokens"] or 0)


def _render_estimate(found: dict[str, Any], plan: Plan, rounds: int) -> None:
    tokens = found["tokens"]
    echo(f"{found['items']} {plan.what} of {plan.definition.name} in {found['cells']} cells")
    echo(f"requests: {found['requests']} if every item is kept, at most {found['requests_at_most']}")
    echo(f"tokens: about {tokens['in']} in and {tokens['out']} out, at most {rounds} times that")
    if found["cost"] is not None:
        echo(f"cost: about {found['cost']:.2f}, at most {found['cost_at_most']:.2f}")
