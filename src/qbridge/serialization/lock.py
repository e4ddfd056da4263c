"""How are bytes locked: who signed them, for what purpose, and who may read them?

Signing is HMAC-SHA-256 (RFC 2104) of the standard library. Encryption is ChaCha20-Poly1305 (RFC 8439) of
``cryptography``, under a key of its own for each message, HMAC-SHA-256 of the configured one and a random salt: random
nonces alone would wear a key out after some four billion messages. What is encrypted is signed too, as it is on the
wire, so nothing is decrypted that a stranger made.

The first key of each list locks, any key of it unlocks: a new key is added behind the old one everywhere, then moved
before it, and then the old one is taken away.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from collections.abc import Mapping, Sequence
from typing import Any

from qbridge.serialization.keys import Key
from qbridge.serialization.refused import MessageRefused

__all__ = ["VERSION", "Lock"]

VERSION = "1"
"""Of the form of signatures, of what they cover, and of what is encrypted."""

_SALT, _NONCE, _TAG = 16, 12, 16  # bytes; the nonce's and the tag's are the algorithm's
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


class Lock:
    """The keys of a bridge and what is done with them; immutable, safe in threads, and not shown.

    Args:
        signing: at least one; the first signs.
        encryption: the first encrypts; empty: nothing is encrypted.
        required: False while keys are being rolled out: what is not signed is taken too.
    """

    def __init__(self, signing: Sequence[Key], encryption: Sequence[Key] = (), *, required: bool = True) -> None:
        self._signer = signing[0]
        self._signing: Mapping[str, Key] = {key.id: key for key in signing}
        self._encrypter: Key | None = encryption[0] if encryption else None
        self._encryption: Mapping[str, Key] = {key.id: key for key in encryption}
        self.required = required

    @property
    def encrypts(self) -> bool:
        """Whether bodies are encrypted."""
        return self._encrypter is not None

    # -- who made it

    def sign(self, kind: str, bound: Sequence[Any], body: bytes) -> str:
        """Return the signature of a body for one purpose.

        Args:
            kind: the purpose; a signature for one is none for another.
            bound: what else it holds for: JSON values.
            body: as it goes on the wire.

        Raises:
            TypeError, ValueError: if something that is bound has no JSON form.
        """
        key, at = self._signer, int(time.time())
        mac = urlsafe_b64encode(_mac(key, kind, at, bound, body)).decode().rstrip("=")
        return f"{VERSION}:{key.id}:{at}:{mac}"

    def verify(self, signature: Any, kind: str, bound: Sequence[Any], body: bytes) -> int:
        """Make sure that somebody with one of the keys made this body, for this purpose.

        Returns:
            When it was signed, in seconds since 1970.

        Raises:
            MessageRefused: if nobody did.
        """
        if not isinstance(signature, str) or signature.count(":") != 3:
            raise MessageRefused("bad_signature", "its signature is not one")
        version, name, at, mac = signature.split(":")
        if version != VERSION:
            raise MessageRefused("bad_signature", "its signature has a form of another version")
        key = self._signing.get(name)
        if key is None:
            raise MessageRefused("bad_signature", "it is signed with a key that is not among the signing_keys here")
        try:
            moment, given = int(at), _unbase64(mac)
            expected = _mac(key, kind, moment, bound, body)
        except (TypeError, ValueError, RecursionError):
            raise MessageRefused("bad_signature", "its signature cannot belong to what it came with") from None
        if not hmac.compare_digest(expected, given):
            raise MessageRefused(
                "bad_signature", f"its signature does not fit: it was changed, or its key is not the one called {name}"
            )
        return moment

    # -- who may read it

    def encrypt(self, body: bytes) -> tuple[str, bytes]:
        """Return the id of the key, and what only its holders can read.

        Raises:
            ValueError: if there is no key to encrypt with.
        """
        key = self._encrypter
        if key is None:
            raise ValueError("no encryption_keys")
        salt, nonce = secrets.token_bytes(_SALT), secrets.token_bytes(_NONCE)
        return key.id, salt + nonce + _cipher(key, salt).encrypt(nonce, body, None)

    def decrypt(self, name: str, body: bytes) -> bytes:
        """Return what was encrypted with the key of this id.

        Raises:
            MessageRefused: if it was not.
        """
        key = self._encryption.get(name)
        if key is None:
            raise MessageRefused("bad_signature", "it is encrypted with a key not among the encryption_keys here")
        if len(body) < _SALT + _NONCE + _TAG:
            raise MessageRefused("bad_signature", "what is encrypted in it is too short to be anything")
        salt, nonce, rest = body[:_SALT], body[_SALT : _SALT + _NONCE], body[_SALT + _NONCE :]
        try:
            found: bytes = _cipher(key, salt).decrypt(nonce, rest, None)
        except Exception as error:
            if type(error).__name__ != "InvalidTag":  # cryptography's: not imported where nothing is encrypted
                raise
            raise MessageRefused(
                "bad_signature", f"it cannot be decrypted: its key is not the encryption key called {name} here"
            ) from None
        return found


def _mac(key: Key, kind: str, at: int, bound: Sequence[Any], body: bytes) -> bytes:
    # ASCII without a line break, so nothing can be moved from one part into the other
    head = _canonical(["qbridge", VERSION, kind, key.id, at, *bound])
    return hmac.digest(key.secret, b"%b\n%b" % (head.encode("ascii"), body), "sha256")


def _cipher(key: Key, salt: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # an optional library

    return ChaCha20Poly1305(hmac.digest(key.secret, b"qbridge:encrypt:1:" + salt, "sha256"))


def _unbase64(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except NotBase64:
        raise ValueError("not base64") from None
