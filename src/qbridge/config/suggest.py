"""Which known name was probably meant by an unknown one?"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["closest", "did_you_mean"]


def closest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Find the known name that looks most like ``word``.

    Args:
        word: the name that somebody wrote.
        known: the names that exist.
        likeness: from 0 to 1, below which a name is not suggested.

    Returns:
        The best match, compared without case, or None if nothing is close.
    """
    by_folded = {name.casefold(): name for name in known}
    matches = get_close_matches(word.casefold(), by_folded, n=1, cutoff=likeness)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Word the suggestion for an unknown name.

    Args:
        word: the name that somebody wrote.
        known: the names that exist.

    Returns:
        ``"did you mean 'x'?"``, or an empty string if nothing is close.
    """
    match = closest(word, known)
    return f"did you mean {match!r}?" if match is not None else ""
