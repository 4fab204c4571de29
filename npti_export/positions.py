"""Which positions of a forward pass hold response tokens: what a rule for the response only steers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from npti_export.errors import AdapterError

_ATTRIBUTE = "_npti_positions"


class ResponsePositions:
    """Follows the forward passes of one model.

    A token belongs to the response if ``generate`` made it, that is, if it lies behind everything that ``generate`` was
    given (the published code steers just these: decoding steps, never the prompt). In a pass outside ``generate``, one
    token that continues a KV cache belongs to the response, several tokens are a prompt, and :meth:`given` says
    otherwise. Positions are places in the padded sequence, so batches padded on the left need no more than one number.

    Args:
        model: a transformers model; its ``generate`` is wrapped, which :meth:`release` undoes.
        decoder: the module whose ``forward`` takes ``past_key_values`` and runs the layers.
    """

    def __init__(self, model: torch.nn.Module, decoder: torch.nn.Module) -> None:
        self._model = model
        self._prompt: int | None = None
        self._given: torch.Tensor | None = None
        self._mask: torch.Tensor | bool = False
        self._users = 0
        self._handle = decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        model.__dict__["generate"] = _Generate(model.generate, self)

    def of(self, a: torch.Tensor) -> torch.Tensor | bool:
        """For an activation of the pass under way: whether its positions are the response's, or a mask of it.

        Args:
            a: ``[batch, length, width]``.

        Returns:
            The mask is ``[batch or 1, length]`` bool.

        Raises:
            AdapterError: the activation is not of the pass that was seen last.
        """
        mask = self._mask
        if isinstance(mask, bool):
            return mask
        if a.ndim != 3 or mask.shape[-1] != a.shape[1]:
            raise AdapterError(
                f"steering the response only needs activations [batch, {mask.shape[-1]}, width], not {list(a.shape)}; "
                "this model packs its tokens, steer everywhere instead"
            )
        return mask.to(a.device)

    @contextmanager
    def given(self, mask: torch.Tensor) -> Iterator[None]:
        """Within the block, passes steer the positions of ``mask`` ``[batch, length]`` bool."""
        before, self._given = self._given, mask.bool()
        try:
            yield
        finally:
            self._given = before

    def retain(self) -> None:
        """One more adapter needs this."""
        self._users += 1

    def release(self) -> None:
        """One adapter less needs this; with the last one, the model is as it was."""
        self._users -= 1
        if self._users == 0:
            self._handle.remove()
            del self._model.__dict__["generate"]
            del self._model.__dict__[_ATTRIBUTE]

    @contextmanager
    def generating(self, prompt: int) -> Iterator[None]:
        """Within the block, what lies behind ``prompt`` positions is the response."""
        before, self._prompt = self._prompt, prompt
        try:
            yield
        finally:
            self._prompt = before

    def _before_pass(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        length, cache = tokens.shape[1], kwargs.get("past_key_values")
        if self._given is not None:
            if tuple(self._given.shape) != (tokens.shape[0], length):
                raise AdapterError(
                    f"the response mask is {list(self._given.shape)}, but the pass has {tokens.shape[0]} sequences of "
                    f"{length} tokens; give one value a token"
                )
            self._mask = self._given
            return
        start = 0 if cache is None else int(cache.get_seq_length())
        if self._prompt is None:
            self._mask = start > 0 and length == 1
        elif start >= self._prompt:
            self._mask = True
        elif start + length <= self._prompt:
            self._mask = False
        else:
            self._mask = (torch.arange(start, start + length, device=tokens.device) >= self._prompt)[None]


class _Generate:
    """``model.generate``, followed. An object, not a closure, so that a deep copy of the model follows the copy."""

    def __init__(self, original: Any, positions: ResponsePositions) -> None:
        functools.update_wrapper(self, original)
        self._original, self._positions = original, positions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._positions.generating(_prompt_length(args, kwargs)):
            return self._original(*args, **kwargs)


def positions_of(model: torch.nn.Module, decoder: torch.nn.Module) -> ResponsePositions:
    """The one follower of a model, made on first use."""
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = model.__dict__[_ATTRIBUTE] = ResponsePositions(model, decoder)
    assert isinstance(found, ResponsePositions)
    return found


def find_positions(model: torch.nn.Module) -> ResponsePositions | None:
    """The follower of a model, or of the model inside wrappers of PEFT; None where nothing needed one."""
    for module in model.modules():
        found = module.__dict__.get(_ATTRIBUTE)
        if isinstance(found, ResponsePositions):
            return found
    return None


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of what ``generate`` was given, padding and what is in its cache included."""
    given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask")]
    if args:
        given.append(args[0])
    lengths = [tensor.shape[1] for tensor in given if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2]
    return max(lengths, default=1)  # with nothing given, generate begins with one token
