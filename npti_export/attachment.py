"""Attach a rule to a transformers model without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from npti_export.errors import AdapterError
from npti_export.positions import ResponsePositions, find_positions, positions_of
from npti_export.rule_io import SavedRule, load_rule
from npti_export.steer import LayerSteering, Share, Where

if TYPE_CHECKING:
    from npti_export.adapter.target import Target


def attach(
    model: torch.nn.Module,
    path: str | Path,
    strength: float = 1.0,
    *,
    where: Where = "all",
    any_model: bool = False,
) -> Attachment:
    """Steer a model from now on.

    ::

        attached = npti_export.attach(model, "calm/")        # until attached.detach()
        with npti_export.attach(model, "calm/", strength=0.5, where="response"):
            model.generate(...)                              # only in the block

    Several may be attached at once: clamps unite, shifts add.

    Args:
        model: a loaded transformers model, also one with PEFT adapters of other kinds.
        path: an adapter directory, a steered checkpoint directory or a steered GGUF, of the same base model.
        strength: multiplies the shifts; 0 is exactly the base.
        where: ``all`` positions, or those of the ``response`` only.
        any_model: accept the rule of another model of the same shape.

    Raises:
        AdapterError: no rule there, a damaged one, or one of another model.
        ArchitectureError: a model family that is not in the table.
    """
    from npti_export.adapter.config import NptiConfig, check_strength, check_where

    saved = load_rule(Path(path))
    layers, width = saved.rule.shift.shape
    about = None if any_model else saved.about.to_dict()
    config = NptiConfig(layers=layers, width=width, provenance=about)

    from npti_export.adapter.layer import NptiLayer
    from npti_export.adapter.target import find_target

    target = find_target(model, config)
    if any(isinstance(module, NptiLayer) for module in target.activations()):
        raise AdapterError("this model holds an npti adapter already: add the other one to it with load_adapter")
    return Attachment(target, saved, str(path), check_strength(strength), check_where(where))


@contextmanager
def response_mask(model: torch.nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Within the block, rules for the response only steer the positions of ``mask``: for scoring given answers.

    Args:
        model: with at least one adapter or attachment for the response only.
        mask: ``[batch, length]`` bool, as long as the passes in the block.

    Raises:
        AdapterError: nothing in the model steers the response only.
    """
    found = find_positions(model)
    if found is None:
        raise AdapterError(
            "response_mask: nothing in this model steers the response only; attach with where='response'"
        )
    with found.given(mask):
        yield


class Attachment:
    """A rule at work in a model; also a context manager that detaches at its end.

    Attributes:
        saved: the rule and its provenance.
        where: ``all`` or ``response``.
    """

    def __init__(self, target: Target, saved: SavedRule, name: str, strength: float, where: Any) -> None:
        self.saved, self.where = saved, where
        self._strength = strength
        self._positions = positions_of(target.model, target.decoder) if where == "response" else None
        if self._positions is not None:
            self._positions.retain()
        self._hooks: list[_LayerHook] = []
        self._entries: list[Share] = []
        for module, shift, clamp in zip(target.activations(), saved.rule.shift, saved.rule.clamp, strict=True):
            if shift.any() or clamp.any():
                hook = _LayerHook.of(module)
                vectors = torch.from_numpy(shift), torch.from_numpy(clamp.view("uint8"))
                hook.add(self, Share(name, *vectors, strength, where), self._positions)
                self._hooks.append(hook)

    @property
    def strength(self) -> float:
        """Multiplies the shifts; set it at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        from npti_export.adapter.config import check_strength

        self._strength = check_strength(value)
        for hook in self._hooks:
            hook.set_strength(self, self._strength)

    def detach(self) -> None:
        """The model is as before; a second call does nothing."""
        for hook in self._hooks:
            hook.remove(self)
        if self._hooks and self._positions is not None:
            self._positions.release()
        self._hooks = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class _LayerHook:
    """The one forward hook on an activation module, with the shares of all attachments."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}
        self._steering = LayerSteering()
        self._positions: ResponsePositions | None = None
        self._handle: Any = None

    @classmethod
    def of(cls, module: torch.nn.Module) -> _LayerHook:
        for hook in module._forward_hooks.values():
            if isinstance(hook, cls):
                return hook
        hook = cls()
        hook._handle = module.register_forward_hook(hook)
        return hook

    def add(self, owner: Attachment, share: Share, positions: ResponsePositions | None) -> None:
        self._shares[id(owner)] = share
        self._positions = positions or self._positions

    def set_strength(self, owner: Attachment, strength: float) -> None:
        share = self._shares[id(owner)]
        self._shares[id(owner)] = Share(share.name, share.shift, share.clamp, strength, share.where)

    def remove(self, owner: Attachment) -> None:
        del self._shares[id(owner)]
        if not self._shares:
            self._handle.remove()

    def __call__(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return self._steering(output, list(self._shares.values()), self._positions)
