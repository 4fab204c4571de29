"""Addresses of endpoints, as users type them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_SECRETS = re.compile(r"(\w+://)[^/@\s]*@|\?[^\s=]*=[^\s=]*(?==|$)")


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


def without_secrets(argument: str) -> str:
    """An argument of the command line with what :func:`public_address` leaves out left out of each address in it."""
    return _SECRETS.sub(r"\1", argument)
