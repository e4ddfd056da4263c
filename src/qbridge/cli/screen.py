"""How does the command line look? Consoles, symbols and the shape of a complaint."""

from __future__ import annotations

import io
import re
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["SYMBOLS", "error_screen", "screen", "survive_any_encoding", "symbol", "visible"]

SYMBOLS = {
    "ok": ("✓", "ok", "green"),
    "error": ("✗", "FAILED", "bold red"),
    "warning": ("!", "!", "yellow"),
    "info": ("·", "-", "cyan"),
}
"""Level of a finding → sign, the same in ASCII, style."""


def screen() -> Console:
    """Return the console of standard output: colours on a terminal, plain text in a pipe."""
    return Console(file=sys.stdout, highlight=False)


def error_screen() -> Console:
    """Return the console of standard error."""
    return Console(file=sys.stderr, highlight=False)


# Also what turns the direction of writing, and what no terminal can be sent.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Escape what would command the terminal, in a text that somebody else has written.

    Args:
        text: of an exception, a message, a result; new lines and tabulators stay.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def symbol(console: Console, level: str) -> Text:
    """Return the sign of a level, in words where the output cannot show it.

    Args:
        console: where it will be printed.
        level: a key of ``SYMBOLS``.
    """
    sign, plain, style = SYMBOLS[level]
    try:
        sign.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        sign = plain
    return Text(sign, style=style)


def survive_any_encoding(*streams: TextIO | Any) -> None:
    """Write ``?`` for what an output cannot show, instead of ending with a UnicodeEncodeError.

    Args:
        streams: standard output and standard error.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="replace")
