"""What of a result is signed, and where is the signature? Beside the value, in what every result backend keeps as one.

In place of the value stands ``{"qbridge_signature": …, "body": TEXT}``: TEXT is the JSON of a mapping with the value,
the traceback and the children, or, with ``qbridge_encryption`` beside it, the base64 of that, encrypted. The signature
holds for the text, the id of the task and its state. So a result cannot be made up, changed, or given out as that of
another task; an older one of the same task in the same state can be put in place of a newer one.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import Any

from qbridge.serialization.lock import VERSION, Lock
from qbridge.serialization.locked_messages import HEADER_ENCRYPTION, HEADER_SIGNATURE
from qbridge.serialization.refused import MessageRefused

__all__ = ["is_locked", "lock_result", "unlock_result"]

_KIND = "result"


def lock_result(lock: Lock, task_id: str, state: str, result: Mapping[str, Any], dumps: Callable[[Any], Any]) -> Any:
    """Return what is stored in place of a value.

    Args:
        lock: the keys.
        task_id: whose result it is.
        state: what it tells of the task.
        result: ``result``, ``traceback`` and ``children``.
        dumps: makes JSON of it.
    """
    text = dumps(dict(result))
    body = text.encode("utf-8") if isinstance(text, str) else bytes(text)
    found: dict[str, Any] = {}
    if lock.encrypts:
        name, encrypted = lock.encrypt(body)
        found[HEADER_ENCRYPTION] = f"{VERSION}:{name}"
        body = b64encode(encrypted)
    found["body"] = body.decode("utf-8")
    found[HEADER_SIGNATURE] = lock.sign(_KIND, [task_id, state, found.get(HEADER_ENCRYPTION, "")], body)
    return found


def is_locked(value: Any) -> bool:
    """Whether a stored value is one that ``lock_result`` has made, or looks like it."""
    return isinstance(value, dict) and value.keys() - {HEADER_ENCRYPTION} == {HEADER_SIGNATURE, "body"}


def unlock_result(lock: Lock | None, task_id: Any, state: Any, value: Any) -> Mapping[str, Any] | None:
    """Return what was locked.

    Args:
        lock: the keys; None: there are none, and what is signed alone is read without a look at the signature.
        task_id: whose result was asked for.
        state: that it came with.
        value: as it was stored.

    Returns:
        ``result``, ``traceback`` and ``children``; None: the value is not locked, and need not be.

    Raises:
        MessageRefused: if no holder of the keys has stored it for this task and state.
    """
    if not is_locked(value):
        if lock is not None and lock.required:
            raise MessageRefused("unsigned", "it is not signed, and this bridge has signing_keys")
        return None
    text, encryption = value["body"], value.get(HEADER_ENCRYPTION, "")
    if not isinstance(text, str) or not isinstance(encryption, str):
        raise MessageRefused("bad_signature", "it is not what is stored for a signed result")
    body = text.encode("utf-8", "surrogatepass")
    if lock is not None:
        lock.verify(value[HEADER_SIGNATURE], _KIND, [task_id, state, encryption], body)
    if encryption:
        body = _decrypted(lock, encryption, body)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise MessageRefused("bad_signature", "what was signed is not JSON") from None
    if not isinstance(found, dict):
        raise MessageRefused("bad_signature", "what was signed is no result")
    return found


def _decrypted(lock: Lock | None, encryption: str, body: bytes) -> bytes:
    version, _, name = encryption.partition(":")
    if lock is None or version != VERSION:
        raise MessageRefused("bad_signature", "it is encrypted, and this bridge has no key that opens it")
    try:
        return lock.decrypt(name, b64decode(body, validate=True))
    except ValueError as error:
        if isinstance(error, MessageRefused):
            raise
        raise MessageRefused("bad_signature", "what is encrypted in it is not base64") from None
