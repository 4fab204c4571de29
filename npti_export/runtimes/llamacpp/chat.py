"""Chats as tokens: the template inside the file, rendered in a sandbox, and llama.cpp's own tokenizer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from npti_export.chat_template import check_prompt, check_template
from npti_export.errors import ModelError
from npti_export.runtimes.base import FALLBACK_TEMPLATE, Message
from npti_export.runtimes.llamacpp.context import Model
from npti_export.runtimes.llamacpp.library import llama


class Chat:
    """Encodes and decodes for one model.

    Args:
        model: stays open for as long as this is used.

    Raises:
        ModelError: the file's template is none, or takes too much time or room.
    """

    def __init__(self, model: Model) -> None:
        import jinja2
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        lib = llama()
        self._model = model
        template = lib.llama_model_chat_template(model.pointer, None)
        self.uses_fallback = not template
        try:
            source = template.decode("utf-8") if template else FALLBACK_TEMPLATE
            check_template(source, str(model.path))
            self._formatter: Any = Jinja2ChatFormatter(
                source,
                eos_token=self._special(lib.llama_vocab_eos(model.vocabulary)),
                bos_token=self._special(lib.llama_vocab_bos(model.vocabulary)),
            )
        except (jinja2.TemplateError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{model.path}: its chat template (tokenizer.chat_template) cannot be read: {error}; mend it with "
                "gguf-py's gguf_new_metadata.py --chat-template, or take another file"
            ) from error

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant's answer begins.

        Templates that refuse a system turn get it at the head of the user's turn.

        Raises:
            ModelError: the template fails on a question alone.
        """
        try:
            text = self._formatter(messages=list(messages)).prompt
        except Exception as error:  # a template is a program, and raises anything
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise ModelError(f"{self._model.path}: its chat template fails on a question: {error}") from error
            joined = "\n\n".join(message["content"] for message in messages[:2])
            return self.encode([{"role": "user", "content": joined}, *messages[2:]])
        return self.tokenize(check_prompt(text, str(self._model.path)), special=self.uses_fallback)

    def tokenize(self, text: str, *, special: bool, spelt_out: bool = True) -> tuple[int, ...]:
        """Token ids of a text; ``special`` adds the model's own around it, ``spelt_out`` reads those in the text."""
        lib, data = llama(), text.encode("utf-8")
        room = len(data) + 16  # a token has at least one byte, but for the few that are added
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._model.vocabulary, data, len(data), tokens, room, special, spelt_out)
        if count <= 0:
            raise ModelError(f"{self._model.path}: llama.cpp cannot tokenize a prompt of {len(data)} bytes")
        return tuple(tokens[:count])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        lib = llama()
        ids = (lib.llama_token * max(1, len(tokens)))(*tokens)
        room = 1024
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = lib.llama_detokenize(self._model.vocabulary, ids, len(tokens), buffer, room, True, False)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama().llama_vocab_is_eog(self._model.vocabulary, token))

    def _special(self, token: int) -> str:
        if token < 0:
            return ""
        text = llama().llama_vocab_get_text(self._model.vocabulary, token)
        return text.decode("utf-8", "replace") if text else ""
