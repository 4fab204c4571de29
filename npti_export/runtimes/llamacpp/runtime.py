"""A GGUF in stock llama.cpp: the runtime of people who have no GPU and no float checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.architectures import FFN_DOWN, FFN_GATE, GGUFFamily
from npti_export.errors import ModelError
from npti_export.gguf.experts import Experts, experts_of
from npti_export.gguf.shards import read_model
from npti_export.gguf.weights import read_matrix
from npti_export.models import ModelSource
from npti_export.runtimes.base import Exchange, Message
from npti_export.runtimes.llamacpp.chat import Chat
from npti_export.runtimes.llamacpp.context import MAX_SEQUENCES, Context, Model, Row, Settings, chunks, whole_cells
from npti_export.runtimes.llamacpp.counting import GateCounter
from npti_export.runtimes.llamacpp.decoding import Beginnings, Choose, Decoder, Savings, Watch
from npti_export.runtimes.llamacpp.experts import ExpertCounter, ExpertNodes, SeeExperts
from npti_export.runtimes.llamacpp.last import last_logits
from npti_export.runtimes.llamacpp.likelihood import log_likelihoods, plan
from npti_export.runtimes.llamacpp.streams import StreamFollower, StreamMeans
from npti_export.runtimes.llamacpp.taps import See
from npti_export.stats import ActivationStats, AnswerCounts

_ROOM_STEP = 64  # tokens: answers of about the same length go on in the same context
SeeMLP = Callable[[int, npt.NDArray[np.float32], npt.NDArray[np.float32]], bool]
SeeStream = Callable[[int, npt.NDArray[np.float32]], None]
_STREAM = "ffn_inp"  # what an MLP adds to, in every family that files are baked for (src/models/)


class LlamaCppRuntime:
    """Implements :class:`npti_export.runtimes.base.Runtime`, run the way a user would run the file: default kernels and
    KV cache.

    Args:
        path: the GGUF.
        settings: threads, GPU layers, batch, context.
        sequences: most sequences decoded together.
        source: what the file is, or its base if it is steered; needed where its neurons are looked at.
        control_vector: ``[layers - 1, hidden]``, added to the residual stream from the second layer on.
        listens: whether neurons can be looked at; a plain program would not ask, which is a little faster.

    Raises:
        ModelError: llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings | None = None,
        *,
        sequences: int = 1,
        source: ModelSource | None = None,
        control_vector: npt.NDArray[np.float32] | None = None,
        listens: bool = True,
    ) -> None:
        self._control_vector, self._listens = control_vector, listens
        self.settings, self.source, self._sequences = settings or Settings(), source, min(sequences, MAX_SEQUENCES)
        self.model = Model(path, self.settings)
        self.chat = Chat(self.model)
        self.uses_fallback_template = self.chat.uses_fallback
        self._beginnings = Beginnings()
        self._context: Context | None = None
        self._gate_names: list[bytes] | None = None
        self._adapters: list[tuple[Any, float]] = []

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._forget_context()
        self.model.close()

    def apply(self, adapters: Mapping[Path, float]) -> None:
        """Apply these LoRA files at these scales from now on, and no others; one at scale 0 is not even loaded.

        Raises:
            ModelError: llama.cpp refuses one.
        """
        self._forget_context()
        self._beginnings = Beginnings()  # computed with other adapters
        self._adapters = [(self.model.adapter(path), scale) for path, scale in adapters.items() if scale]

    def _forget_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        return self.chat.encode(messages)

    def encode_text(self, text: str, *, begin: bool = True) -> tuple[int, ...]:
        """Token ids of plain text; ``begin`` puts what the model wants at the beginning of a text in front."""
        return self.chat.tokenize(text, special=begin, spelt_out=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        return self.chat.decode(tokens)

    @property
    def savings(self) -> Savings:
        """What shared beginnings saved so far."""
        return self._beginnings.savings

    def set_control_vector(self, directions: npt.NDArray[np.float32]) -> None:
        """Another control vector ``[layers - 1, hidden]`` from now on, for a runtime that was opened with one."""
        assert self._control_vector is not None
        self._control_vector = directions
        if self._context is not None:
            self._context.set_control_vector(directions)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        repetition_penalty: float,
        samplers: Sequence[Choose] | None = None,
    ) -> list[Exchange]:
        """See :class:`npti_export.runtimes.base.Runtime`; ``samplers`` pick each prompt's tokens, if given."""
        return self._decoder(prompts, max_new_tokens, repetition_penalty, samplers=samplers).run(prompts)

    def observe(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[int],
        *,
        max_new_tokens: int,
        repetition_penalty: float,
        shared: Sequence[int] | None = None,
    ) -> tuple[list[ActivationStats], AnswerCounts]:
        """See :class:`npti_export.runtimes.base.Runtime`: counted while decoding, which saves the second pass."""
        counter = self._counter(max(groups) + 1, len(prompts))
        tap, gates = self.context(*self._room(prompts, max_new_tokens)).tap, self._gates(counter)

        def watch(rows: Sequence[int]) -> None:
            tap.nodes = gates if rows else {}
            if rows:
                counter.begin(rows, [groups[row] for row in rows])

        decoder = self._decoder(prompts, max_new_tokens, repetition_penalty, watch)
        try:
            decoder.run(prompts, shared, lambda index: groups[index])
        finally:
            tap.nodes = {}
        return counter.results(), counter.counts()

    def activation_stats(self, exchanges: Sequence[Exchange]) -> ActivationStats:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        counter = self._counter(1, len(exchanges))
        gates = self._gates(counter)
        context = self.context(max((len(exchange.tokens) for exchange in exchanges), default=1), 1)
        for index, exchange in enumerate(exchanges):
            context.clear()
            fed = exchange.tokens[:-1]
            rows = [Row(token, at, 0, at >= len(exchange.prompt)) for at, token in enumerate(fed)]
            try:
                context.decode(rows[: len(exchange.prompt)])
                for start in range(len(exchange.prompt), len(rows), context.batch):
                    piece = rows[start : start + context.batch]
                    counter.begin([index] * len(piece), [0] * len(piece))
                    context.tap.nodes = gates
                    context.decode(piece)
            finally:
                context.tap.nodes = {}
        return counter.results()[0]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """``[tokens, vocabulary]`` next-token logits at every position, from an empty cache."""
        context = self.context(len(tokens), 1)
        context.clear()
        logits = context.decode([Row(token, at, 0, True) for at, token in enumerate(tokens)])
        return logits.copy()

    def log_likelihoods(self, exchanges: Sequence[Exchange]) -> list[float]:
        """See :class:`npti_export.runtimes.base.Runtime`; those that begin alike share the work: hand over all at once.

        Raises:
            ModelError: an exchange lacks its prompt or its response, or llama.cpp fails.
        """
        if any(not exchange.prompt or not exchange.response for exchange in exchanges):
            raise ModelError("a likelihood is asked for where there is no prompt or no response")
        if not exchanges:
            return []
        longest = max(len(exchange.tokens) - 1 for exchange in exchanges)
        context = self.context(max(longest, self.settings.batch), 2)  # says so where --context is too small
        loads = plan(exchanges, context.batch, self.settings.context)
        cells, sequences = max(load.cells for load in loads), max(len(load.members) for load in loads)
        return log_likelihoods(self.context(max(cells, context.batch), sequences + 1), exchanges, loads)

    def stream_means(
        self, exchanges: Sequence[Exchange], added: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        shape = self._source.shape
        means = StreamMeans(shape.layers, shape.hidden, self._family.mlp_output, added)
        for chunk in chunks(exchanges, lambda one: len(one.tokens), self.model.vocabulary_size, self.settings.context):
            self._decode_all(means.begin(chunk), means.nodes)
        return means.result()

    def stream_follows(self, exchanges: Sequence[Exchange], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        follower = StreamFollower(wanted)
        for chunk in chunks(exchanges, lambda one: len(one.tokens), self.model.vocabulary_size, self.settings.batch):
            fed = follower.begin(chunk)
            self._decode_all(fed, follower.looking)
            while follower.again():
                self._decode_all(fed, follower.moving)
        return follower.result()

    def down_weight(self, layer: int) -> npt.NDArray[np.float32]:
        """See :class:`npti_export.runtimes.base.Runtime`."""
        return read_matrix(read_model(self.model.path), f"{FFN_DOWN.format(layer)}.weight")

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """See :class:`npti_export.runtimes.base.Runtime`; what all prompts begin with is computed once."""
        return last_logits(self.context, self.settings.context, prompts)

    def run(
        self, sequences: Sequence[Sequence[int]], see: SeeMLP, see_stream: SeeStream | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits ``[tokens, vocabulary]`` of several sequences, one behind the other, with a hand on every MLP.

        Args:
            sequences: token ids.
            see: gets layer, input ``[rows, hidden]`` and output ``[rows, hidden]`` of each MLP, and says whether it
                changed the output in place.
            see_stream: gets layer and residual stream ``[rows, hidden]`` before each MLP adds to it.
        """
        assert see_stream is None or self._family.mlp_input != _STREAM
        nodes = self._mlps(see)
        if see_stream is not None:
            nodes |= {f"{_STREAM}-{layer}".encode(): partial(_shown, see_stream, layer) for layer in self._layers}
        return self._decode_all(sequences, nodes)

    def run_experts(self, sequences: Sequence[Sequence[int]], see: SeeExperts) -> npt.NDArray[np.float32]:
        """The same for a mixture of experts, with a hand on what enters the experts' down projections.

        Args:
            sequences: token ids.
            see: gets the layer and an :class:`npti_export.runtimes.llamacpp.experts.ExpertPass`, and says whether it
                changed its ``product`` in place.
        """
        return self._decode_all(sequences, ExpertNodes(self._source.shape.layers, self._experts, see).nodes)

    def _decode_all(self, sequences: Sequence[Sequence[int]], nodes: dict[bytes, See]) -> npt.NDArray[np.float32]:
        rows = [Row(token, at, number, True) for number, one in enumerate(sequences) for at, token in enumerate(one)]
        context = self.context(len(rows), len(sequences))
        context.clear()
        context.tap.nodes = nodes
        try:
            return context.decode(rows).copy()
        finally:
            context.tap.nodes = {}

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int, repetition_penalty: float) -> str:
        """A greedy answer through the chat template inside the file."""
        prompts = [self.encode(messages)]
        (exchange,) = self.generate(prompts, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
        return self.decode(exchange.response)

    def context(self, cells: int, sequences: int) -> Context:
        """A context with just so much room; the one at hand, if that is what it has.

        Where the cache's end is decides which cells a token gets, and with them the order of sums: in a larger one that
        is left from other work the same work would come out a little different.

        Raises:
            ModelError: the user's ``--context`` is smaller.
        """
        limit = self.settings.context
        if limit and cells > limit:
            raise ModelError(
                f"--context {limit} is too small: a prompt and its answer take {cells} tokens; raise it or leave it out"
            )
        held = self._context
        if held is None or (held.cells, held.sequences) != (whole_cells(limit or cells), sequences):
            if held is not None:
                held.close()
            self._context = None
            self._context = Context(self.model, limit or cells, sequences, self.settings, listens=self._listens)
            if self._control_vector is not None:
                self._context.set_control_vector(self._control_vector)
            if self._adapters:
                self._context.set_adapters(self._adapters)
        assert self._context is not None
        return self._context

    @property
    def _layers(self) -> range:
        return range(self._source.shape.layers)

    @property
    def _family(self) -> GGUFFamily:
        assert self._source.family is not None
        return self._source.family

    @property
    def _source(self) -> ModelSource:
        assert self.source is not None, "a runtime for looking at neurons is opened with its source"
        return self.source

    def _room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[int, int]:
        """Cells and sequences that answering takes."""
        longest = max(map(len, prompts)) + max_new_tokens
        limit = self.settings.context
        fitting = limit // longest if limit else self._sequences
        sequences = max(1, min(self._sequences, len(prompts), fitting))
        step = 1 if limit else _ROOM_STEP
        return sequences * -(-longest // step) * step, sequences

    def _decoder(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        penalty: float,
        watch: Watch | None = None,
        samplers: Sequence[Choose] | None = None,
    ) -> Decoder:
        cells, sequences = self._room(prompts, max_new_tokens)
        return Decoder(
            self.context(cells, sequences),
            self.chat.is_end,
            self._beginnings,
            sequences=sequences,
            penalty=penalty,
            max_new_tokens=max_new_tokens,
            watch=watch,
            samplers=samplers,
        )

    def _counter(self, groups: int, answers: int) -> GateCounter | ExpertCounter:
        shape = self._source.shape
        kind = ExpertCounter if self._family.mixture else GateCounter
        return kind(shape, self._source.activation, groups, answers, self.model.path)

    def _gates(self, counter: GateCounter | ExpertCounter) -> dict[bytes, See]:
        if isinstance(counter, ExpertCounter):
            return counter.nodes(self._experts)
        if self._gate_names is None:
            family, tensors = self._family, read_model(self.model.path).by_name
            biased = (f"{FFN_GATE.format(layer)}.bias" in tensors for layer in range(self._source.shape.layers))
            self._gate_names = [f"{family.gate}{'_b' * has}-{layer}".encode() for layer, has in enumerate(biased)]
        width = self._source.shape.width if self._family.fused else None
        nodes = {name: counter.see(layer, width) for layer, name in enumerate(self._gate_names)}
        return nodes | {f"{self._family.product}-{at}".encode(): counter.see_product(at) for at in self._layers}

    @cached_property
    def _experts(self) -> Experts:
        return experts_of(read_model(self.model.path))

    def _mlps(self, see: SeeMLP) -> dict[bytes, See]:
        family, inputs = self._family, dict[int, npt.NDArray[np.float32]]()
        nodes: dict[bytes, See] = {}
        for layer in self._layers:

            def keep(values: npt.NDArray[np.float32], layer: int = layer) -> bool:
                inputs[layer] = values.copy()  # its memory is used again before the MLP is through
                return False

            def hand_over(values: npt.NDArray[np.float32], layer: int = layer) -> bool:
                # With a control vector, the sum with the residual stream bears the same name, and comes later.
                return layer in inputs and see(layer, inputs.pop(layer), values)

            nodes[f"{family.mlp_input}-{layer}".encode()] = keep
            nodes[f"{family.mlp_output}-{layer}".encode()] = hand_over
        return nodes


def _shown(see: SeeStream, layer: int, values: npt.NDArray[np.float32]) -> bool:
    see(layer, values)
    return False


def opener(
    path: Path, settings: Settings | None = None
) -> Callable[[], AbstractContextManager[Callable[[Sequence[int]], npt.NDArray[np.float32]]]]:
    """Opens the file for as long as a block lasts, and gives its logits."""

    @contextmanager
    def opened() -> Iterator[Callable[[Sequence[int]], npt.NDArray[np.float32]]]:
        with LlamaCppRuntime(path, settings) as runtime:
            yield runtime.logits

    return opened
