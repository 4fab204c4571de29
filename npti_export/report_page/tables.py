"""The tables of the page: every figure with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from npti_export.evaluate.document import Change, Condition, Document, Estimate, Interval, Sweep
from npti_export.report_page.wording import (
    MISSING,
    estimate,
    flat,
    in_order,
    interval,
    judged,
    judged_aside,
    minus,
    number,
    percent,
    plain,
    share,
    size,
    traits_of,
)

# Of self-report; see npti_export.evaluate.inventory.answers.
BY_ORDER = (
    "Every item is asked with its options in both orders: a model that goes by their order, not by the item, as small "
    "ones do, comes out at 3 for every trait."
)


@dataclass(frozen=True)
class Cell:
    """A figure, and in small type what belongs to it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A caption, column heads, and rows whose first cell heads the row."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    marked: frozenset[int] = field(default_factory=frozenset)

    @property
    def numeric(self) -> bool:
        """Whether all but the first column hold figures."""
        return len(self.heads) > 2


def figure(value: Estimate | None, digits: int = 3, *, sign: bool = False, share: bool = False) -> Cell:
    """A mean, with its interval in small type."""
    if value is None:
        return Cell(MISSING)
    if share:
        ends = f"{percent(value.low, 1, sign=sign)} to {percent(value.high, 1, sign=sign)}"
        return Cell(percent(value.mean, 1, sign=sign), ends)
    return Cell(number(value.mean, digits, sign=sign), interval(value, digits, sign=sign))


def conditions(found: Sequence[Condition]) -> Table:
    """Every condition, and what its answers are like."""
    heads = (
        "condition",
        "gain",
        "KL",
        "contrast",
        "fluency",
        "perplexity",
        "repetition",
        "distinct",
        "tokens",
        "seconds",
    )
    rows = [
        (
            Cell(f"{place}  {one.label}"),
            figure(one.gain, sign=True),
            Cell(MISSING if one.damage is None else number(one.damage, 3)),
            figure(one.contrast, sign=True),
            figure(one.fluency, 2),
            figure(one.perplexity, 2),
            figure(one.repetition, share=True),
            figure(one.distinct, share=True),
            figure(one.length, 0),
            Cell(number(one.seconds, 1)),
        )
        for place, one in enumerate(found, 1)
    ]
    marked = frozenset(place for place, one in enumerate(found) if one.name == "steered")
    note = (
        "Gain: contrast minus the unsteered model's, question by question. KL: from it, on the neutral text by which "
        "methods are brought to the steered model's. Contrast: nats per token towards the wanted pole. "
        "Fluency: log-likelihood per token after the plain question. Both by the unsteered model."
    )
    return Table("Conditions, with 95% intervals", heads, rows, note, marked)


def contrast(document: Document) -> Table:
    """The likelihood contrast of the judged pole."""
    part = document.trait_contrast
    rows = [
        (Cell("unsteered"), figure(part.base, sign=True), Cell(str(part.base.n))),
        (Cell("steered"), figure(part.steered, sign=True), Cell(str(part.steered.n))),
        (Cell("gain"), figure(part.gain, sign=True), Cell(str(part.gain.n))),
    ]
    if part.null is not None:
        rows.append((Cell("gain of the null trait"), figure(part.null, sign=True), Cell(str(part.null.n))))
    if part.beyond_null is not None:
        rows.append((Cell("gain beyond it"), figure(part.beyond_null, sign=True), Cell(str(part.beyond_null.n))))
    rows += [(Cell(f"gain, {facet}"), figure(one, sign=True), Cell(str(one.n))) for facet, one in part.by_facet.items()]
    note = f"The wanted pole is {judged(document)}. Each answer is scored by {part.personas} pairs of personas."
    if part.share_of_prompt is not None:
        note += f" The gain is {share(part)} of the better persona prompt's."
    return Table("Trait contrast, nats per token towards the wanted pole", ("", "mean, 95%", "questions"), rows, note)


def _changes(caption: str, rows: Mapping[Cell, tuple[Change, int, bool]], note: str = "") -> Table:
    cells = [
        (
            name,
            figure(one.base, digits, share=share),
            figure(one.steered, digits, share=share),
            figure(one.change, digits, sign=True, share=share),
        )
        for name, (one, digits, share) in rows.items()
    ]
    return Table(caption, ("", "unsteered", "steered", "change"), cells, note)


def fluency(document: Document) -> Table:
    """How well answers read, before and after."""
    part = document.fluency
    rows = {
        Cell("log-likelihood"): (part.log_likelihood, 3, False),
        Cell("perplexity"): (part.perplexity, 2, False),
        Cell("repetition"): (part.repetition, 3, True),
        Cell("distinct bigrams"): (part.distinct, 3, True),
        Cell("tokens an answer"): (part.length, 0, False),
    }
    return _changes("Fluency, with 95% intervals", rows)


def capability(document: Document) -> Table | None:
    """Tests of skill, before and after."""
    part = document.capability
    if not part.tasks:
        return None
    rows = {Cell(task.name, f"{task.metric}; {task.source}"): (task.score, 3, True) for task in part.tasks}
    kl = f"KL to the unsteered model on neutral text: {estimate(part.kl_neutral)} nats per token."
    return _changes("Skills, with 95% intervals", rows, kl)


def inventory(document: Document) -> Table | None:
    """Self-report by trait, before and after."""
    part = document.inventory
    if part is None:
        return None
    rows = {Cell(minus(trait)): (part.traits[trait], 2, False) for trait in in_order(part.traits)}
    return _changes("Inventory, 1 to 5, with 95% intervals", rows, f"Items: {part.source}. {BY_ORDER}")


def judges(document: Document) -> list[Table]:
    """What the judges gave, and how far they agree."""
    part = document.judge
    if part is None or not part.judges:
        return []
    labels = {one.name: one.label for one in document.conditions}
    names = list(dict.fromkeys(name for one in part.judges for name in (*labels, *one.trait, *one.fluency)))
    names = [name for name in names if any(name in one.trait or name in one.fluency for one in part.judges)]
    heads = [""] + [f"{one.judge}: {what}" for one in part.judges for what in ("trait", "fluency")]
    rows = [
        [Cell(labels.get(name, name))]
        + [figure(scores.get(name), 2) for one in part.judges for scores in (one.trait, one.fluency)]
        for name in names
    ]
    unusable = "; ".join(f"{one.judge} {one.unusable}" for one in part.judges)
    tables = [Table("Judges, 1 to 5, with 95% intervals", heads, rows, f"Verdicts that could not be used: {unusable}.")]
    if part.agreement:
        agreed = [
            (
                Cell(" and ".join(one.judges)),
                Cell(one.what),
                Cell(number(one.spearman, 2), _within(one.spearman_interval)),
                Cell(number(one.kappa, 2), _within(one.kappa_interval)),
                Cell(str(one.n)),
            )
            for one in part.agreement
        ]
        heads = ["judges", "scale", "Spearman", "kappa", "answers"]
        tables.append(Table("Agreement between judges", heads, agreed, "Kappa: Cohen's, with quadratic weights."))
    return tables


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f"{number(interval[0], 2)} to {number(interval[1], 2)}"


def cross_talk(document: Document) -> Table | None:
    """How far each trait moves."""
    moved = document.cross_talk
    if not moved:
        return None
    rows = [(Cell(trait), figure(moved[trait], sign=True), Cell(str(moved[trait].n))) for trait in in_order(moved)]
    return Table("Cross-talk, nats per token towards each + pole", ("trait", "gain, 95%", "questions"), rows)


def sweeps(document: Document) -> list[Table]:
    """Ablations: a table a setting."""
    return [_sweep(one) for one in document.sweeps]


def _sweep(found: Sweep) -> Table:
    rows = [
        (
            Cell(plain(point.value)),
            figure(point.gain, sign=True),
            figure(point.fluency, 2),
            figure(point.kl_neutral),
        )
        for point in found.points
    ]
    return Table(f"Ablation: {found.setting}", (found.setting, "gain", "fluency", "KL, neutral text"), rows)


def pareto(document: Document) -> Table | None:
    """The tuner's front."""
    front = [one for one in document.pareto if one.on_front or one.chosen]
    if not front:
        return None
    rows = [
        (
            Cell(one.label, "chosen" if one.chosen else ""),
            Cell(number(one.gain, sign=True)),
            Cell(number(one.damage)),
            Cell(number(one.fluency, 2)),
        )
        for one in sorted(front, key=lambda one: one.damage)
    ]
    heads = ("setting", "gain", "KL, neutral text", "fluency")
    note = f"Of {len(document.pareto)} trials on search questions."
    return Table("The tuner's front", heads, rows, note)


_FIDELITY = {
    "kl_rule_base": "rule against the unsteered model, KL",
    "kl_rule_artifact": "rule against the file, KL",
    "kl_runtime_floor": "the runtime's own noise, KL",
    "kl_rule_base_file": "rule against the unsteered file in its runtime, KL",
    "limit": "limit of the file's KL",
    "top1": "agreement on the likeliest token",
    "max_logit_diff": "worst logit off by",
    "positions": "tokens compared",
}


def fidelity(document: Document) -> Table | None:
    """The file against its rule."""
    if not document.fidelity:
        return None
    rows = [
        (Cell(_FIDELITY.get(key, key)), Cell(f"{value:,.0f}" if key == "positions" else number(value, 4)))
        for key, value in document.fidelity.items()
    ]
    return Table("Fidelity of the file, nats per token", ("", "measured"), rows)


def recipe(document: Document) -> Table | None:
    """Every choice."""
    if not document.recipe:
        return None
    return Table("Recipe", ("setting", "value"), [(Cell(key), Cell(value)) for key, value in flat(document.recipe)])


def provenance(document: Document) -> Table:
    """What was evaluated, and how."""
    rows = [
        *(
            (f"artifact {key}", size(value) if key == "bytes" else plain(value))
            for key, value in document.artifact.items()
        ),
        *((f"model {key}", plain(value)) for key, value in document.model.items()),
        ("traits", ", ".join(document.traits)),
        *((f"evaluation {key}", value) for key, value in flat(document.settings)),
        *((f"time {key}", f"{number(value, 1)} s") for key, value in document.seconds.items()),
        ("npti-export", document.version),
    ]
    return Table("Provenance", ("", ""), [(Cell(key.replace("_", " ")), Cell(value)) for key, value in rows])


def overview(documents: Sequence[Document]) -> Table:
    """One row an evaluation; the model is named where there is more than one."""
    models = [plain(one.model.get("name")) for one in documents]
    named = len(set(models)) > 1
    heads = ("steered", "gain", "of the prompt", "null trait", "perplexity", "KL, neutral text", "KL to the rule")
    rows = [
        (
            Cell(traits_of(one), " ".join(filter(None, (model if named else "", judged_aside(one))))),
            figure(one.trait_contrast.gain, sign=True),
            Cell(percent(one.trait_contrast.share_of_prompt)),
            figure(one.trait_contrast.null, sign=True),
            Cell(number(one.fluency.perplexity.steered.mean, 2), f"from {number(one.fluency.perplexity.base.mean, 2)}"),
            figure(one.capability.kl_neutral),
            Cell(number(one.fidelity.get("kl_rule_artifact"), 4)),
        )
        for one, model in zip(documents, models, strict=True)
    ]
    return Table("All evaluations", heads, rows)


def matrix(documents: Sequence[Document]) -> Table | None:
    """Cross-talk of several evaluations, figures with intervals."""
    traits = in_order(trait for one in documents for trait in one.cross_talk or {})
    if not traits:
        return None
    rows = [
        [Cell(traits_of(one))] + [figure((one.cross_talk or {}).get(trait), sign=True) for trait in traits]
        for one in documents
    ]
    return Table("Cross-talk of all, nats per token towards each + pole", ["steered", *traits], rows)
