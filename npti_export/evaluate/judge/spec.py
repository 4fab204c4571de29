"""Which judge: an endpoint and the model there, or a GGUF on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npti_export.errors import EvaluationError, shortened
from npti_export.generators.address import host_of, is_address

_FORMS = "give URL=MODEL, such as http://127.0.0.1:8080/v1=qwen3-8b, or a .gguf file"


@dataclass(frozen=True)
class JudgeSpec:
    """A judge, not yet opened.

    Attributes:
        model: as the endpoint calls it; of a local judge its file, or ``org/name:file.gguf`` on the hub.
        url: where the endpoint's API begins; None for a local judge.
        key_variable: environment variable that holds the endpoint's key.
        concurrency: requests at once.
        timeout: seconds that one request may take.
        patience: seconds to go on asking where no answer comes at all.
        max_tokens: longest answer of an endpoint; models that reason first need room.
        omit: fields of a request that the endpoint does not take.
        extra: further fields of each request.
        threads: of a local judge; 0 takes every core.
        gpu_layers: of a local judge; -1 for all.
    """

    model: str
    url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    patience: float = 120.0
    max_tokens: int = 512
    omit: frozenset[str] = frozenset()
    extra: dict[str, Any] = field(default_factory=dict)
    threads: int = 0
    gpu_layers: int = -1


def parse_judge(text: str, **more: Any) -> JudgeSpec:
    """Read ``--judge``: ``URL=MODEL`` or a ``.gguf`` file.

    Args:
        text: as given.
        more: other fields of :class:`JudgeSpec`.

    Raises:
        EvaluationError: neither, or there is no such file; nothing is loaded or asked yet.
    """
    if "://" in text:
        url, _, model = text.rpartition("=")
        shown = host_of(url or text)
        if not url or not model.strip():
            raise EvaluationError(f"--judge {shown}: names no model; {_FORMS}")
        if not is_address(url):
            raise EvaluationError(f"--judge {shown}: is no address of an endpoint without a key in it; {_FORMS}")
        return JudgeSpec(model.strip(), url, **more)
    if not text.lower().endswith(".gguf"):
        hint = "; an address begins with http:// or https://" if "=" in text else ""
        raise EvaluationError(f"--judge {shortened(text)}: {_FORMS}{hint}")
    try:
        path = Path(text).expanduser()
        exists, there = path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no home
        exists = there = False
    on_hub = ":" in text and text.count("/") >= 1 and not exists
    if not on_hub and not there:
        raise EvaluationError(f"--judge {shortened(text)}: there is no such file; {_FORMS}")
    return JudgeSpec(text if on_hub else str(path), **more)
