"""Profiles as files: the suffix decides the format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from npti_export.errors import OutputError, ProfileError
from npti_export.files import atomic_output, holds_other
from npti_export.models import ModelShape, ModelSource
from npti_export.profile import SAFETENSORS_SUFFIXES, NeuronProfile, encode_profile, read_profile
from npti_export.published import encode_published, published_pair, published_rows, read_published
from npti_export.recipe import Recipe
from npti_export.traits import FACETS
from npti_export.version import __version__

_ELSE = "pass --force to replace it, or choose another name"


def save_profile(
    profile: NeuronProfile, path: Path, *, force: bool, threshold: float = 0.1, at_least: int = 0
) -> list[Path]:
    """Write a profile; the suffix decides the format.

    ``.safetensors`` holds all neurons. ``.json`` is the published format, ``{"layer": [[layer, neuron, |delta|, p,
    a95], …]}`` with one file a pole, of the neurons with ``|delta| >= threshold`` or among the ``at_least`` first.
    Without ``force``, a file that is there and is the same to the byte stays: a run that was stopped later wrote it.

    Returns:
        The files: all of them there or, if anything fails before the end, none more than before.

    Raises:
        ProfileError: another suffix, or a pole without neurons in the published format.
        OutputError: a file exists, is another one, and ``force`` is not set.
    """
    return save_profiles([(profile, path)], force=force, threshold=threshold, at_least=at_least)


def save_profiles(
    pairs: Sequence[tuple[NeuronProfile, Path]], *, force: bool, threshold: float, at_least: int
) -> list[Path]:
    """Write several as :func:`save_profile` does, with the same promise for all of them together."""
    files: list[Path] = []
    with ExitStack() as stack:
        for profile, path in pairs:
            for file, data in _contents(profile, path, threshold, at_least).items():
                if force or not _is_there(file, data):
                    stack.enter_context(atomic_output(file, force=force)).write_bytes(data)
                files.append(file)
    return files


def check_saved(profile: NeuronProfile, path: Path, *, threshold: float, at_least: int) -> None:
    """Raise if :func:`save_profile` without ``force`` would, where a profile is there before any work.

    Raises:
        OutputError: a file exists, and is another one.
    """
    if any(file.exists() for file in profile_files(path, profile.trait)):
        for file, data in _contents(profile, path, threshold, at_least).items():
            _is_there(file, data)


def check_may_be(path: Path, trait: str, source: ModelSource, recipe: Recipe, bench: str) -> None:
    """Raise before any work if what lies where a profile will go is surely another file.

    Whether it is the very same is seen when there is something to compare it with: see :func:`save_profile`.

    Args:
        path: where the profile will go.
        trait: that it will be of.
        source: the model.
        recipe: by which it will be made.
        bench: digest of the questions.

    Raises:
        OutputError: it is no profile, or one of another trait, model, recipe, bench or version of ours.
    """
    for file in profile_files(path, trait):
        if not file.exists():
            continue
        try:
            if file.suffix == ".json":
                published_rows(file, source.shape)
                continue
            found = read_profile(file)
        except ProfileError as error:
            raise OutputError(f"{file}: exists already; {_ELSE}") from error
        made = {"recipe": json.loads(recipe.to_json()), "bench": bench, "version": __version__}
        same = (found.trait, found.fingerprint) == (trait, source.fingerprint)
        if not same or any(found.origin.get(key) != value for key, value in made.items()):
            raise OutputError(f"{file}: exists already, and is another profile; {_ELSE}")


def _contents(profile: NeuronProfile, path: Path, threshold: float, at_least: int) -> dict[Path, bytes]:
    files = profile_files(path, profile.trait)
    if path.suffix != ".json":
        return {files[0]: encode_profile(profile)}
    return dict(zip(files, encode_published(profile, threshold=threshold, at_least=at_least), strict=True))


def _is_there(file: Path, data: bytes) -> bool:
    """Whether a file holds exactly that.

    Raises:
        OutputError: it holds something else.
    """
    if holds_other(file, data):
        raise OutputError(f"{file}: exists already, and is another profile than the one found now; {_ELSE}")
    return file.exists()


def load_profile(path: Path, shape: ModelShape, trait: str | None = None) -> NeuronProfile:
    """Read a profile in either format.

    Args:
        path: ``.safetensors``, or one of the two published JSON files (the other is found beside it).
        shape: of the model it is meant for; the published format does not say.
        trait: what it should be a profile of; None takes what the file (name) says.

    Raises:
        ProfileError: missing, damaged, of another trait, or naming neurons that the model does not have.
    """
    if not path.is_file():
        raise ProfileError(f"{path}: there is no such profile")
    profile = read_published(path, shape, trait) if path.suffix == ".json" else read_profile(path)
    if trait is not None and profile.trait != trait:
        raise ProfileError(f"{path}: is a profile of {profile.trait}, not of {trait}")
    return profile


def profile_files(path: Path, trait: str) -> list[Path]:
    """The files that a profile saved under ``path`` goes to: one, or the published pair.

    Raises:
        ProfileError: a suffix or a name that no profile of ``trait`` can have.
    """
    if path.suffix in SAFETENSORS_SUFFIXES:
        return [path]
    if path.suffix != ".json":
        raise ProfileError(
            f"{path}: a profile is written as .safetensors or (published format) .json; change the suffix"
        )
    if trait not in FACETS:
        raise ProfileError(
            f"{path}: the published format names the Big Five only; save {trait} as "
            f"{path.with_suffix('.safetensors').name}"
        )
    named, plus, minus = published_pair(path)
    if named != trait:
        raise ProfileError(f"{path}: would name a profile of {trait} after {named}; choose another name")
    return [plus, minus]


def profile_paths(path: Path, traits: Sequence[str]) -> list[Path]:
    """Where the profiles of traits go: one to a file, several into a folder, each by its name."""
    return [path] if len(traits) == 1 else [path / f"{trait}.safetensors" for trait in traits]
