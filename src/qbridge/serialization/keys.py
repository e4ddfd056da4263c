"""What is a key of the locked wire, and how is it written? ``id:secret``, the secret in base64, 32 bytes at least.

The id travels with each message and says which key it was made with; it is no secret.
"""

from __future__ import annotations

import binascii
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from qbridge.exceptions import ConfigurationError

__all__ = ["SECRET_BYTES", "Key", "new_key", "read_key", "refuse_duplicates"]

SECRET_BYTES = 32
"""Fewest bytes of a secret: what SHA-256 has, more adds nothing."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,40}")
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        id: its name on the wire.
        secret: what nobody else has; not shown.
    """

    id: str
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.id}:**"


def read_key(text: str) -> Key:
    """Read a key as it is written in a configuration.

    Args:
        text: ``id:secret``; the secret in base64 with either alphabet, with or without padding.

    Raises:
        ConfigurationError: if it is something else; what it was is not in the message.
    """
    name, colon, secret = text.strip().partition(":")
    if not colon or not _ID.fullmatch(name):
        raise ConfigurationError(
            "a key is written id:secret, the id in letters, digits, '.', '_' and '-', 40 at most",
            "let `qbridge keys` make one",
        )
    secret = secret.translate(_URL_SAFE).rstrip("=")
    try:
        found = b64decode((secret + "=" * (-len(secret) % 4)).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeError):
        raise ConfigurationError(
            f"the secret of the key {name!r} is not base64", "let `qbridge keys` make one"
        ) from None
    if len(found) < SECRET_BYTES:
        raise ConfigurationError(
            f"the secret of the key {name!r} has {len(found)} bytes, fewer than {SECRET_BYTES} can be guessed",
            "let `qbridge keys` make one",
        )
    return Key(name, found)


def refuse_duplicates(keys: Iterable[Key], others: Iterable[Key] = ()) -> None:
    """Refuse two keys of one name, and a secret that is used twice.

    Args:
        keys: of one list.
        others: of another one, whose names may be the same.

    Raises:
        ConfigurationError: naming the ids.
    """
    names: set[str] = set()
    known = {key.secret: key.id for key in others}
    for key in keys:
        if key.id in names:
            raise ConfigurationError(f"two keys are called {key.id!r}", "give each an id of its own")
        if key.secret in known:
            raise ConfigurationError(
                f"the keys {known[key.secret]!r} and {key.id!r} have the same secret",
                "make one for each: a secret is for signing or for encryption, and new when its id is",
            )
        names.add(key.id)
        known[key.secret] = key.id


def new_key(name: str | None = None) -> str:
    """Make a key from the operating system's random numbers, as it is written in a configuration.

    Args:
        name: its id; None: today's date and four random digits.

    Raises:
        ConfigurationError: if the id cannot be one.
    """
    if name is None:
        name = f"{datetime.now(UTC):%Y-%m-%d}-{secrets.token_hex(2)}"
    text = f"{name}:{b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"
    read_key(text)
    return text
