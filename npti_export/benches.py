"""The benches that a job's traits need, and questions from all of them in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npti_export.bench import PERSONAS, QUESTIONS, Question, TraitBench, load_bench, shipped_folder
from npti_export.errors import BenchError, TraitError, shortened
from npti_export.recipe import Recipe
from npti_export.traits import FACETS, TraitSpec, own_name


def load_benches(
    traits: Sequence[TraitSpec], place: Path | None = None, folders: Sequence[Path] = ()
) -> dict[str, TraitBench]:
    """Personas and questions of each trait.

    Args:
        traits: poles; one of a trait of the user's own names its folder, unless ``folders`` has it.
        place: instead of the shipped bench: a folder that holds a folder for each of the Big Five that is asked for,
            or, for one of them, ``personas.jsonl`` and ``questions.jsonl``.
        folders: of traits of the user's own that an artifact records by name.

    Raises:
        TraitError: a trait of the user's own without a folder, a folder that no trait needs, or two for one trait.
        BenchError: see :func:`npti_export.bench.load_bench`; or ``place`` has nothing that is asked for.
    """
    own = _own_folders(traits, folders)
    big_five = sorted({spec.trait for spec in traits} & FACETS.keys())
    if place is not None and not big_five:
        raise BenchError(
            f"--bench {place}: stands for the shipped bench, and none of the Big Five is asked for; leave it out"
        )
    found = {name: load_bench(name, folder) for name, folder in own.items()}
    found |= {name: load_bench(name, _instead_of_shipped(name, place, big_five)) for name in big_five}
    return {name: found[name] for name in sorted(found)}


def _own_folders(traits: Sequence[TraitSpec], folders: Sequence[Path]) -> dict[str, Path]:
    own: dict[str, Path] = {}
    for spec in traits:
        if spec.folder is not None and own.setdefault(spec.trait, spec.folder).resolve() != spec.folder.resolve():
            raise TraitError(
                f"{own[spec.trait]} and {spec.folder}: both define {spec.trait}; give one of them another 'name'"
            )
    needed = {spec.trait for spec in traits} - FACETS.keys() - own.keys()
    for folder in folders:
        name = own_name(folder)
        if name not in needed:
            asked = f"; what is needed is {', '.join(sorted(needed))}" if needed else ""
            raise TraitError(f"--trait-dir {folder}: defines {name}, for which no folder is needed here{asked}")
        if own.setdefault(name, folder) != folder:
            raise TraitError(f"--trait-dir {folder}: is a second folder of {name}; give one")
    missing = sorted(needed - own.keys())
    if missing:
        name = missing[0]
        raise TraitError(
            f"{name}: is not one of the shipped traits, and its test questions are needed; name the folder that "
            f"defines it by --trait-dir ./{name}"
        )
    return own


def _instead_of_shipped(trait: str, place: Path | None, big_five: Sequence[str]) -> Path | None:
    if place is None:
        return None
    if not place.is_dir():
        raise BenchError(f"--bench {place}: there is no such folder")
    if (place / trait).is_dir():
        return place / trait
    if (place / PERSONAS).is_file() or (place / QUESTIONS).is_file():
        if len(big_five) > 1:
            raise BenchError(
                f"--bench {place}: holds one trait, and {' and '.join(big_five)} are asked for; name a folder with a "
                "folder for each"
            )
        return place
    raise BenchError(f"--bench {place}: has no folder {trait}/ with {PERSONAS} and {QUESTIONS}")


def bench_folder(text: str) -> tuple[str, Path]:
    """The trait and folder that a user names: a folder, one of the Big Five (its shipped bench), or a pole of it.

    A folder without ``trait.toml`` is one for a trait of the Big Five if it is called so.

    Raises:
        TraitError: neither.
        BenchError: its ``trait.toml`` is malformed.
    """
    from npti_export.bench.definition import FILE_NAME, read_definition
    from npti_export.traits import parse_whole

    name = text.strip().lower()
    if name in FACETS:
        return name, shipped_folder(name)
    folder = Path(text)
    try:
        folder = folder.expanduser()
        there = folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no home
        there = False
    if there:
        if (folder / FILE_NAME).is_file():
            return read_definition(folder).name, folder
        called = folder.resolve().name.lower()
        if called in FACETS:
            return called, folder
        raise TraitError(
            f"{folder}: has no {FILE_NAME}, and is not called like one of the Big Five; npti-export bench new shows one"
        )
    try:
        spec = parse_whole(text)
    except TraitError as error:
        raise TraitError(f"{shortened(text)}: neither a trait nor a folder ({error})") from error
    return spec.trait, spec.folder or shipped_folder(spec.trait)


def held_out(benches: dict[str, TraitBench], recipe: Recipe, count: int) -> list[str]:
    """Test questions of the requested traits in turn, as the user would send them.

    Raises:
        BenchError: there are fewer.
    """
    share = -(-count // len(benches))
    pools = [bench.test(share) for bench in benches.values()]
    return _in_turn(pools, recipe, count)


def searched(benches: dict[str, TraitBench], recipe: Recipe, count: int) -> list[str]:
    """Search questions of the requested traits in turn, likewise; fewer where a bench has fewer."""
    pools = [bench.search(0, recipe.identify.seed) for bench in benches.values()]
    share = min(-(-count // len(benches)), *map(len, pools))
    return _in_turn([pool[:share] for pool in pools], recipe, count)


def _in_turn(pools: Sequence[Sequence[Question]], recipe: Recipe, count: int) -> list[str]:
    mixed = [question for turn in zip(*pools, strict=True) for question in turn]
    return [recipe.prompt.user.replace("{question}", question.text) for question in mixed[:count]]
