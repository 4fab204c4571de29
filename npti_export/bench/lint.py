"""What is weak in a trait's personas and questions, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from npti_export.bench import TraitBench, definition_of, missing_parts, read_bench
from npti_export.bench.checks import CHECKS, Weakness

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or weak.

    Attributes:
        severity: ``error``: cannot be used so; ``warning``: will cost quality; ``note``: worth a look.
        check: which check found it.
        path: file.
        line: in it, from 1; 0 where it is about the file as a whole.
        text: what it is.
        mend: what to do.
    """

    severity: Severity
    check: str
    path: Path
    line: int
    text: str
    mend: str

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "severity": self.severity,
            "check": self.check,
            "file": str(self.path),
            "line": self.line,
            "text": self.text,
            "mend": self.mend,
        }


def lint(trait: str, folder: Path) -> list[Finding]:
    """Everything that is wrong or weak with a trait's folder, errors first.

    Raises:
        BenchError: ``trait.toml`` is missing or malformed, or a file cannot be read.
    """
    bench, faults = read_bench(definition_of(trait, folder), folder)
    found = [Finding("error", "line", one.path, one.line, one.text, "mend the line or remove it") for one in faults]
    for one in missing_parts(folder, bench.personas, bench.questions):
        check, mend = ("placeholder", "it shows the form only") if one.line else ("missing", "write some")
        found.append(Finding("error", check, one.path, one.line, one.text, mend))
    for check, weaknesses in CHECKS.items():
        found += _findings(check, weaknesses, bench)
    order: list[Severity] = ["error", "warning", "note"]
    return sorted(found, key=lambda one: order.index(one.severity))


def _findings(check: str, weaknesses: Callable[[TraitBench], Iterator[Weakness]], bench: TraitBench) -> list[Finding]:
    return [
        Finding(one.severity, check, bench.folder / one.file, one.line, one.text, one.mend) for one in weaknesses(bench)
    ]


def unusable(findings: list[Finding]) -> bool:
    """Whether a trait with these findings cannot be used at all."""
    return any(one.severity == "error" for one in findings)
