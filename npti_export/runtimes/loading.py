"""Loading a model and its tokenizer in transformers, quietly."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.chat_template import check_template
from npti_export.errors import ModelError, shortened
from npti_export.gguf.blocks import type_name
from npti_export.gguf.reader import read_gguf
from npti_export.models import ModelSource

if TYPE_CHECKING:
    import torch

_TEXT = "How are you? Grüße, 你好!\n"
_SAID = 300  # characters of what transformers says


def stop_tokens(model: Any, tokenizer: Any, where: str) -> set[int]:
    """Tokens that end an answer; such as the model does not have, as -1, never do.

    Raises:
        ModelError: its files name something that is no token's number.
    """
    configured = model.generation_config.eos_token_id
    named = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    for token in named:
        if token is not None and type(token) is not int:
            raise ModelError(
                f"{where}: eos_token_id (in generation_config.json or config.json) is {shortened(token)}, not the "
                "number of a token; download the file again"
            )
    count = model.get_input_embeddings().weight.shape[0]
    return {token for token in named if token is not None and 0 <= token < count}


def load(
    source: ModelSource, dtype: torch.dtype, trust_remote_code: bool, *, spread: Path | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        source: the model.
        dtype: of its weights.
        trust_remote_code: run the repository's own code.
        spread: over the devices of this machine, and, for what they do not hold, this folder.

    Raises:
        ModelError: transformers cannot load it (the reason given is its own), or see
            :func:`npti_export.chat_template.check_template`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    source.check_readable_by_transformers()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.path)}
    if source.kind == "gguf":  # an absolute name: a bare one is looked for in the working directory first
        where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": str(source.path.absolute())}
    try:
        with _quiet(transformers), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
            tokenizer.decode(tokenizer(_TEXT)["input_ids"])  # what is wrong with some tokenizers shows in use
            _check_templates(tokenizer.chat_template, str(source.path))
            # of a directory nothing but safetensors: other weights are programs that run as they are read
            only: dict[str, Any] = {} if source.kind == "gguf" else {"use_safetensors": True}
            if spread is not None:
                only |= {"device_map": "auto", "offload_folder": str(spread)}
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                **where, **only, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            if source.kind == "directory":
                _check_complete(sorted(told["missing_keys"]), str(source.path))
    except ModelError:
        raise
    except Exception as error:  # these libraries raise anything, tokenizers a bare Exception, on a damaged file
        if source.kind == "gguf" and source.path.is_file():
            _check_types(source.path)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source.path}: transformers cannot load it: {reason[:_SAID]}") from error
    return model, tokenizer


def _check_complete(missing: list[str], where: str) -> None:
    """Transformers warns, and draws at random what no file holds: a model whose answers are noise."""
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(f"{where}: tensor {missing[0]}{more} is in none of its files; the download is incomplete")


def _check_templates(found: str | dict[str, str] | None, where: str) -> None:
    """A tokenizer has no template, one, or several by name."""
    for template in found.values() if isinstance(found, dict) else [found or ""]:
        check_template(template, where)


def _check_types(path: Path) -> None:
    """Raise, with a mend, where the reason is a type that gguf-py 0.19, transformers' reader, cannot decode."""
    for tensor in read_gguf(path).tensors:
        name = type_name(tensor.type_id)
        if name in ("Q1_0", "Q2_0"):
            raise ModelError(
                f"{path}: {tensor.name} is {name}, which transformers cannot load; give the model's transformers "
                "directory or hub id as --model and this file as --base"
            )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' advice and progress bars (some go to stderr past its own switch) while loading."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf_log = logging.getLogger("gguf")
    level = gguf_log.level
    gguf_log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        gguf_log.setLevel(level)
        if bars:
            transformers.logging.enable_progress_bar()
