"""How far a steered model's predictions are from its base's on text that has nothing to do with any trait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npti_export.errors import EvaluationError
from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.capability.tasks import Passage

KEPT_BYTES = 512 << 20  # of the base's log-probabilities, for measuring several steered models
_PIECE_BYTES = 16 << 20  # of float64 at once


class NeutralText:
    """Passages with what the base predicts in them, to measure any number of steered models.

    The base's log-probabilities are kept in float16 (its 11 bits leave an error of 5e-4 of a log-probability, largest
    where the probability is least; measured on the default model, a KL of 0.15 changes by 2e-5 at most) up to
    ``kept_bytes``; passages beyond that are computed again for each steered model. Nothing else is held, whatever the
    number of passages.

    Args:
        base: the unsteered model; stays open where passages do not fit.
        passages: each is read from its beginning, without a chat template.
        kept_bytes: 0 keeps nothing, and is exact.
    """

    def __init__(self, base: Model, passages: Sequence[Passage], *, kept_bytes: int = KEPT_BYTES) -> None:
        self._base, self._limit, self._left = base, kept_bytes, kept_bytes
        self.tokens = [base.encode_text(passage.text) for passage in passages]
        self._kept: list[npt.NDArray[np.float16] | None] = [None] * len(self.tokens)

    def keep(self) -> None:
        """Compute what the base predicts now, all of it: before the same model is steered, say.

        Raises:
            EvaluationError: it takes more than ``kept_bytes``, and what is not kept would come from the steered model.
        """
        for index in range(len(self.tokens)):
            self._predicted(index)
            if self._kept[index] is None:
                raise EvaluationError(
                    f"what the unsteered model predicts on neutral text takes over {self._limit >> 20} MiB, and it "
                    "cannot be asked again while it is steered; evaluate a steered GGUF or checkpoint instead"
                )

    def kl(self, steered: Model) -> npt.NDArray[np.float64]:
        """``[passages]`` KL(base ‖ steered) in nats, the mean over a passage's tokens of the next token's.

        Raises:
            EvaluationError: another vocabulary, or logits that are not numbers.
        """
        return np.array([self._kl_of(index, steered) for index in range(len(self.tokens))])

    def _kl_of(self, index: int, steered: Model) -> float:
        others = steered.logits(self.tokens[index])
        ours = self._predicted(index)
        if ours.shape != others.shape:
            raise EvaluationError(
                f"the steered model predicts {others.shape[1]} tokens and its base {ours.shape[1]}; "
                "it is another model's"
            )
        result = float(np.concatenate([kl_rows(*pair) for pair in zip(_cut(ours), _cut(others), strict=True)]).mean())
        if not np.isfinite(result):
            raise EvaluationError("a model computes logits that are not numbers; get the file again")
        return result

    def _predicted(self, index: int) -> npt.NDArray[np.floating]:
        kept = self._kept[index]
        if kept is None:
            logits = self._base.logits(self.tokens[index])
            if 2 * logits.size > self._left:
                return logits
            kept = np.concatenate([log_softmax(piece).astype(np.float16) for piece in _cut(logits)])
            self._kept[index], self._left = kept, self._left - kept.nbytes
        return kept


def kl_by_passage(base: Model, steered: Model, passages: Sequence[Passage]) -> npt.NDArray[np.float64]:
    """``[passages]`` KL(base ‖ steered), see :meth:`NeutralText.kl`; exact, one passage at a time."""
    return NeutralText(base, passages, kept_bytes=0).kl(steered)


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Of each row of ``[rows, vocabulary]``, in float64."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def kl_rows(ours: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """``[rows]`` KL(ours ‖ others) in nats of two ``[rows, vocabulary]`` of logits or log-probabilities.

    ``Σ p (a - b) - (log Σ e^a - log Σ e^b)`` with ``p`` from ``a``: the two terms are of the size of the change, so
    exponentials of float32 logits may be float32; sums are float64.
    """
    kind = np.result_type(ours, others, np.float32)
    ours, others = ours.astype(kind, copy=False), others.astype(kind, copy=False)
    powers, ours_log = _powers(ours)
    change = ours - others
    change *= powers
    mean: npt.NDArray[np.float64] = change.sum(1, dtype=np.float64) / powers.sum(1, dtype=np.float64)
    return mean - (ours_log - _powers(others)[1])


def _powers(logits: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.float64]]:
    """``e^(a - max a)`` of each row, and ``log Σ e^a``."""
    most = logits.max(1, keepdims=True)
    powers = logits - most
    np.exp(powers, out=powers)
    return powers, most[:, 0] + np.log(powers.sum(1, dtype=np.float64))


def _cut(rows: npt.NDArray[np.floating]) -> list[npt.NDArray[np.floating]]:
    step = max(1, _PIECE_BYTES // (8 * rows.shape[1]))
    return [rows[start : start + step] for start in range(0, len(rows), step)]
