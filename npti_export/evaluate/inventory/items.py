"""Items of an inventory: the shipped ones, or any file or folder that ``bench import`` understands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npti_export.bench.inventories import SUFFIXES, inventory_items
from npti_export.bench.published_layout import INVENTORY
from npti_export.bench.reading import Faults
from npti_export.errors import BenchError, EvaluationError

SHIPPED = Path(__file__).parent / "items.jsonl"
_MOST = 10_000  # a large published inventory has some hundreds


@dataclass(frozen=True)
class Item:
    """A statement that people use to describe themselves.

    Attributes:
        trait: what it is about.
        keyed: ``+`` or ``-``: the pole of somebody who calls it accurate.
        text: of it.
        facet: side of the trait, or None.
    """

    trait: str
    keyed: str
    text: str
    facet: str | None = None


def read_inventory(path: Path | None = None) -> tuple[Item, ...]:
    """Items in their order.

    Args:
        path: JSON Lines, CSV or XLSX, or a folder as ``bench import`` writes it; None takes the shipped items.

    Raises:
        EvaluationError: nothing there, malformed (file and line are named), no items or too many.
    """
    path = path or SHIPPED
    files = [path]
    if path.is_dir():
        files = sorted({*path.glob(INVENTORY), *path.glob(f"*/{INVENTORY}")})
        if not files:
            raise EvaluationError(f"{path}: neither it nor a folder in it has an {INVENTORY}; give the file itself")
    elif not path.is_file():
        raise EvaluationError(f"{path}: there is no such inventory")
    items: list[Item] = []
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise EvaluationError(f"{file}: its ending says nothing; inventories end in {', '.join(SUFFIXES)}")
        items += _items(file)
    if not items:
        raise EvaluationError(f"{path}: holds no item")
    return tuple(items)


def source_name(path: Path | None) -> str:
    """What a report calls an inventory."""
    return "npti-export's own items" if path is None else path.name


def _items(path: Path) -> list[Item]:
    faults = Faults(skip=False)
    items = []
    try:
        for item in inventory_items(path, {}, None, faults, {}):
            items.append(Item(item["trait"], item["keyed"], item["text"], item.get("facet")))
            if len(items) > _MOST:
                raise EvaluationError(f"{path}: holds more than {_MOST} items; give a smaller inventory")
    except BenchError as error:
        raise EvaluationError(f"{error}; npti-export bench import takes --column and mends the file") from error
    if faults.count:
        more = f" (and {faults.count - 1} more)" if faults.count > 1 else ""
        raise EvaluationError(f"{faults.first[0]}{more}; mend it, or leave it out by bench import --skip-bad")
    return items
