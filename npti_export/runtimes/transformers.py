"""A model in transformers: batched greedy generation, and gate activations from one teacher-forced pass."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npti_export.chat_template import check_prompt
from npti_export.errors import ModelError
from npti_export.models import ModelSource
from npti_export.runtimes.base import FALLBACK_TEMPLATE, Exchange, Message
from npti_export.runtimes.devices import MAP, entrance, in_place, parse_dtype, pick_dtype, usable_device
from npti_export.runtimes.loading import load, stop_tokens
from npti_export.stats import ActivationStats, AnswerCounts
from npti_export.temporaries import TemporaryFolder

if TYPE_CHECKING:
    import torch

    from npti_export.runtimes.accumulate import StatsAccumulator

_LOGITS_BYTES = 512 << 20  # of a pass that asks how likely responses are, in float32
_TOKENS_PER_PASS = 8192  # of a teacher-forced batch, padding included: bounds its memory


class TransformersRuntime:
    """Implements :class:`npti_export.runtimes.base.Runtime`.

    Args:
        source: a GGUF (dequantised by transformers) or a transformers directory.
        device: ``auto`` (CUDA, then MPS, then CPU), a torch device, or ``map``: layer by layer over all GPUs, and where
            these are full in memory and on disk, as transformers' ``device_map="auto"`` divides it.
        dtype: ``auto`` or a torch dtype's name. Auto is bfloat16 where the hardware multiplies it (CUDA from
            Ampere on, CPUs with AVX512-BF16 or AMX; on the latter it is 2 to 3 times as fast), else float32.
        trust_remote_code: run the model repository's own code.

    Raises:
        ModelError: the model cannot be loaded; the reason given is transformers'.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.device = usable_device(device)
        self.dtype = pick_dtype(self.device) if dtype == "auto" else parse_dtype(dtype)
        if device == MAP:
            self._offloaded = TemporaryFolder()  # goes when this object goes
            self.model, self.tokenizer = load(source, self.dtype, trust_remote_code, spread=self._offloaded.path)
            self.device = entrance(self.model)
            _check_spread(self.model, source)
        else:
            self.model, self.tokenizer = load(source, self.dtype, trust_remote_code)
            self.model.to(self.device)
        self.model.eval()
        if source.architecture.mixture:
            from npti_export.routing import routing_of, tell

            for module, act in zip(self._experts, self.activations, strict=True):
                routing = routing_of(module)
                routing.retain()
                tell(act, routing)
        self.uses_fallback_template = not self.tokenizer.chat_template
        self._stop = stop_tokens(self.model, self.tokenizer, str(source.path))

    def converted(self, dtype: str) -> TransformersRuntime:
        """A second runtime with a copy of the weights in another dtype, for models small enough to keep twice."""
        other = copy.copy(self)
        other.dtype = parse_dtype(dtype)
        other.model = copy.deepcopy(self.model).to(other.dtype)
        return other

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        """The decoder layers."""
        return list(operator.attrgetter(self.source.architecture.layers)(self.model))

    @property
    def activations(self) -> list[torch.nn.Module]:
        """Per layer, the module whose output is the gate activation ``a``."""
        return [operator.attrgetter(self.source.architecture.act)(layer) for layer in self.layers]

    @property
    def down_projections(self) -> list[torch.nn.Module] | None:
        """Per layer, the module whose input is ``a ⊙ up``; None in a mixture of experts, which has no such module."""
        if self.source.architecture.mixture:
            return None
        return [operator.attrgetter(self.source.architecture.down)(layer) for layer in self.layers]

    @property
    def _experts(self) -> list[torch.nn.Module]:
        get = operator.attrgetter(self.source.architecture.act.rpartition(".")[0])
        return [get(layer) for layer in self.layers]

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """See :class:`Runtime`. Templates that refuse a system turn get it at the head of the user's turn."""
        template = FALLBACK_TEMPLATE if self.uses_fallback_template else None
        try:
            text = check_prompt(self._render(messages, template), self.source.name)
        except ModelError:
            raise
        except Exception as error:  # a template is a program, and raises anything
            if len(messages) != 2:
                raise ModelError(f"{self.source.name}: its chat template fails on a question: {error}") from error
            joined = "\n\n".join(message["content"] for message in messages)
            return self.encode([{"role": "user", "content": joined}])
        tokens = self._known(self.tokenizer(text, add_special_tokens=self.uses_fallback_template)["input_ids"])
        if not tokens:
            raise ModelError(f"{self.source.name}: its chat template makes nothing of a question; mend it")
        return tokens

    def _render(self, messages: Sequence[Message], template: str | None) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    def encode_text(self, text: str, *, begin: bool = True) -> tuple[int, ...]:
        """Token ids of plain text; ``begin`` puts what the model wants at the beginning of a text in front."""
        return self._known(self.tokenizer(text, add_special_tokens=begin, split_special_tokens=True)["input_ids"])

    def _known(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The tokens, if the model has them all.

        Raises:
            ModelError: the tokenizer is another model's, or damaged.
        """
        if max(tokens, default=0) >= self._vocabulary:
            raise ModelError(
                f"{self.source.path}: its tokenizer gives token {max(tokens)}, and the model has {self._vocabulary}; "
                "download its files again"
            )
        return tuple(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Runtime`."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, repetition_penalty: float
    ) -> list[Exchange]:
        """See :class:`Runtime`."""
        import torch
        from transformers import GenerationConfig

        ids, mask = self._pad(prompts, left=True)
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            do_sample=False,
            eos_token_id=sorted(self._stop) or None,
            pad_token_id=min(self._stop, default=0),
        )
        with torch.inference_mode(), self._own_settings(GenerationConfig()):
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        pairs = zip(prompts, output[:, ids.shape[1] :].tolist(), strict=True)
        return [Exchange(tuple(prompt), self._cut(answer, max_new_tokens)) for prompt, answer in pairs]

    @contextmanager
    def _own_settings(self, plain: Any) -> Iterator[None]:
        """Without what the model's generation_config.json says, such as beams, from which ``generate`` would fill in
        whatever it is not told: answers are greedy, here as in llama.cpp."""
        of_model, self.model.generation_config = self.model.generation_config, plain
        try:
            yield
        finally:
            self.model.generation_config = of_model

    def _cut(self, answer: list[int], limit: int) -> tuple[int, ...]:
        end = next((index + 1 for index, token in enumerate(answer) if token in self._stop), limit)
        return tuple(answer[:end])

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int, repetition_penalty: float) -> str:
        """A greedy answer to a chat."""
        prompts = [self.encode(messages)]
        (exchange,) = self.generate(prompts, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
        return self.decode(exchange.response)

    def observe(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[int],
        *,
        max_new_tokens: int,
        repetition_penalty: float,
        shared: Sequence[int] | None = None,  # noqa: ARG002  a padded batch computes every row in full
    ) -> tuple[list[ActivationStats], AnswerCounts]:
        """See :class:`Runtime`: generation in batches, then a teacher-forced pass, where more is computed at once."""
        answers = self.generate(prompts, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
        shape = self.source.shape
        kind = AnswerCounts.kind(max((len(one.response) for one in answers), default=0))
        active = np.zeros((len(answers), shape.layers, shape.width), kind)
        tokens = np.zeros(len(answers), np.int64)
        stats = []
        for group in range(max(groups) + 1):
            places = [index for index, one in enumerate(groups) if one == group]
            accumulator = self._counted([answers[place] for place in places])
            for counts in accumulator.counts():
                some, places = places[: len(counts.tokens)], places[len(counts.tokens) :]
                active[some], tokens[some] = counts.active, counts.tokens
            stats.append(self._finite(accumulator.result()))
        return stats, AnswerCounts(active, tokens)

    def activation_stats(self, exchanges: Sequence[Exchange]) -> ActivationStats:
        """See :class:`Runtime`."""
        return self._finite(self._counted(exchanges).result())

    def _finite(self, stats: ActivationStats) -> ActivationStats:
        """Statistics of numbers.

        Raises:
            ModelError: some were not, as where float16 overflows.
        """
        if not stats.finite:
            raise ModelError(
                f"{self.source.name}: computes activations that are not numbers in "
                f"{str(self.dtype).removeprefix('torch.')}; give --dtype bfloat16 or float32, or get the files again"
            )
        return stats

    def _counted(self, exchanges: Sequence[Exchange]) -> StatsAccumulator:
        import torch

        from npti_export.runtimes.accumulate import StatsAccumulator

        shape = self.source.shape
        downs = self.down_projections
        accumulator = StatsAccumulator(shape.layers, shape.width, shape.experts, products=downs is not None)
        for batch in batches(exchanges):
            ids, mask = self._pad([exchange.tokens for exchange in batch], left=False)
            counted = torch.zeros_like(ids, dtype=torch.bool)
            for row, exchange in enumerate(batch):
                counted[row, len(exchange.prompt) : len(exchange.tokens) - 1] = True
            with accumulator.listen(self.activations, counted, downs or ()), torch.inference_mode():
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return accumulator

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """See :class:`Runtime`."""
        import torch

        ids = torch.tensor([list(tokens)], device=self.device)
        with torch.inference_mode():
            result: npt.NDArray[np.float32] = self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
        return result

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """``[prompts, vocabulary]`` float32 next-token logits after the last token of each prompt."""
        import torch

        result = []
        for batch in batches([Exchange(tuple(prompt), ()) for prompt in prompts]):
            ids, mask = self._pad([exchange.prompt for exchange in batch], left=True)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1
                ).logits
            result.append(logits[:, -1].float().cpu().numpy())
        return np.concatenate(result)

    def log_likelihoods(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Mean log-likelihood per token (nats) of each response after its prompt."""
        import torch

        result: list[float] = []
        for batch in batches(exchanges, logits=_LOGITS_BYTES // (4 * self._vocabulary)):
            ids, mask = self._pad([exchange.tokens for exchange in batch], left=False)
            first = min(len(exchange.prompt) for exchange in batch)
            with torch.inference_mode():  # the model's own logits: some families scale or cap them
                logits = self.model(
                    input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ids.shape[1] - first + 1
                ).logits
                for row, exchange in enumerate(batch):
                    start, end = len(exchange.prompt), len(exchange.tokens)
                    own = logits[row, start - first : end - first].float()
                    chosen = own.gather(-1, ids[row, start:end, None])[:, 0]
                    result.append(float((chosen - own.logsumexp(-1)).mean()))
        return result

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def stream_means(
        self, exchanges: Sequence[Exchange], added: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """See :class:`Runtime`."""
        from npti_export.runtimes.streams import StreamMeans, adding

        means = StreamMeans(self.layers, self.source.shape.hidden)
        for batch in batches(exchanges):
            ids, mask, counted = self._response_positions(batch)
            with adding(self._own_downs, added) if added is not None else nullcontext(), means.listen(counted):
                self._read(ids, mask)
        return means.result()

    def stream_follows(self, exchanges: Sequence[Exchange], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See :class:`Runtime`."""
        from npti_export.runtimes.streams import StreamFollower

        follower = StreamFollower(self.layers, wanted)
        for batch in batches(exchanges):
            ids, mask, counted = self._response_positions(batch)
            for hooked in (follower.looking, follower.moving):
                with hooked(counted):
                    self._read(ids, mask)
        return follower.result()

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        import torch

        with torch.inference_mode():
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _response_positions(self, batch: Sequence[Exchange]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, mask, and where a response token is predicted, ``[batch, length]`` each."""
        import torch

        ids, mask = self._pad([exchange.tokens for exchange in batch], left=False)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        for row, exchange in enumerate(batch):
            counted[row, len(exchange.prompt) - 1 : len(exchange.tokens) - 1] = True
        return ids, mask, counted

    def down_weight(self, layer: int) -> npt.NDArray[np.float32]:
        """See :class:`Runtime`."""
        down = self._own_downs[layer]
        with in_place(down):
            weight: npt.NDArray[np.float32] = down.weight.detach().float().cpu().numpy()
        return weight

    @property
    def _own_downs(self) -> list[Any]:
        assert self.down_projections is not None, "the experts of a mixture have no module of their own"
        return self.down_projections

    def _pad(self, sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        length = max(map(len, sequences))
        # Padding is masked, but the repetition penalty sees it: a token that the row has anyway changes nothing there.
        ids = torch.tensor([[sequence[0]] * length for sequence in sequences])
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
            ids[row, place] = torch.tensor(list(sequence))
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)


def _check_spread(model: Any, source: ModelSource) -> None:
    """Experts are computed by code that fetches no weights from elsewhere, see :mod:`npti_export.routing`.

    Raises:
        ModelError: there was not room for all of a mixture of experts on the devices.
    """
    if source.architecture.mixture and any(one.device.type == "meta" for one in model.parameters()):
        raise ModelError(
            f"--device map: the devices do not hold all of {source.name}, and a mixture of experts cannot be computed "
            "from memory or disk; take more GPUs, or --device cpu"
        )


def batches(
    exchanges: Sequence[Exchange], tokens: int = _TOKENS_PER_PASS, logits: int | None = None
) -> Iterator[list[Exchange]]:
    """Exchanges in their order, as many at once as fit, padding included.

    Args:
        exchanges: each makes a batch in any case.
        tokens: most in a batch.
        logits: most rows of them, from the first response on; None for no limit.
    """
    batch: list[Exchange] = []
    for exchange in exchanges:
        grown = [*batch, exchange]
        longest, first = max(len(one.tokens) for one in grown), min(len(one.prompt) for one in grown)
        rows = (longest - first + 1) * len(grown)
        if batch and (longest * len(grown) > tokens or (logits is not None and rows > logits)):
            yield batch
            grown = [exchange]
        batch = grown
    if batch:
        yield batch
