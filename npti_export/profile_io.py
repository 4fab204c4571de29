"""Profiles as files: the suffix decides the format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npti_export.errors import ProfileError
from npti_export.models import ModelShape
from npti_export.profile import SAFETENSORS_SUFFIXES, NeuronProfile, read_profile, write_profile
from npti_export.published import published_pair, read_published, write_published
from npti_export.traits import FACETS


def save_profile(
    profile: NeuronProfile, path: Path, *, force: bool, threshold: float = 0.1, at_least: int = 0
) -> list[Path]:
    """Write a profile; the suffix decides the format.

    ``.safetensors`` holds all neurons. ``.json`` is the published format, ``{"layer": [[layer, neuron, |delta|, p,
    a95], …]}`` with one file a pole, of the neurons with ``|delta| >= threshold`` or among the ``at_least`` first.

    Returns:
        The files written.

    Raises:
        ProfileError: another suffix.
        OutputError: a file exists and ``force`` is not set.
    """
    files = profile_files(path, profile.trait)
    if path.suffix == ".json":
        write_published(profile, files, force=force, threshold=threshold, at_least=at_least)
    else:
        write_profile(profile, path, force=force)
    return files


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
