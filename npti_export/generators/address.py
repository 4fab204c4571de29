"""Addresses of endpoints, as users type them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_ADDRESS = re.compile(r"(\w+://)(\S*)")


def is_address(url: str) -> bool:
    """Whether it is a web address, without a name or password in it."""
    try:
        parts = urlsplit(url)
        numbered = parts.port is None or parts.port > 0
    except ValueError:  # half of an IPv6 address, a port that is no number
        return False
    known = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    return known and numbered and not parts.username and not parts.password


def public_address(url: str) -> str:
    """An address without what may be a secret in it: user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no address)"
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def host_of(text: str) -> str:
    """What may be shown of what is no proper address: its host, which is all that cannot be a key."""
    scheme, _, rest = text[:200].partition("://")
    host = rest.partition("/")[0].rpartition("@")[2].partition("?")[0]
    return f"{scheme}://{host}{'/…' if '/' in rest else ''}"


def without_secrets(argument: str) -> str:
    """An argument of the command line, each address in it without user, password and query.

    A model that is named behind an address (``URL=MODEL``) stays.
    """

    def public(found: re.Match[str]) -> str:
        address, mark, query = found[2].rpartition("@")[2].partition("?")
        last = query.rpartition("&")[2]
        model = f"={last.rpartition('=')[2]}" if last.count("=") > 1 else ""
        return f"{found[1]}{address}{model if mark else ''}"

    return _ADDRESS.sub(public, argument)
