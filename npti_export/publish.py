"""What goes to the Hub: whether it may, before any work, and the upload with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npti_export.evaluate.card import check_same_rule, is_other_file, results, section
from npti_export.evaluate.document import read_document
from npti_export.files import atomic_output
from npti_export.job import Prepared
from npti_export.progress import Progress
from npti_export.request import Job


def check_publication(asked: Prepared, *, strengths: bool = True) -> None:
    """Raise unless the repository can be written to, and the evaluation is of what the job makes.

    Args:
        asked: the job, checked, with nothing computed yet.
        strengths: whether those of the poles are settled, so that they are compared, too.

    Raises:
        EvaluationError: see :func:`npti_export.evaluate.card.check_same_rule`.
        HubError: the repository or the token is refused.
    """
    job = asked.job
    if job.evaluation is not None:
        check_same_rule(
            job.evaluation,
            read_document(job.evaluation),
            asked.traits,
            asked.source.fingerprint,
            asked.recipe,
            job.format,
            benches={name: bench.digest for name, bench in asked.benches.items()},
            strengths=strengths,
            compiles=job.rule_from is None,  # what an earlier artifact was compiled by is not what this one is
        )
    if job.push_to is not None:
        from npti_export.export.hub import check_repository

        check_repository(job.push_to)


def push(job: Job, report: dict[str, Any], progress: Progress) -> str:
    """Upload what the main job delivered; returns its address.

    Figures that were measured on other bytes of the same rule say so in the card.

    Raises:
        HubError: the upload broke off; what is on disk is complete.
    """
    from npti_export.export.card import model_card
    from npti_export.export.hub import push as upload

    assert job.out is not None
    assert job.push_to is not None
    progress.start(f"push to {job.push_to}", 1)
    path, card = Path(report["artifact"]["path"]), model_card(report)
    if job.evaluation is not None:
        document = read_document(job.evaluation)
        other = is_other_file(document, report["artifact"]["sha256"])
        if other:
            progress.note(
                f"{job.evaluation}: its figures are of another file of the same rule (its SHA-256 differs from that of "
                f"{path.name}), and the card says so; evaluate {path.name} and put the figures in by --card instead"
            )
        card = model_card(report, section(document, other_file=other), results(document))
        if path.is_dir():  # which is uploaded with the card inside it
            with atomic_output(path / "README.md", force=True) as temporary:
                temporary.write_text(card, encoding="utf-8")
    url = upload(path, job.push_to, card, private=job.private)
    progress.advance(1)
    return url
