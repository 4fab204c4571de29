"""The rule on a running torch model: the plain reference, and the arithmetic of attached adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from npti_export.errors import AdapterError
from npti_export.routing import ExpertRows, routing_for
from npti_export.rule import SteeringRule
from npti_export.rule_io import Where

if TYPE_CHECKING:
    from npti_export.positions import ResponsePositions

_SELECT_ABOVE = 1 << 15  # elements of an activation from which on a CPU picks the few neurons that change
NOT_LOADED = 255  # a clamp vector of an adapter whose weights have not come yet


@contextmanager
def steered(
    activations: Sequence[torch.nn.Module],
    rule: SteeringRule,
    down_projections: Sequence[torch.nn.Module] | None = None,
) -> Iterator[None]:
    """Within the block, each activation module returns ``where(clamp, min(a, 0), a) + shift``.

    And each down projection gets ``constant`` added to its input. This is the definition that every output is measured
    against.

    Args:
        activations: one module a layer, whose output is the gate activation ``[…, width]``; in a mixture of experts
            it was told of its :class:`npti_export.routing.ExpertRouting`.
        rule: of the same sizes.
        down_projections: one module a layer, whose input is ``a ⊙ up`` ``[…, width]``; needed for constants.

    Sums are computed in float32 and rounded once to the dtype of what they are added to.

    Raises:
        AdapterError: the rule has constants, and there are no down projections.
    """
    if rule.constants and down_projections is None:
        raise AdapterError("the rule has constants, which belong at down projections; give these modules, too")
    with ExitStack() as stack:
        for module, constant in zip(
            down_projections or (), () if rule.constant is None else rule.constant, strict=False
        ):
            if constant.any():
                stack.callback(module.register_forward_pre_hook(_Constant(constant)).remove)
        for module, shift, clamp in zip(activations, rule.shift, rule.clamp, strict=True):
            if shift.any() or clamp.any():
                routing = routing_for(module)
                if routing is not None:
                    stack.enter_context(routing.listening())
                stack.callback(module.register_forward_hook(_Rule(shift, clamp)).remove)
        yield


class _Rule:
    """A forward hook with one layer's vectors, kept on the device where it is used."""

    def __init__(self, shift: npt.NDArray[np.float32], clamp: npt.NDArray[np.bool_]) -> None:
        # min(a, limit): 0 for clamped neurons, no limit for the others
        self.limit = torch.from_numpy(np.where(clamp, np.float32(0), np.float32(np.inf)))
        self.shift = torch.from_numpy(shift)

    def __call__(self, module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self.limit.device != output.device:
            self.limit, self.shift = self.limit.to(output.device), self.shift.to(output.device)
        routing = routing_for(module)
        neurons = slice(None) if routing is None else routing.rows_of(output).neurons
        return (output.float().minimum(self.limit[neurons]) + self.shift[neurons]).to(output.dtype)


class _Constant:
    """A forward pre-hook with one layer's constant ``[width]``."""

    def __init__(self, constant: npt.NDArray[np.float32]) -> None:
        self.constant = torch.from_numpy(constant)

    def __call__(self, _module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        return ((x.float() + self.constant.to(x.device)).to(x.dtype), *inputs[1:])


class Share(NamedTuple):
    """One adapter's part in one layer.

    Attributes:
        name: of the adapter, for messages.
        shift: ``[width]`` float32.
        clamp: ``[width]`` uint8, 1 for a clamped neuron.
        strength: multiplies shift and constant; at 0 the clamp is off, too.
        where: ``all`` positions or only those of the ``response``.
        constant: ``[width]`` float32, for :mod:`npti_export.down_input`; None where nothing is added there.
    """

    name: str
    shift: torch.Tensor
    clamp: torch.Tensor
    strength: float
    where: Where
    constant: torch.Tensor | None = None


@dataclass(frozen=True)
class _Vectors:
    """What several shares add up to: clamps unite, shifts add."""

    limit: torch.Tensor  # [width], of the activation's dtype: 0 where clamped, else infinity
    shift: torch.Tensor  # [width] float32
    places: torch.Tensor | None  # of the neurons that change, where picking them out pays
    limit_there: torch.Tensor
    shift_there: torch.Tensor


class LayerSteering:
    """Applies shares to the activation of one layer.

    What the shares add up to is computed once and kept for as long as they, their values, the device and the dtype
    stay the same, which leaves two operations a layer and token. An edit through ``tensor.data`` in place is the one
    change that torch does not tell anybody of: it takes effect with the next change that is noticed.
    """

    def __init__(self) -> None:
        # The shares are kept with what they add up to, so that no other tensor can get the identity of one of theirs.
        self._kept: dict[bool, tuple[list[Any], _Vectors | None, Sequence[Share]]] = {}
        self._checked: tuple[list[Any], Sequence[Share]] = ([], ())

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a model that was saved whole, starts anew."""
        return LayerSteering, ()

    def __call__(
        self, a: torch.Tensor, shares: Sequence[Share], positions: ResponsePositions | None = None
    ) -> torch.Tensor:
        """The steered activation.

        Args:
            a: ``[…, width]``, or ``[batch, length, width]`` where positions matter.
            shares: those that are active, or also some of strength 0.
            positions: which positions hold response tokens; needed where a share is for these only.

        Raises:
            AdapterError: a share's vectors were never loaded, or hold values that are not finite.
        """
        everywhere = shares
        for share in shares:
            if share.where != "all":
                everywhere = [one for one in shares if one.where == "all"]
                break
        else:
            return self._apply(a, shares, False)
        response = False if positions is None else positions.of(a)
        if isinstance(response, torch.Tensor):
            return torch.where(response[..., None], self._apply(a, shares, True), self._apply(a, everywhere, False))
        return self._apply(a, shares, True) if response else self._apply(a, everywhere, False)

    def of_expert(
        self, a: torch.Tensor, shares: Sequence[Share], rows: ExpertRows, positions: ResponsePositions | None = None
    ) -> torch.Tensor:
        """The same of one expert's activation ``[rows, neurons of the expert]``; nothing is kept between calls."""
        self._check_loaded(shares)
        cut = [one._replace(shift=one.shift[rows.neurons], clamp=one.clamp[rows.neurons]) for one in shares]
        everywhere = [one for one in cut if one.where == "all"]
        if len(everywhere) == len(cut):
            return _apply_plainly(a, cut)
        response = False if positions is None else positions.of_tokens(rows.tokens)
        if isinstance(response, torch.Tensor):
            return torch.where(response[:, None], _apply_plainly(a, cut), _apply_plainly(a, everywhere))
        return _apply_plainly(a, cut if response else everywhere)

    def _apply(self, a: torch.Tensor, shares: Sequence[Share], in_response: bool) -> torch.Tensor:
        # This runs for each layer and token: plain loops, and nothing that can wait.
        if torch.compiler.is_compiling():
            return _apply_plainly(a, shares)
        key: list[Any] = [a.device, a.dtype]
        for _, shift, clamp, strength, *_ in shares:
            if shift.requires_grad or shift.is_inference():  # needs its gradient, or does not count its changes
                self._check_loaded(shares)
                return _apply_plainly(a, shares)
            key += (id(shift), shift._version, shift.data_ptr(), id(clamp), clamp._version, clamp.data_ptr(), strength)
        kept = self._kept.get(in_response)
        if kept is None or kept[0] != key:
            kept = self._kept[in_response] = (key, _combine(a, shares), shares)
        vectors = kept[1]
        if vectors is None:
            return a
        # In place: minimum() made a tensor that nobody else has. The sum is computed in float32 and rounded once.
        if vectors.places is not None and a.numel() > _SELECT_ABOVE:
            chosen = a.index_select(-1, vectors.places)
            return a.index_copy(
                -1, vectors.places, torch.minimum(chosen, vectors.limit_there).add_(vectors.shift_there)
            )
        return torch.minimum(a, vectors.limit).add_(vectors.shift)

    def _check_loaded(self, shares: Sequence[Share]) -> None:
        state = [(id(share.clamp), share.clamp.data_ptr(), share.strength) for share in shares]
        if state != self._checked[0]:
            _refuse_unloaded(shares)
            self._checked = (state, shares)


def _apply_plainly(a: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    """The same without keeping anything: for gradients, and for compilers, which fuse it."""
    active = [share for share in shares if share.strength]
    if not active:
        return a
    clamp = torch.stack([share.clamp for share in active]).amax(0).to(a.device) != 0
    shift = torch.stack([share.shift * share.strength for share in active]).sum(0).to(a.device)
    return (torch.where(clamp, a.clamp(max=0), a).float() + shift).to(a.dtype)


def _refuse_unloaded(shares: Sequence[Share]) -> None:
    for share in shares:
        if bool((share.clamp == NOT_LOADED).any()) or not bool(torch.isfinite(share.shift).all()):
            raise AdapterError(
                f"adapter {share.name!r}: its vectors were not loaded, or are not finite; load it with its weights "
                "(load_adapter) and check its adapter_model.safetensors"
            )


def _combine(a: torch.Tensor, shares: Sequence[Share]) -> _Vectors | None:
    active = [share for share in shares if share.strength]
    if not active:
        return None
    _refuse_unloaded(active)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may meet a pass with gradients later
        shift = torch.stack([share.shift.float() * share.strength for share in active]).sum(0).to(a.device)
        clamp = torch.stack([share.clamp for share in active]).amax(0).to(a.device) != 0
        if not (bool(shift.any()) or bool(clamp.any())):
            return None
        limit = torch.full(shift.shape, torch.inf, dtype=a.dtype, device=a.device).masked_fill_(clamp, 0)
        there = torch.nonzero(clamp | (shift != 0))[:, 0]
        pays = a.device.type == "cpu" and 8 * len(there) < len(shift)  # elsewhere two kernels are cheaper than four
    return _Vectors(limit, shift, there if pays else None, limit[there], shift[there])
