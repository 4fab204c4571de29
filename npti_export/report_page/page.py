"""The page: one HTML file with everything in it, that loads nothing and runs nothing but its own few lines.

What models and files say is text here, never markup: the template escapes every value, and the page's own policy lets
no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from npti_export.evaluate.document import Answer, Document
from npti_export.report_page import tables
from npti_export.report_page.gallery import pictures, shown
from npti_export.report_page.theme import DARK, LIGHT, Theme
from npti_export.report_page.verdict import findings, summary
from npti_export.report_page.wording import clean, judged_aside, minus, number, traits_of


def render_page(document: Document, comparisons: Sequence[Document] = ()) -> str:
    """The report of an evaluation as one self-contained HTML page.

    Args:
        document: the evaluation that it is about.
        comparisons: others that are laid beside it: a summary of all and a matrix of their cross-talk.

    Returns:
        The page. The same evaluations give the same page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(minus=minus, number=number, share=lambda value: f"{100 * value:.2f}%")
    script, style = _resource("page.js"), _palette() + _resource("page.css")
    # All three are our own: files of this package, and figures whose texts the XML writer has escaped.
    drawn = {
        one.picture.name: {
            "about": one.picture,
            "reason": one.reason,
            "desk": Markup(one.desk),
            "phone": Markup(one.phone),
        }
        for one in map(shown, pictures(document, comparisons))
    }
    every = [document, *comparisons]
    return environment.from_string(_resource("page.html.j2")).render(
        document=document,
        title=traits_of(document),
        aside=judged_aside(document),
        policy=_policy(script),
        style=Markup(style),
        script=Markup(script),
        summary=summary(document),
        findings=findings(document),
        figures=drawn,
        tables=_tables(document),
        overview=tables.overview(every) if comparisons else None,
        matrix=tables.matrix(every) if comparisons else None,
        sources=len({str(one.model.get("fingerprint")) for one in every}),
        facets=list(dict.fromkeys(one.facet for one in document.answers if one.facet)),
        ways=_ways(document.answers, {one.name: one.label for one in document.conditions}),
    )


def _tables(document: Document) -> dict[str, Any]:
    return {
        "conditions": tables.conditions(document.conditions),
        "contrast": tables.contrast(document),
        "fluency": tables.fluency(document),
        "capability": tables.capability(document),
        "inventory": tables.inventory(document),
        "judges": tables.judges(document),
        "cross_talk": tables.cross_talk(document),
        "sweeps": tables.sweeps(document),
        "pareto": tables.pareto(document),
        "fidelity": tables.fidelity(document),
        "recipe": tables.recipe(document),
        "provenance": tables.provenance(document),
    }


def _ways(answers: Sequence[Answer], labels: dict[str, str]) -> dict[str, str]:
    """Name and label of every condition that answered, in the order of the conditions."""
    answered = dict.fromkeys(name for one in answers for name in one.answers)
    known = {name: label for name, label in labels.items() if name in answered}
    return known | {name: name for name in answered if name not in known}


def _policy(script: str) -> str:
    """The page's content security policy: nothing from anywhere, and no script but ours."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _palette() -> str:
    def variables(theme: Theme) -> str:
        return ":root{" + "".join(f"--fig-{name}:{colour};" for name, colour in theme.roles()) + "}"

    return f"{variables(LIGHT)}\n@media (prefers-color-scheme:dark){{{variables(DARK)}}}\n"


def _resource(name: str) -> str:
    return files("npti_export.report_page").joinpath(name).read_text(encoding="utf-8")
