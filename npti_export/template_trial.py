"""Render a chat template that nobody has seen yet, in a process of its own that ends when it takes too much.

Run by path, not imported: it needs jinja2 and nothing of ours. Reads JSON from stdin: ``template``, ``chats``,
``seconds``, ``megabytes``, ``characters``, ``path`` (where modules are looked for). Exit code 0: it kept the limits,
if only by an error; :data:`OVER`, or a signal: it did not; anything else: it could not be tried.
"""

import json
import sys
from datetime import datetime
from typing import Any

OVER = 3


def limit(seconds: int, megabytes: int) -> None:
    """Where the system can: so much processor time, and so much memory beyond what is there already."""
    try:
        import resource
    except ImportError:  # Windows; the parent's clock ends what goes on for too long
        return
    lower(resource.RLIMIT_CPU, seconds, seconds + 1)
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123 (few imports, for a quick start)
            now = int(stream.read().split()[0]) * resource.getpagesize()
        lower(resource.RLIMIT_AS, *(now + (megabytes << 20),) * 2)


def lower(which: int, soft: int, hard: int) -> None:
    """Set a limit, or leave a lower one that is there."""
    import resource

    there = [sys.maxsize if one == resource.RLIM_INFINITY else one for one in resource.getrlimit(which)]
    resource.setrlimit(which, (min(soft, *there), min(hard, there[1])))


def environment() -> Any:
    """What llama.cpp's Python binding and transformers render chat templates in."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    return made


def refuse(message: str) -> None:
    """What a template calls ``raise_exception``."""
    raise ValueError(message)


def main() -> int:
    """Render; see above."""
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    made = environment()
    limit(asked["seconds"], asked["megabytes"])
    try:
        template = made.from_string(asked["template"])
    except MemoryError:
        return OVER
    except Exception:  # whoever renders it in earnest says what is wrong
        return 0
    for chat in asked["chats"]:
        length = 0
        try:
            pieces = template.generate(
                messages=chat, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", raise_exception=refuse,
                strftime_now=datetime.now().strftime, tools=None, functions=None, function_call=None, tool_choice=None,
            )  # fmt: skip
            for piece in pieces:
                length += len(piece)
                if length > asked["characters"]:
                    return OVER
        except MemoryError:
            return OVER
        except Exception:  # a template may refuse a chat: whoever renders it in earnest says so
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
