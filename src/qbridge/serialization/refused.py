"""Why is a message not taken for what it says it is? One error, with the reason that its dead letter gets."""

from __future__ import annotations

from typing import Literal

__all__ = ["MessageRefused", "Refusal"]

Refusal = Literal["unsigned", "bad_signature", "too_large"]
"""What is wrong with a message before anybody has looked at what it asks for."""


class MessageRefused(ValueError):
    """A message, or a result, that is not opened.

    Args:
        reason: for its dead letter.
        what: what is wrong, in words; never what it holds.
    """

    def __init__(self, reason: Refusal, what: str) -> None:
        super().__init__(reason, what)
        self.reason: Refusal = reason
        self.what: str = what

    def __str__(self) -> str:
        return self.what
