"""A loaded model and its contexts: decoding batches of many sequences, and moving what the KV cache holds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from npti_export.errors import ModelError
from npti_export.runtimes.llamacpp.library import (
    interrupted_afterwards,
    interruptible,
    llama,
    log_tail,
    logged,
    usable_cores,
)
from npti_export.runtimes.llamacpp.taps import Tap

MAX_SEQUENCES = 256  # llama.cpp, LLAMA_MAX_SEQ
_LOGITS_BYTES = 96 << 20  # of one pass over several sequences; verification holds four of them
Sequenced = TypeVar("Sequenced")
_CELL_STEP = 256  # cells of a KV cache come in multiples


@dataclass(frozen=True)
class Settings:
    """Where and how llama.cpp computes.

    Attributes:
        threads: 0 takes every core that this process may use.
        gpu_layers: layers on the GPU, -1 for all; without effect in a build for the CPU.
        batch: tokens processed at once.
        context: cells of the KV cache, shared by all sequences; 0 takes as many as the work at hand needs.
    """

    threads: int = 0
    gpu_layers: int = -1
    batch: int = 512
    context: int = 0


class Model:
    """A model file, loaded (memory-mapped).

    Raises:
        ModelError: llama.cpp refuses it; its own words are given.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        lib = llama()
        parameters = lib.llama_model_default_params()
        on_gpu = settings.gpu_layers != 0 and lib.llama_supports_gpu_offload()
        parameters.n_gpu_layers = settings.gpu_layers if on_gpu else 0
        self.path, self.on_host = path, not on_gpu
        self._adapters: dict[Path, Any] = {}
        with logged():
            with interrupted_afterwards():
                self.pointer: Any = lib.llama_model_load_from_file(os.fsencode(path), parameters)
            if not self.pointer:
                raise ModelError(f"{path}: llama.cpp cannot load it: {log_tail()}")
        self.vocabulary: Any = lib.llama_model_get_vocab(self.pointer)
        self.vocabulary_size = int(lib.llama_vocab_n_tokens(self.vocabulary))
        self.trained_context = int(lib.llama_model_n_ctx_train(self.pointer))

    def close(self) -> None:
        """Free it, and the adapters with it."""
        if self.pointer:
            llama().llama_model_free(self.pointer)
            self.pointer = None
            self._adapters.clear()

    def adapter(self, path: Path) -> Any:
        """A LoRA file, loaded once; before a context is made, which reckons with those that there are (llama.h).

        Raises:
            ModelError: llama.cpp refuses it; its own words are given.
        """
        if path not in self._adapters:
            with logged():
                pointer = llama().llama_adapter_lora_init(self.pointer, os.fsencode(path))
                if not pointer:
                    raise ModelError(f"{path}: llama.cpp cannot load it for {self.path}: {log_tail()}")
            self._adapters[path] = pointer
        return self._adapters[path]


@dataclass(frozen=True)
class Row:
    """One token to decode.

    Attributes:
        token: its id.
        position: in its sequence.
        sequence: which one.
        wanted: whether its logits are; the last layer's neurons exist only for these.
    """

    token: int
    position: int
    sequence: int
    wanted: bool


class Context:
    """A KV cache of a model, and what decodes into it.

    Args:
        model: stays open for as long as this is.
        cells: tokens that the cache holds, over all sequences.
        sequences: how many there can be.
        settings: threads and batch.
        listens: whether nodes can be tapped, which costs a little even where none is.

    Raises:
        ModelError: llama.cpp cannot make it, for want of memory.
    """

    def __init__(self, model: Model, cells: int, sequences: int, settings: Settings, *, listens: bool) -> None:
        lib = llama()
        if sequences > MAX_SEQUENCES:
            raise ModelError(f"{sequences} sequences at once are more than llama.cpp's {MAX_SEQUENCES}")
        self.model, self.sequences = model, sequences
        self.cells = whole_cells(cells)
        self.tap = Tap(on_host=model.on_host)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = self.cells
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = self.batch = min(settings.batch, self.cells)
        parameters.n_threads = parameters.n_threads_batch = settings.threads or usable_cores()
        parameters.kv_unified = True  # rows keep the order of the batch
        parameters.swa_full = True  # a shared beginning is saved whole, whatever the sliding window
        parameters.no_perf = True
        # else a build for GPUs computes large batches there even with no layer on them, and nodes are not on the host
        parameters.op_offload = parameters.offload_kqv = not model.on_host
        if listens:
            parameters.cb_eval = self.tap.callback
        with logged():
            with interrupted_afterwards():
                self._pointer: Any = lib.llama_init_from_model(model.pointer, parameters)
            if not self._pointer:
                raise ModelError(f"{model.path}: llama.cpp cannot make room for {self.cells} tokens: {log_tail()}")
        self._memory = lib.llama_get_memory(self._pointer)
        self._ids = np.arange(sequences, dtype=np.int32)  # where batches point for the sequences of a row

    def close(self) -> None:
        """Free it."""
        if self._pointer:
            llama().llama_free(self._pointer)
            self._pointer = None

    def decode(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """Run the model over tokens, in pieces of at most ``batch``.

        Returns:
            ``[wanted rows, vocabulary]`` float32 logits in the order of the rows, good until the next call.

        Raises:
            ModelError: llama.cpp fails, for example because the cache is full.
        """
        pieces = [self._decode(rows[start : start + self.batch]) for start in range(0, len(rows), self.batch)]
        kept = [piece for piece in pieces if len(piece)]
        return kept[0] if len(kept) == 1 else np.concatenate(kept or pieces or [self._none()])

    def _decode(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        columns = zip(*((row.token, row.position, row.sequence, row.wanted) for row in rows), strict=True)
        tokens, positions, sequences, wanted = (np.array(column, np.int32) for column in columns)
        logits = self.decode_piece(tokens, positions, sequences, np.ones(len(rows), np.int32), wanted)
        return logits if len(rows) < self.batch else logits.copy()  # a full piece may be followed by another

    def decode_piece(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        first: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run the model over at most ``batch`` tokens, each of which may belong to several sequences.

        Args:
            tokens: ``[rows]`` ids.
            positions: ``[rows]`` in their sequences.
            first: ``[rows]`` the first sequence that a row belongs to.
            counts: ``[rows]`` to how many it does, from the first one on.
            wanted: ``[rows]`` 1 where logits are.

        Returns:
            ``[wanted rows, vocabulary]`` float32 logits in llama.cpp's own memory, good until the next call.

        Raises:
            ModelError: llama.cpp fails, for example because the cache is full.
        """
        lib, flags = llama(), wanted.astype(np.int8)
        places = self._ids.ctypes.data + self._ids.itemsize * first.astype(np.uintp)
        batch = lib.llama_batch(
            len(tokens),
            _as(tokens, lib.llama_token),
            None,
            _as(positions, lib.llama_pos),
            _as(counts, ctypes.c_int32),
            _as(places, ctypes.POINTER(lib.llama_seq_id)),
            _as(flags, ctypes.c_int8),
        )
        with logged():
            with interruptible(self.tap.stop):
                failed = lib.llama_decode(self._pointer, batch)
            self.tap.raise_error()
            if failed:
                what = "the KV cache is full" if failed == 1 else log_tail()
                raise ModelError(f"{self.model.path}: llama.cpp cannot compute: {what}")
        count, size = int(flags.sum(dtype=np.int64)), self.model.vocabulary_size
        if not count:
            return self._none()
        address = ctypes.cast(lib.llama_get_logits(self._pointer), ctypes.c_void_p).value
        assert address is not None
        flat = (ctypes.c_float * (count * size)).from_address(address)
        return np.ctypeslib.as_array(flat).reshape(count, size)

    def _none(self) -> npt.NDArray[np.float32]:
        return np.empty((0, self.model.vocabulary_size), np.float32)

    def clear(self) -> None:
        """Forget all sequences."""
        llama().llama_memory_clear(self._memory, False)

    def forget(self, sequence: int, start: int = 0) -> None:
        """Forget what a sequence holds from the position ``start`` on."""
        llama().llama_memory_seq_rm(self._memory, sequence, start, -1)

    def share(self, sequence: int, other: int, length: int = -1) -> None:
        """Let an empty sequence begin with the first ``length`` tokens of another one (-1: all); takes no cells."""
        llama().llama_memory_seq_cp(self._memory, sequence, other, 0, length)

    def save(self, sequence: int) -> bytes:
        """What the cache holds of a sequence."""
        lib = llama()
        size = lib.llama_state_seq_get_size(self._pointer, sequence)
        data = (ctypes.c_uint8 * size)()
        written = lib.llama_state_seq_get_data(self._pointer, data, size, sequence)
        return bytes(memoryview(data)[:written])

    def load(self, saved: bytes, sequence: int) -> None:
        """Let an empty sequence hold what :meth:`save` gave, of this context or another one of the same model.

        Raises:
            ModelError: the cache has no room for it.
        """
        lib = llama()
        data = (ctypes.c_uint8 * len(saved)).from_buffer_copy(saved)
        if not lib.llama_state_seq_set_data(self._pointer, data, len(saved), sequence):
            raise ModelError(f"{self.model.path}: llama.cpp cannot restore a shared beginning: {log_tail()}")

    def set_control_vector(self, directions: npt.NDArray[np.float32]) -> None:
        """Add ``directions`` ``[layers - 1, hidden]`` to the residual stream, from the second layer on.

        Raises:
            ModelError: llama.cpp does not take it.
        """
        lib = llama()
        values = np.ascontiguousarray(directions, np.float32)
        layers, hidden = values.shape
        if lib.llama_set_adapter_cvec(self._pointer, _as(values, ctypes.c_float), values.size, hidden, 1, layers):
            raise ModelError(f"{self.model.path}: llama.cpp does not take the control vector: {log_tail()}")

    def set_adapters(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Apply LoRA adapters of the model, each with its scale, and no others.

        Raises:
            ModelError: llama.cpp does not take them.
        """
        lib, count = llama(), len(adapters)
        pointers = (lib.llama_adapter_lora_p_ctypes * count)(*(pointer for pointer, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        if lib.llama_set_adapters_lora(self._pointer, pointers, count, scales):
            raise ModelError(f"{self.model.path}: llama.cpp does not take the adapters: {log_tail()}")


def whole_cells(cells: int) -> int:
    """The size of a KV cache that holds so many tokens."""
    return -(-cells // _CELL_STEP) * _CELL_STEP


def _as(values: npt.NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))


def chunks(
    some: Sequence[Sequenced], length: Callable[[Sequenced], int], vocabulary: int, context: int
) -> Iterator[list[Sequenced]]:
    """Sequences that are run together, as many as keep their logits small and fit into a ``--context`` (0: none).

    Args:
        some: sequences, or what has them.
        length: tokens of each.
        vocabulary: logits a token.
        context: cells of the KV cache, 0 for no limit.
    """
    most = _LOGITS_BYTES // (4 * vocabulary)
    most = min(most, context) if context else most
    chunk: list[Sequenced] = []
    for one in some:
        if chunk and (sum(map(length, chunk)) + length(one) > most or len(chunk) == MAX_SEQUENCES):
            yield chunk
            chunk = []
        chunk.append(one)
    if chunk:
        yield chunk
