"""Talking to a steered model, with its base beside it: one question, two answers, two histories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from npti_export.errors import ModelError, OutputError
from npti_export.files import atomic_output, translate_os_errors
from npti_export.runtimes.base import Message
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.runtimes.llamacpp.sampling import Sampler
from npti_export.runtimes.llamacpp.speaking import Speaker
from npti_export.temporaries import TemporaryFolder
from npti_export.terminal import printable

FORMAT = 1


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        seed: of the first answer; the next ones count on from it.
        max_new_tokens: longest answer.
    """

    temperature: float = 0.8
    seed: int = 0
    max_new_tokens: int = 512


class Voice(Protocol):
    """What :class:`Partner` needs of a model."""

    room: int

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins."""

    def speak(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[str]:
        """The answer in pieces."""


class LlamaVoice:
    """A GGUF in llama.cpp."""

    def __init__(self, runtime: LlamaCppRuntime) -> None:
        self._runtime, self._speaker = runtime, Speaker(runtime)
        self.room = self._speaker.room

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """See :class:`Voice`."""
        return self._runtime.encode(messages)

    def speak(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[str]:
        """See :class:`Voice`."""
        sampler = Sampler(sampling.temperature, seed)
        return self._speaker.speak(prompt, max_new_tokens=sampling.max_new_tokens, choose=sampler)


@dataclass
class Partner:
    """A model with its own history.

    Attributes:
        name: as shown.
        voice: the model.
        turns: user and assistant in turn.
        dropped: oldest turns that did not fit any more, of ``turns``.
    """

    name: str
    voice: Voice
    turns: list[Message] = field(default_factory=list)
    dropped: int = 0

    def prompt(self, system: str | None, sampling: Sampling) -> tuple[int, ...]:
        """Tokens of the history, from the oldest turn on that leaves room for an answer.

        Raises:
            ModelError: not even the last message fits.
        """
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        while True:
            tokens = self.voice.encode([*before, *self.turns[self.dropped :]])
            if len(tokens) + sampling.max_new_tokens <= self.voice.room:
                return tokens
            if len(self.turns) - self.dropped <= 2:
                raise ModelError(
                    f"{self.name}: the message takes {len(tokens)} tokens and an answer up to "
                    f"{sampling.max_new_tokens}, more than the {self.voice.room} that there is room for; "
                    "shorten it, or give more --context or less --max-new-tokens"
                )
            self.dropped += 2


@dataclass(frozen=True)
class Piece:
    """A bit of an answer.

    Attributes:
        partner: index of who says it.
        text: safe to print.
    """

    partner: int
    text: str


class Conversation:
    """The same questions to one model or several.

    Args:
        partners: who answers.
        sampling: how.
        system: instruction that the models get first.
    """

    def __init__(self, partners: Sequence[Partner], sampling: Sampling, system: str | None = None) -> None:
        self.partners, self.sampling, self.system = list(partners), sampling, system
        self._asked = 0

    def ask(self, text: str) -> Iterator[Piece]:
        """The answers in pieces, all models in turn, a token each.

        What was said when it is stopped (closed, or interrupted) stays in the history; where nothing was, the question
        leaves it again.

        Raises:
            ModelError: a message that does not fit (then nothing is asked), or llama.cpp fails.
        """
        seed, said, kept = self.sampling.seed + self._asked, [""] * len(self.partners), False
        for partner in self.partners:
            partner.turns.append({"role": "user", "content": text})
        try:
            prompts = [partner.prompt(self.system, self.sampling) for partner in self.partners]
            streams = {
                index: partner.voice.speak(prompts[index], self.sampling, seed)
                for index, partner in enumerate(self.partners)
            }
            while streams:
                for index in list(streams):
                    piece = next(streams[index], None)
                    if piece is None:
                        del streams[index]
                    elif piece:
                        said[index], kept = said[index] + piece, True
                        yield Piece(index, printable(piece))
            kept = True  # also of models that have nothing to say
        finally:
            self._asked += kept
            for partner, answer in zip(self.partners, said, strict=True):
                if kept:
                    partner.turns.append({"role": "assistant", "content": answer})
                else:
                    partner.turns.pop()

    def reset(self, system: str | None) -> None:
        """Begin anew, with this instruction."""
        self.system = system
        for partner in self.partners:
            partner.turns, partner.dropped = [], 0

    @property
    def dropped(self) -> int:
        """How many messages the model that forgot most has forgotten."""
        return max(partner.dropped for partner in self.partners)

    def to_dict(self) -> dict[str, Any]:
        """What was said: the JSON that ``/save`` and ``--json`` write."""
        asked = [turn["content"] for turn in self.partners[0].turns[::2]]
        answers = [[turn["content"] for turn in partner.turns[1::2]] for partner in self.partners]
        names = [partner.name for partner in self.partners]
        return {
            "format": FORMAT,
            "models": names,
            "system": self.system,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "max_new_tokens": self.sampling.max_new_tokens,
            "turns": [
                {"user": text, "answers": dict(zip(names, said, strict=True))}
                for text, said in zip(asked, zip(*answers, strict=True), strict=True)
            ],
        }

    def save(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON.

        Raises:
            OutputError: there is something already, or it cannot be written.
        """
        with translate_os_errors(path):
            there = path.exists()
        if there:
            raise OutputError(f"{path}: exists already; choose another name")
        with atomic_output(path) as temporary:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


@contextmanager
def open_conversation(
    model: Path, base: Path | None, sampling: Sampling, *, settings: Settings, system: str | None, alone: bool
) -> Iterator[Conversation]:
    """A conversation with a GGUF, and with its base beside it.

    Args:
        model: the steered file, or any other.
        base: what to compare with; None takes the base inside a steered file, restored for as long as this is open.
        sampling: how answers are drawn.
        settings: of llama.cpp.
        system: instruction that the models get first.
        alone: ask the one model only.

    Raises:
        ModelError: not a GGUF, or llama.cpp refuses it.
    """
    for path in (model, base):
        _check_gguf(path)
    with ExitStack() as stack:
        if base is None and not alone:
            base = stack.enter_context(_own_base(model))
        files = {"steered": model} if base is None else {"base": base, "steered": model}
        if len(files) == 1 and not is_steered(model):
            files = {model.stem: model}
        partners = [
            Partner(name, LlamaVoice(stack.enter_context(LlamaCppRuntime(path, settings, listens=False))))
            for name, path in files.items()
        ]
        yield Conversation(partners, sampling, system)


def is_steered(path: Path) -> bool:
    """Whether a GGUF holds what its base can be restored from."""
    from npti_export.export.layout import SHA256
    from npti_export.gguf.shards import read_model

    return SHA256 in read_model(path).by_key


def _check_gguf(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise ModelError(
            f"{path}: chat runs GGUF files, in llama.cpp, and this is a directory; export it with --format gguf, or "
            "load it in transformers"
        )


@contextmanager
def _own_base(model: Path) -> Iterator[Path | None]:
    """The base of a steered file, restored in a temporary folder; None of a file that is not steered."""
    if not is_steered(model):
        yield None
        return
    from npti_export.export.strip import strip

    with TemporaryFolder() as folder:
        base = folder / "base.gguf"
        strip(model, base, force=False)
        yield base if base.exists() else next(iter(sorted(folder.glob("*.gguf"))))
