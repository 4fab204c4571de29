"""The index of a dial: which files there are, and which scales a mix of poles takes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from npti_export.compiler.dial import AdapterPlan, Kind, overlap_scale
from npti_export.errors import AdapterError, TraitError, shortened
from npti_export.files import DIAL_INDEX, DIAL_KEY
from npti_export.traits import TraitSpec, parse_recorded, parse_trait

FORMAT = 1  # of the index
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,250}\.gguf")
_MOST_MIXED = 64


@dataclass(frozen=True)
class Adapter:
    """One LoRA file of a dial; its place in the index is the ``id`` that llama-server knows it by.

    Attributes:
        kind: see :class:`npti_export.compiler.dial.AdapterPlan`.
        traits: poles, likewise.
        file: its name.
    """

    kind: Kind
    traits: tuple[str, ...]
    file: str

    @classmethod
    def of(cls, plan: AdapterPlan) -> Adapter:
        """The file of a planned adapter."""
        return cls(plan.kind, plan.traits, f"{'.'.join(plan.traits)}.{plan.kind}.gguf")


@dataclass(frozen=True)
class Dial:
    """What :func:`load_dial` reads and a request needs.

    Attributes:
        base: name of the file that the server loads, with every slider at zero the base model.
        adapters: in the order of their ids.
        mixed: most poles that can be on at once with what they clamp in common counted once.
    """

    base: str
    adapters: tuple[Adapter, ...]
    mixed: int

    @property
    def poles(self) -> tuple[str, ...]:
        """The poles, in the order of the dial."""
        return tuple(dict.fromkeys(one.traits[0] for one in self.adapters if one.kind != "overlap"))

    def scales(self, mix: Sequence[TraitSpec]) -> list[float]:
        """The scale of each adapter for poles at their strengths, 0 where it is off.

        A shift goes with the strength; a clamp is all or nothing; overlaps see
        :func:`npti_export.compiler.dial.overlap_scale`.

        Raises:
            TraitError: a pole that the dial lacks or that is given twice, or more that overlap than the dial can mix.
        """
        on: dict[str, float] = {}
        for spec in mix:
            if spec.pole not in self.poles:
                raise TraitError(f"{spec.pole}: is not on this dial, which has {', '.join(self.poles)}")
            if spec.pole in on:
                raise TraitError(f"{spec.pole}: is given twice; give it once, with a strength such as {spec.pole}:1.5")
            on[spec.pole] = spec.strength
        self._check_mixable(list(on))
        return [self._scale(one, on) for one in self.adapters]

    def request(self, mix: Sequence[TraitSpec]) -> dict[str, Any]:
        """What a request to llama-server carries for this mix, ``{"lora": [{"id": 0, "scale": 0.7}, …]}``.

        Never an empty list: to the server that is no list, and it would go on from what it cached for another mix.

        Raises:
            TraitError: see :meth:`scales`.
        """
        entries = [{"id": at, "scale": scale} for at, scale in enumerate(self.scales(mix)) if scale]
        return {"lora": entries or [{"id": 0, "scale": 0.0}]}

    def _scale(self, adapter: Adapter, on: Mapping[str, float]) -> float:
        if not all(pole in on for pole in adapter.traits):
            return 0.0
        if adapter.kind == "shift":
            return on[adapter.traits[0]]
        return 1.0 if adapter.kind == "clamp" else overlap_scale(len(adapter.traits))

    def _check_mixable(self, poles: Sequence[str]) -> None:
        common = {frozenset(one.traits) for one in self.adapters if one.kind == "overlap"}
        for some in combinations(poles, self.mixed + 1):
            if all(frozenset(fewer) in common for fewer in combinations(some, self.mixed)):
                raise TraitError(
                    f"{', '.join(some)}: may clamp neurons in common, and this dial mixes {self.mixed} such poles; "
                    f"make it again with --mix {len(some)}"
                )


def parse_mix(text: str, known: Collection[str] = ()) -> tuple[TraitSpec, ...]:
    """Read ``extraversion+:0.7,calm``; nothing is no pole. ``known`` are names of traits of the user's own.

    Raises:
        TraitError: see :func:`npti_export.traits.parse_trait`.
    """
    return tuple(parse_trait(part, known) for part in text.split(",")) if text.strip() else ()


def parse_poles(text: str) -> tuple[TraitSpec, ...]:
    """Read ``all``, or poles such as ``extraversion+,calm``.

    Raises:
        TraitError: an unknown pole, or a strength, which is for a request to say.
    """
    from npti_export.traits import FACETS, SIGNS

    if text.strip().lower() == "all":
        return tuple(TraitSpec(trait, sign) for trait in FACETS for sign in SIGNS)
    specs = parse_mix(text)
    if not specs:
        raise TraitError("--traits names no pole; give all, or poles such as extraversion+,calm")
    for spec, part in zip(specs, text.split(","), strict=True):
        if ":" in part:
            raise TraitError(f"--traits {shortened(part)}: strengths are for requests; give {spec.pole} alone")
    return specs


def load_dial(folder: Path) -> Dial:
    """Read a dial's index; the files themselves are not looked at.

    Raises:
        AdapterError: no dial, or a damaged one.
    """
    from pydantic import TypeAdapter, ValidationError

    path = folder / DIAL_INDEX
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"{path}: cannot be read ({error.strerror}); name a directory that npti-export dial made"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: is not JSON ({shortened(str(error), 200)}); make the dial again") from error
    if not isinstance(raw, dict) or raw.get(DIAL_KEY) != FORMAT:
        raise AdapterError(f"{path}: is not the index of a dial of this version ({DIAL_KEY} is not {FORMAT})")
    try:
        found = TypeAdapter(_Index).validate_python(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))[:100]
        raise AdapterError(f"{path}: {place}: {fault['msg'].lower()}; make the dial again") from error
    adapters = tuple(
        Adapter(one.kind, tuple(one.traits or ([one.trait] if one.trait else [])), one.file) for one in found.adapters
    )
    if not adapters or not all(one.traits for one in adapters):
        raise AdapterError(f"{path}: adapters: are missing, or one names no trait; make the dial again")
    for name in (found.base, *(one.file for one in adapters)):
        if _FILE.fullmatch(name) is None:  # it also stands in command lines that we print
            raise AdapterError(f"{path}: {shortened(name)} is not the name of a file beside it; make the dial again")
    for pole in {pole for one in adapters for pole in one.traits}:
        if not _is_pole(pole):
            raise AdapterError(f"{path}: {shortened(pole)} is no pole of a trait; make the dial again")
    if not 1 <= found.mixed <= _MOST_MIXED:
        raise AdapterError(
            f"{path}: mixed is {shortened(found.mixed)}, not from 1 to {_MOST_MIXED}; make the dial again"
        )
    return Dial(found.base, adapters, found.mixed)


def _is_pole(text: str) -> bool:
    try:
        return parse_recorded(text).pole == text
    except TraitError:
        return False


@dataclass(frozen=True)
class _Entry:
    """An adapter as the index has it: ``trait`` of one pole, ``traits`` of several."""

    kind: Literal["shift", "clamp", "overlap"]
    file: str
    trait: str | None = None
    traits: list[str] | None = None


@dataclass(frozen=True)
class _Index:
    base: str
    adapters: list[_Entry]
    mixed: int


def index_of(dial: Dial) -> dict[str, Any]:
    """The part of an index that :func:`load_dial` reads back."""
    entries = []
    for at, one in enumerate(dial.adapters):
        named: dict[str, Any] = {"traits": list(one.traits)} if one.kind == "overlap" else {"trait": one.traits[0]}
        entries.append({"id": at, **named, "kind": one.kind, "file": one.file})
    return {DIAL_KEY: FORMAT, "base": dial.base, "adapters": entries, "mixed": dial.mixed}


def server_command(dial: Dial) -> str:
    """The llama-server command line, to be run in the dial's directory.

    Every adapter starts at scale 0 (``--lora`` would start it at 1), so a request that says nothing is unsteered.
    """
    scaled = ",".join(f"{one.file}:0" for one in dial.adapters)
    return f"llama-server -m {dial.base} --lora-scaled {scaled}"


def curl_command(dial: Dial, mix: Sequence[TraitSpec]) -> str:
    """A request with a mix, by curl."""
    body = {"messages": [{"role": "user", "content": "What do you do with a free evening?"}], **dial.request(mix)}
    return (
        "curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )
