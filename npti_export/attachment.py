"""Attach a rule to a transformers model without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from npti_export.attached import AttachedActivation
from npti_export.down_input import DownInput
from npti_export.errors import AdapterError
from npti_export.positions import find_positions, positions_of
from npti_export.routing import routing_of
from npti_export.rule_io import SavedRule, Where, check_strength, check_where, load_rule
from npti_export.steer import Share

if TYPE_CHECKING:
    from npti_export.adapter.target import Target


def attach(
    model: torch.nn.Module,
    path: str | Path,
    strength: float = 1.0,
    *,
    where: Where | None = None,
    any_model: bool = False,
) -> Attachment:
    """Steer a model from now on.

    ::

        attached = npti_export.attach(model, "calm/")        # until attached.detach()
        with npti_export.attach(model, "calm/", strength=0.5, where="response"):
            model.generate(...)                              # only in the block

    Several may be attached at once: clamps unite, shifts and constants add.

    Args:
        model: a loaded transformers model, also one with PEFT adapters of other kinds.
        path: an adapter directory, a steered checkpoint directory or a steered GGUF, of the same base model.
        strength: multiplies shifts and constants; 0 is exactly the base.
        where: ``all`` positions, or those of the ``response`` only; None takes what the artifact says.
        any_model: accept the rule of another model of the same shape.

    Raises:
        AdapterError: no rule there, a damaged one, or one of another model.
        ArchitectureError: a model family that is not in the table.
    """
    check_strength(strength)
    saved = load_rule(Path(path))
    where = check_where(where or saved.where)
    layers, width = saved.rule.shift.shape

    from npti_export.adapter.config import NptiConfig
    from npti_export.adapter.layer import NptiLayer
    from npti_export.adapter.target import find_target

    about = None if any_model else saved.about.to_dict()
    target = find_target(
        model, NptiConfig(layers=layers, width=width, constant=bool(saved.rule.constants), provenance=about)
    )
    if any(isinstance(module, NptiLayer) for module in target.activations()):
        raise AdapterError("this model holds an npti adapter already: add the other one to it with load_adapter")
    return Attachment(target, saved, str(path), check_strength(strength), where)


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

    def __init__(self, target: Target, saved: SavedRule, name: str, strength: float, where: Where) -> None:
        self.saved, self.where = saved, where
        self._target, self._strength, self._attached = target, strength, True
        self._positions = positions_of(target.model, target.decoder) if where == "response" else None
        if self._positions is not None:
            self._positions.retain()
        self._wrappers: list[AttachedActivation] = []
        rule = saved.rule
        for layer, place in enumerate(target.names):
            constant = None if rule.constant is None or not rule.constant[layer].any() else rule.constant[layer]
            if rule.shift[layer].any() or rule.clamp[layer].any() or constant is not None:
                wrapper = _wrapper(target, place)
                vectors = torch.from_numpy(rule.shift[layer]), torch.from_numpy(rule.clamp[layer].view("uint8"))
                added = None if constant is None else torch.from_numpy(constant)
                wrapper.shares[self] = Share(name, *vectors, strength, where, added)
                wrapper.positions = self._positions or wrapper.positions
                if added is not None and wrapper.down is None:
                    wrapper.down = DownInput(_parent(target, place)[0], wrapper)
                self._wrappers.append(wrapper)

    @property
    def strength(self) -> float:
        """Multiplies the shifts; set it at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = check_strength(value)
        for wrapper in self._wrappers:
            wrapper.shares[self] = wrapper.shares[self]._replace(strength=self._strength)

    def detach(self) -> None:
        """The model is as before; a second call does nothing."""
        if not self._attached:
            return
        self._attached = False
        for wrapper in self._wrappers:
            del wrapper.shares[self]
        self._wrappers = []
        for place in self._target.names:
            parent, name = _parent(self._target, place)
            module = getattr(parent, name)
            if isinstance(module, AttachedActivation):
                if module.down is not None and all(share.constant is None for share in module.shares.values()):
                    module.down.remove()
                    module.down = None
                if not module.shares:
                    setattr(parent, name, module.base)
                    if module.npti_routing is not None:
                        module.npti_routing.release()
        if self._positions is not None:
            self._positions.release()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _wrapper(target: Target, place: str) -> AttachedActivation:
    parent, name = _parent(target, place)
    module = getattr(parent, name)
    if not isinstance(module, AttachedActivation):
        module = AttachedActivation(module).train(module.training)
        if target.mixture:
            module.npti_routing = routing_of(parent)
            module.npti_routing.retain()
        setattr(parent, name, module)
    return module


def _parent(target: Target, place: str) -> tuple[torch.nn.Module, str]:
    path, _, name = place.rpartition(".")
    return target.model.get_submodule(path), name
