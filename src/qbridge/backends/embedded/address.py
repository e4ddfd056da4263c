"""How is the embedded broker's file named in a URL? ``embedded:///absolute/path.db``, percent-encoded.

The path is absolute, as in a ``file`` URL. ``embedded://./relative.db`` is taken from the working directory, and
``embedded://`` is the default file. There is no host, user, port, query or fragment.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

__all__ = ["DEFAULT_PATH", "path_of", "url_of"]

DEFAULT_PATH = Path(".qbridge/bridge.db")


def url_of(path: Path) -> str:
    """URL of the file at ``path``; a relative path is made absolute now."""
    return f"embedded://{quote(str(path.absolute()))}"


def path_of(url: str) -> Path:
    """Path that ``url`` names; relative where the URL is.

    Raises:
        ValueError: if it is not such a URL; the message says what to write.
    """
    parts = urlsplit(url)
    if parts.scheme != "embedded":
        raise ValueError(f"The scheme of an embedded broker's URL is 'embedded', not {parts.scheme!r}")
    if parts.query or parts.fragment:
        raise ValueError("An embedded broker's URL has no query and no fragment; write '?' as %3F and '#' as %23")
    if parts.netloc not in ("", "."):
        raise ValueError(
            "An embedded broker's URL has no host: write embedded:///absolute/path.db with three slashes, "
            "or embedded://./relative/path.db"
        )
    path = unquote(parts.path)
    if path in ("", "/"):
        return DEFAULT_PATH
    return Path(path.lstrip("/")) if parts.netloc else Path(path)
