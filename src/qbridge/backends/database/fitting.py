"""How is the text of an error made such that a database takes it?"""

from __future__ import annotations

from typing import Any

__all__ = ["shortened", "storable"]


def storable(text: str, limit: int) -> str:
    """Escape what no database takes in a text, and cut out its middle where it is too long.

    Args:
        text: a traceback: where it happened stands at its begin, what happened at its end.
        limit: bytes in UTF-8.
    """
    encoded = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace")
    if len(encoded) <= limit:
        return encoded.decode()
    half = max(0, limit // 2 - 40)
    head, tail = encoded[:half].decode("utf-8", "ignore"), encoded[len(encoded) - half :].decode("utf-8", "ignore")
    return f"{head}\n[... {len(encoded) - 2 * half:,} bytes left out ...]\n{tail}"


def shortened(error: Any, longest: int) -> Any:
    """Return an error as it is stored with no more than its text, and that cut.

    Args:
        error: the mapping that Celery stores; anything else is returned as it is.
        longest: characters.
    """
    if not isinstance(error, dict) or "exc_type" not in error:
        return error
    text = str(error.get("exc_text") or "")
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return {**error, "exc_message": [text], "exc_text": text}
