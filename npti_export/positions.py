"""Which positions of a forward pass hold response tokens: what a rule for the response only steers."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from npti_export.errors import AdapterError

_ATTRIBUTE = "_npti_positions"


class _Pass(threading.local):
    """What is known of the passes of one thread: length of the prompt, a given mask, the mask of the pass under way."""

    prompt: int | None = None
    given: torch.Tensor | None = None
    mask: torch.Tensor | bool = False


class ResponsePositions:
    """Follows the forward passes of one model.

    A token belongs to the response if ``generate`` made it, that is, if it lies behind everything that ``generate`` was
    given (the published code steers just these: decoding steps, never the prompt). In a pass outside ``generate``, one
    token that continues a KV cache belongs to the response, several tokens are a prompt, and :meth:`given` says
    otherwise. Positions are places in the padded sequence, so batches padded on the left need no more than one number.

    Args:
        model: a transformers model; its ``generate`` is wrapped, which the last :meth:`release` undoes.
        decoder: the module whose ``forward`` takes ``past_key_values`` and runs the layers.
    """

    def __init__(self, model: torch.nn.Module, decoder: torch.nn.Module) -> None:
        self._model, self._decoder = model, decoder
        self._pass = _Pass()
        self._users = 0
        self._handles = (
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass, always_call=True),
        )
        model.__dict__["generate"] = _Generate(model, self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and saved models: everything but the pass under way."""
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pass=_Pass())

    def of(self, a: torch.Tensor) -> torch.Tensor | bool:
        """For an activation of the pass under way: whether its positions are the response's, or a mask of it.

        Args:
            a: ``[batch, length, width]``.

        Returns:
            The mask is ``[batch or 1, length]`` bool.

        Raises:
            AdapterError: the activation is not of the pass that was seen last.
        """
        mask = self._pass.mask
        if isinstance(mask, bool):
            return mask
        if a.ndim != 3 or mask.shape[-1] != a.shape[1]:
            raise AdapterError(
                f"steering the response only needs activations [batch, {mask.shape[-1]}, width], not {list(a.shape)}; "
                "this model packs its tokens, steer everywhere instead"
            )
        return mask.to(a.device)

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor | bool:
        """The same for some tokens ``[n]`` of the pass, numbered sequence by sequence, as experts get them."""
        mask = self._pass.mask
        if isinstance(mask, bool):
            return mask
        mask = mask.to(tokens.device)
        return mask[tokens // mask.shape[1] % len(mask), tokens % mask.shape[1]]

    @contextmanager
    def given(self, mask: torch.Tensor) -> Iterator[None]:
        """Within the block, passes steer the positions of ``mask`` ``[batch, length]`` bool."""
        before, self._pass.given = self._pass.given, mask.bool()
        try:
            yield
        finally:
            self._pass.given = before

    @contextmanager
    def generating(self, prompt: int) -> Iterator[None]:
        """Within the block, what lies behind ``prompt`` positions is the response."""
        before, self._pass.prompt = self._pass.prompt, prompt
        try:
            yield
        finally:
            self._pass.prompt = before

    def retain(self) -> None:
        """One more user needs this."""
        self._users += 1

    def release(self) -> None:
        """One user less needs this; with the last one, the model is as it was."""
        self._users -= 1
        if self._users:
            return
        for handle in self._handles:
            handle.remove()
        del self._model.__dict__[_ATTRIBUTE]
        wrapper = self._model.__dict__.get("generate")
        if isinstance(wrapper, _Generate):  # else somebody wrapped ours, which from now on only passes through
            wrapper.restore()

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        _refuse_untellable(module, kwargs)
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        self._pass.mask = self._mask(tokens, kwargs.get("past_key_values"))

    def _mask(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor | bool:
        rows, length = tokens.shape[:2]
        given, prompt = self._pass.given, self._pass.prompt
        if given is not None:
            if tuple(given.shape) != (rows, length):
                raise AdapterError(
                    f"the response mask is {list(given.shape)}, but the pass has {rows} sequences of {length} tokens; "
                    "give one value a token"
                )
            return given
        start = 0 if cache is None else int(cache.get_seq_length())
        if prompt is None:
            return start > 0 and length == 1
        if start >= prompt or start + length <= prompt:
            return start >= prompt
        return (torch.arange(start, start + length, device=tokens.device) >= prompt)[None]

    def _after_pass(self, *_: Any) -> None:
        self._pass.mask = False


class _Generate:
    """``model.generate``, followed. An object, not a closure, so that a deep copy of the model follows the copy."""

    def __init__(self, model: torch.nn.Module, positions: ResponsePositions) -> None:
        self._model, self._positions = model, positions
        self._patched = model.__dict__.get("generate")  # somebody else's wrapper

    @property
    def __wrapped__(self) -> Any:
        """What it wraps, for whoever asks for its signature."""
        kind: Any = type(self._model)
        return self._patched or functools.partial(kind.generate, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._positions.generating(_prompt_length(args, kwargs)):
            return self.__wrapped__(*args, **kwargs)

    def restore(self) -> None:
        """Give the model back what was there before."""
        if self._patched is None:
            del self._model.__dict__["generate"]
        else:
            self._model.__dict__["generate"] = self._patched


def positions_of(model: torch.nn.Module, decoder: torch.nn.Module) -> ResponsePositions:
    """The one follower of a model, made on first use."""
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = model.__dict__[_ATTRIBUTE] = ResponsePositions(model, decoder)
    assert isinstance(found, ResponsePositions)
    return found


def find_positions(model: torch.nn.Module) -> ResponsePositions | None:
    """The follower of a model, or of the model inside wrappers of PEFT; None where nothing needs one."""
    for module in model.modules():
        found = module.__dict__.get(_ATTRIBUTE)
        if isinstance(found, ResponsePositions):
            return found
    return None


def _refuse_untellable(decoder: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Passes of which it cannot be told what is prompt and what is response.

    Raises:
        AdapterError: continuous batching, or a backward pass that will run the layers again.
    """
    if kwargs.get("cache") is not None or kwargs.get("cu_seq_lens_q") is not None:
        raise AdapterError(
            "steering the response only does not work with continuous batching (generate_batch), which packs prompts "
            "and responses; use generate, or steer everywhere"
        )
    trains = decoder.training and torch.is_grad_enabled()
    if trains and any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        raise AdapterError(
            "steering the response only does not work with gradient checkpointing, which runs layers again after the "
            "pass; switch one of the two off"
        )


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of what ``generate`` was given, padding and what is in its cache included."""
    given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask")]
    if args:
        given.append(args[0])
    lengths = [tensor.shape[1] for tensor in given if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2]
    return max(lengths, default=1)  # with nothing given, generate begins with one token
