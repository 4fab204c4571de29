"""From evaluations in files to the page and the pictures in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npti_export.errors import EvaluationError, OutputError
from npti_export.evaluate.document import Document, read_document
from npti_export.files import atomic_directory, atomic_output, check_directory_writable, check_writable
from npti_export.report_page.gallery import write_figures
from npti_export.report_page.page import render_page

# Of every picture that there can be, see :func:`npti_export.report_page.gallery.pictures`.
NAMES = (
    "conditions", "tradeoff", "facets", "cross-talk", "radar", "layers", "sweep", "pareto", "distribution", "matrix",
)  # fmt: skip


def write_report(sources: Sequence[Path], *, html: Path | None, figures: Path | None, force: bool = False) -> list[str]:
    """Read evaluations and write the page and the pictures; each is whole or absent.

    Args:
        sources: what ``evaluate --json`` wrote; the first is what the page is about, the others are laid beside it.
        html: the page to write.
        figures: the folder to write pictures to.
        force: replace the page, and a folder that holds pictures of ours and nothing else.

    Returns:
        What was written, a line each.

    Raises:
        EvaluationError: a source is not an evaluation, or has nothing to draw.
        OutputError: an output cannot be written, exists, or is one of the sources.
    """
    for path in (html, figures):
        if path is not None and path.resolve() in {source.resolve() for source in sources}:
            raise OutputError(f"{path}: is the evaluation that the report is drawn from; choose another name")
    if html is not None:
        check_writable(html, force=force)
    if figures is not None:
        check_directory_writable(figures, force=force, ours=_is_ours)
    document, *others = [read_document(source) for source in sources]
    written = []
    if html is not None:
        page = render_page(document, others).encode("utf-8", "replace")
        with atomic_output(html, force=force) as temporary:
            temporary.write_bytes(page)
        written.append(f"{html}: {len(page) / 1e6:.1f} MB, whole in itself")
    if figures is not None:
        written.append(f"{figures}: {_write_figures(document, others, figures, force=force)} pictures")
    return written


def _write_figures(document: Document, others: Sequence[Document], folder: Path, *, force: bool) -> int:
    with atomic_directory(folder, force=force, ours=_is_ours) as temporary:
        written = list(write_figures(document, temporary, others))
        if not written:
            raise EvaluationError("the evaluation has nothing to draw; evaluate again")
    return len(written)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds pictures of a report and nothing else."""
    return all(path.is_file() and path.name in _names() for path in folder.iterdir())


def _names() -> set[str]:
    return {f"{name}{ending}" for name in NAMES for ending in (".svg", ".png", "-dark.png")}
