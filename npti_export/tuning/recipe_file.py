"""A recipe file of what was picked: what it extends, and a paragraph for each pole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npti_export.errors import OutputError, RecipeError
from npti_export.files import atomic_output, check_writable
from npti_export.recipe import PoleSection, Recipe, load_recipe
from npti_export.temporaries import TemporaryFolder

_MARK = "# Settings found by npti-export tune, on search questions only."
_SECTIONS = ("prompt", "identify", "select", "rule", "compile", "verify")


def check_recipe_path(path: Path, *, force: bool) -> None:
    """Raise before any work if the file could not be written, or not be read as a recipe.

    Raises:
        OutputError: it exists and ``force`` is not set, or its name does not end in ``.toml``.
        RecipeError: it is one of ours, which would be written on, and was edited so that it cannot be read.
    """
    if path.suffix != ".toml":
        raise OutputError(f"{path}: a recipe's name ends in .toml; choose another one")
    check_writable(path, force=force)
    if _whole(path).startswith(_MARK):
        try:
            load_recipe(str(path))
        except RecipeError as error:
            raise RecipeError(f"{error}; mend that file, or choose another name") from error


def write_recipe(
    path: Path,
    base: str,
    plain: Recipe,
    recipe: Recipe,
    pole: str,
    section: PoleSection,
    *,
    fingerprint: str,
    model: str,
    comments: Sequence[str] = (),
    force: bool = False,
) -> list[str]:
    """Write a recipe, or with ``force`` the pole's paragraph of one of ours that is there.

    A file with another beginning is replaced as a whole.

    Args:
        path: ends in ``.toml``.
        base: name or path of the recipe that is extended.
        plain: that recipe.
        recipe: the same with the overrides that it was tuned with.
        pole: that the settings are for.
        section: the settings.
        fingerprint: of the model.
        model: its name.
        comments: lines above them.
        force: see above.

    Returns:
        Poles that the file held before and still holds.

    Raises:
        OutputError: see :func:`check_recipe_path`.
        RecipeError: an override cannot be written down, or what the file says of other poles cannot be read.
    """
    check_recipe_path(path, force=force)
    head = {"name": path.stem, "description": f"Tuned for {model}", "tuned_for": fingerprint}
    changes = _changes(plain, recipe)
    here = _paragraph(pole, section, comments)
    beginning = _text(_beside(base, path), head, changes, [])
    kept = _paragraphs(path, beginning)
    paragraphs = {**kept, pole: here}
    whole = [paragraphs[one] for one in sorted(paragraphs)]
    _check_reads_back(_text(_absolute(base), head, changes, whole), recipe, pole, section)
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(_text(_beside(base, path), head, changes, whole), encoding="utf-8")
    return sorted(kept.keys() - {pole})


def _whole(path: Path) -> str:
    """A file's text; of what cannot be read, nothing."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _paragraphs(path: Path, beginning: str) -> dict[str, str]:
    """Paragraphs of poles in a file of ours that begins like the one that will be written."""
    found, others = {}, []
    for part in _whole(path).split("\n\n"):
        match = re.search(r'^\[poles\."([a-z0-9_-]+[+-])"\]$', part, re.MULTILINE)
        if match:
            found[match[1]] = part.strip()
        else:
            others.append(part)
    return found if "\n\n".join(others).strip() == beginning.strip() else {}


def _text(base: str, head: Mapping[str, str], changes: Mapping[str, Mapping[str, Any]], poles: Sequence[str]) -> str:
    lines = [_MARK, f"extends = {_toml(base)}", *(f"{key} = {_toml(value)}" for key, value in head.items())]
    for section, values in changes.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n" + "".join(f"\n{part}\n" for part in poles)


def _paragraph(pole: str, section: PoleSection, comments: Sequence[str]) -> str:
    # names of models stand in comments, too, which TOML allows no control characters
    lines = ["# " + " ".join("".join(one if one.isprintable() else " " for one in line).split()) for line in comments]
    lines.append(f"[poles.{_toml(pole)}]")
    for name in ("select", "rule"):
        values = getattr(section, name)
        if values:
            lines.append(f"{name} = {{ {', '.join(f'{key} = {_toml(value)}' for key, value in values.items())} }}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for this one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _changes(plain: Recipe, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What overrides made of a recipe, by section."""
    found: dict[str, dict[str, Any]] = {}
    for section in _SECTIONS:
        old, new = getattr(plain, section).model_dump(), getattr(recipe, section).model_dump()
        for key in (key for key in new if new[key] != old[key]):
            if new[key] is None:
                raise RecipeError(f"--set {section}.{key}=none cannot be written into a recipe; start from another one")
            found.setdefault(section, {})[key] = new[key]
    return found


def _absolute(base: str) -> str:
    return str(Path(base).resolve()) if base.endswith(".toml") else base


def _beside(base: str, path: Path) -> str:
    """How a recipe that lies in the folder of ``path`` names another one."""
    if not base.endswith(".toml"):
        return base
    import os

    try:
        return Path(os.path.relpath(Path(base).resolve(), path.resolve().parent)).as_posix()
    except ValueError:  # another drive
        return _absolute(base)


def _check_reads_back(text: str, recipe: Recipe, pole: str, section: PoleSection) -> None:
    from npti_export.tuning.space import with_section

    with TemporaryFolder() as folder:
        path = folder / "tuned.toml"
        path.write_text(text, encoding="utf-8")
        read, meant = load_recipe(str(path)).for_pole(pole), with_section(recipe, pole, section).for_pole(pole)
    if any(getattr(read, name) != getattr(meant, name) for name in _SECTIONS):
        raise RecipeError(
            f"the settings of {pole} in the extended recipe stand in the way of a --set; start from another recipe"
        )
