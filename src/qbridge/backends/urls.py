"""How is a service's URL taken apart and put together without ever showing its password?

The meaning of each part is kombu's (``kombu.utils.url.url_to_parts``), because peers write the same URLs for plain
Celery: one leading slash is cut from the path, what is left is percent-decoded, an empty path is no path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from qbridge.exceptions import ConfigurationError

__all__ = ["Address", "URLParts", "address", "join_url", "mask_url", "refuse_query", "split_url"]


@dataclass(frozen=True)
class Address:
    """One server's host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class URLParts:
    """The parts of one URL, percent-decoded; None where the URL says nothing."""

    scheme: str
    username: str | None
    password: str | None = field(repr=False)
    host: str | None
    port: int | None
    path: str | None
    query: Mapping[str, str] = field(repr=False)


def split_url(url: str) -> URLParts:
    """Take one URL apart as kombu does.

    Args:
        url: one URL, without failover alternatives.

    Returns:
        Its parts; a password with unquoted ``#``, ``/``, ``?`` or ``@`` does not get this far.

    Raises:
        ConfigurationError: if it is no URL; the message never shows more of it than the scheme.
    """
    scheme, separator, rest = url.strip().partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ConfigurationError("this is not a URL", "Write scheme://user:password@host:port/path.")
    try:
        parts = urlsplit(f"http://{rest}")  # the scheme decides what urlsplit does with the rest: fix it
        port = parts.port
        host = unquote(parts.hostname or "") or None
    except ValueError:
        # urllib's message quotes the piece it could not read, which may be half of a password.
        raise ConfigurationError(
            f"this {scheme}:// URL cannot be read (its host or port is malformed)",
            "Percent-encode special characters in the username and password (urllib.parse.quote(password, safe='')).",
        ) from None
    if parts.fragment:
        raise ConfigurationError(
            f"this {scheme}:// URL has an unquoted '#'",
            "Percent-encode special characters in the username and password (urllib.parse.quote(password, safe='')).",
        )
    return URLParts(
        scheme=scheme.lower(),
        username=unquote(parts.username or "") or None,
        password=unquote(parts.password or "") or None,
        host=host,
        port=port,
        path=unquote(parts.path.removeprefix("/")) or None,
        query=dict(parse_qsl(parts.query, keep_blank_values=True)),
    )


def join_url(
    scheme: str,
    *,
    username: str | None = None,
    password: str | None = None,
    server: Address | None = None,
    path: str = "",
    query: Mapping[str, str] | None = None,
) -> str:
    """Put a URL together so that kombu reads the same parts back.

    Args:
        scheme: without ``://``.
        username: as it is, not quoted.
        password: as it is, not quoted.
        server: host and port; None for a URL without an authority, such as a socket's.
        path: what follows the slash after the port; quoted here, slashes included.
        query: names and values.
    """
    credentials = ""
    if username or password:
        credentials = quote(username or "", safe="") + (f":{quote(password, safe='')}" if password else "") + "@"
    tail = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in (query or {}).items())
    return f"{scheme}://{credentials}{server or ''}/{quote(path, safe='')}{'?' if tail else ''}{tail}"


def mask_url(url: str) -> str:
    """Return ``url`` with every password replaced by ``**``; failover lists and malformed URLs too."""
    return re.sub(r"://([^:/?#;]*):((?:(?!://).)*)@", r"://\1:**@", url)


def address(text: str, default_port: int) -> Address:
    """Read ``host``, ``host:port`` or ``[ipv6]:port``.

    Raises:
        ConfigurationError: if it is none of them.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/@\[\]]+))(?::(\d{1,5}))?", text.strip())
    if match is None:
        if re.fullmatch(r"[0-9A-Fa-f]*(:[0-9A-Fa-f]*){2,7}", text.strip()):
            return Address(text.strip(), default_port)  # a bare IPv6 address
        raise ConfigurationError("a host is malformed", "Write host, host:port or [ipv6]:port, without a scheme.")
    return Address(match[1] or match[2], int(match[3] or default_port))


def refuse_query(scheme: str, left: Iterable[str], known: Sequence[str]) -> None:
    """Refuse query parameters that nothing reads.

    Args:
        scheme: for the message.
        left: names that were not understood.
        known: names that would be.

    Raises:
        ConfigurationError: if any are left, naming them and the nearest known one.
    """
    for name in left:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known) or 'none'}"
        raise ConfigurationError(
            f"the query parameter {name!r} of this {scheme}:// URL is not read by anything ({hint})",
            "Remove it, or set the field of that meaning on the model.",
        )
