"""How is a stored result read: what JSON said, what Celery would make of it, and the text of the error."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC, decompress_payload
from celery.result import result_from_tuple
from celery.states import FAILURE
from celery.utils.serialization import UnpickleableExceptionWrapper
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.utils.json import object_hook

from qbridge.exceptions import PayloadError, UnsupportedFeature
from qbridge.serialization.limits import decompressed
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_results import is_locked, lock_result, unlock_result
from qbridge.serialization.refused import MessageRefused

if TYPE_CHECKING:
    from celery.backends.base import Backend as _Base
else:
    _Base = object

__all__ = ["ERROR_TEXT_LIMIT", "NEXT_ATTEMPT", "TypedResultMixin", "error_text", "revive"]

ERROR_TEXT_LIMIT = 8_192
"""Longest text of an exception that is stored beside it, in characters."""

_BESIDE = 16 * 1024 * 1024
"""Octets that a compressed outcome may have beside its value: a traceback, arguments, other tasks."""

NEXT_ATTEMPT = "qbridge_next_attempt"
"""Attribute of an exception after which its task waits for another attempt: number of the attempt, time of the next."""

# kombu writes {"__type__": "datetime", "__value__": "…"}; looking for the marker is far cheaper than walking.
_MARKER = b'"__type__"'
_PICKLE = "application/x-python-serialize"
_typed = cast("Callable[[dict[str, Any]], Any]", object_hook)


class TypedResultMixin(_Base):
    """Reads results as JSON says them, for Celery result backends (put it first among the bases).

    With keys, what is stored is signed, and what is read is what a holder of the keys has stored.

    A meta then has, besides what plain Celery puts there:

    - ``result_json``: the value as ``json.loads`` gives it; a user's own ``{"__type__": …, "__value__": …}`` is a dict.
    - ``error_json``: in failure states, the stored mapping ``exc_type, exc_module, exc_message, exc_text``; in RETRY
      also ``retry``: the number of the attempt that failed, and when the next begins (seconds since 1970).

    ``result`` itself is what plain Celery gives, so that ``AsyncResult`` does not change, with two exceptions: what
    plain Celery cannot decode stays as it is, and an exception that cannot be rebuilt is replaced by the error that
    says so. Serializers other than JSON go Celery's own way; pickles are never loaded.
    """

    def decode(self, payload: Any) -> Any:
        """Decode one stored payload.

        Args:
            payload: bytes, text or a buffer as it was stored, compressed or not; None stays None.

        Returns:
            Plain JSON values; for other serializers what Celery gives.

        Raises:
            kombu.exceptions.DecodeError: if the payload is not what the configured serializer writes.
            kombu.exceptions.ContentDisallowed: if the serializer is not accepted, or is pickle.
        """
        if payload is None:
            return None
        if self.content_type == _PICKLE:
            raise ContentDisallowed("Refusing to load a pickled result: a pickle can run code. Store results as JSON.")
        accept = self.accept
        if self.content_type != "application/json" or (accept is not None and "application/json" not in accept):
            return super().decode(payload)
        return _loads(payload, getattr(self.app, "max_payload_bytes", None))

    def decode_result(self, payload: Any) -> Any:
        """Decode a payload that holds a whole meta, as key/value stores keep it."""
        meta = self.decode(payload)
        return self.meta_from_decoded(self.open_meta(meta, has_types(payload)))

    @property
    def lock(self) -> Lock | None:
        """The keys of the app."""
        return getattr(self.app, "lock", None)

    def locked(self, task_id: str, state: str, result: Any, traceback: Any, request: Any) -> tuple[Any, Any]:
        """Return value and traceback as they are stored: together and signed, where there are keys."""
        lock = self.lock
        if lock is None:
            return result, traceback
        children = self.current_task_children(request)
        told = {"result": result, "traceback": traceback, "children": children}
        return lock_result(lock, str(task_id), state, told, self.encode), None

    def _unlocked(self, meta: dict[str, Any], typed: bool) -> bool:
        """Put in a meta what was signed; return whether kombu's typed values may be in it.

        Raises:
            PayloadError: if no holder of the keys has stored it.
        """
        lock, value = self.lock, meta.get("result")
        if lock is None and not is_locked(value):
            return typed
        try:
            found = unlock_result(lock, meta.get("task_id"), meta.get("status"), value)
        except MessageRefused as refused:
            raise PayloadError(
                f"the result of task {meta.get('task_id')} is not to be trusted: {refused}",
                "Look at who may write to the result backend, and whether all workers and callers have the same "
                "serialization.signing_keys.",
            ) from None
        if found is None:
            return typed
        meta.update(result=found.get("result"), traceback=found.get("traceback"), children=found.get("children"))
        return True

    def apply_chord(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a chord as Celery does.

        Raises:
            UnsupportedFeature: if results are signed: Celery keeps those of a chord in a place of its own, unsigned,
                and the chord's last task would get whatever is there.
        """
        if self.lock is not None:
            raise UnsupportedFeature(
                "chords do not work with signing_keys: their parts are not signed",
                "Let a task wait for the others' results and call the last one, or count in a database.",
            )
        return super().apply_chord(*args, **kwargs)

    def open_meta(self, meta: Any, typed: bool) -> dict[str, Any]:
        """Keep the raw result and error beside what Celery's readers expect, in place.

        Args:
            meta: what was decoded: a meta with ``status`` and ``result``, or what somebody else has written.
            typed: whether kombu's typed values may be in it.

        Returns:
            The same mapping.

        Raises:
            kombu.exceptions.DecodeError: if it is no meta: anybody may have written it.
            PayloadError: if there are keys, and no holder of them has stored it.
        """
        if not isinstance(meta, dict) or not isinstance(meta.get("status"), str):
            raise DecodeError("A stored result is no mapping with a status.")
        typed = self._unlocked(meta, typed)
        raw = meta.get("result")
        meta["result_json"] = raw
        if meta.get("status") in self.EXCEPTION_STATES and isinstance(raw, Mapping):
            meta["error_json"] = raw
        if typed:
            for key in ("result", "args", "kwargs"):
                if key in meta:
                    meta[key] = revive(meta[key])
        return meta

    def meta_from_decoded(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Turn a decoded meta into what Celery's readers expect; may be called again on its own answer."""
        if "result_json" not in meta:
            self.open_meta(meta, typed=True)
        try:
            return cast("dict[str, Any]", super().meta_from_decoded(meta))
        except Exception as exc:  # noqa: BLE001
            # A stored error that names no exception class, or something that is none (Celery calls it an attack),
            # fails its own reader only, not everybody who waits beside it.
            meta["result"] = exc
            return meta

    def see_children(self, meta: Mapping[str, Any]) -> None:
        """Look whether Celery can make results of a meta's children: it does so where the meta is handed over.

        Raises:
            kombu.exceptions.DecodeError: if it cannot.
        """
        children = meta.get("children")
        if not children:
            return
        try:
            for child in children:
                result_from_tuple(child, self.app)
        except Exception as exc:
            raise DecodeError(f"The children of a stored result are none ({type(exc).__name__}).") from exc

    def meta_or_failure(self, task_id: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a meta that can be handed to whoever waits for the task; what cannot be read, as the task's failure.

        One thread may read what another one waits for: an error there would end the wait of the wrong one.

        Args:
            task_id: which task, whatever the meta says.
            read: returns the meta.
        """
        try:
            meta = read()
            self.see_children(meta)
        except Exception as exc:  # noqa: BLE001 - whoever waits for this one gets it
            # with the raw value that it has not, or it would be opened as one that somebody has stored
            blank: dict[str, Any] = {"traceback": None, "children": None, "result_json": None}
            return {**blank, "task_id": task_id, "status": FAILURE, "result": exc}
        meta["task_id"] = task_id
        return meta

    def prepare_exception(self, exc: Any, serializer: str | None = None) -> Any:
        """Prepare an exception for storage as Celery does, and add its text, which the arguments may not hold."""
        original = _as_raised(exc)
        prepared = super().prepare_exception(original, serializer)
        if isinstance(prepared, dict):
            prepared["exc_text"] = error_text(original)
            following = getattr(exc, NEXT_ATTEMPT, None)
            if following is not None:
                prepared["retry"] = following
            if isinstance(original, OSError) and isinstance(original.filename, str) and len(original.args) == 2:
                # its args leave out which file
                prepared["exc_message"] = [*prepared["exc_message"], original.filename]
        return prepared


def _as_raised(exc: Any) -> Any:
    """Return the exception that the task raised, where Celery hands over a stand-in.

    For an exception that cannot be pickled, Celery's tracer stores the nearest base class that can, or a wrapper, and
    with them another type and another text. It does so while it handles the original.
    """
    raised = sys.exc_info()[1]
    if raised is None or raised is exc:
        return exc
    if isinstance(exc, UnpickleableExceptionWrapper):
        told = (exc.exc_module, exc.exc_cls_name)
        return raised if told == (type(raised).__module__, type(raised).__name__) else exc
    return raised if type(exc) in type(raised).__mro__[1:] and exc.args == raised.args else exc


def error_text(exc: BaseException) -> str:
    """What the exception says of itself, at most ``ERROR_TEXT_LIMIT`` characters, whatever its ``__str__`` does."""
    try:
        text = str(exc)
    except Exception as broken:  # noqa: BLE001
        # Users' exceptions format themselves in __str__, and that may fail for the very reason they were raised.
        text = f"<{type(exc).__qualname__}: its text cannot be made, __str__ raised {type(broken).__name__}>"
    if len(text) > ERROR_TEXT_LIMIT:
        text = text[: ERROR_TEXT_LIMIT - 1] + "…"
    # Lone surrogates cannot be stored by every serializer and server.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def has_types(payload: Any) -> bool:
    """Whether kombu's typed values may be in a payload: true also where that cannot be told from outside."""
    if isinstance(payload, str):
        return _MARKER.decode() in payload
    if isinstance(payload, memoryview):
        payload = payload.tobytes()
    if isinstance(payload, (bytes, bytearray)):
        return _MARKER in payload or payload.startswith(b"\x00")  # compressed: look inside by walking
    return payload is not None


def revive(value: Any) -> Any:
    """Turn kombu's typed values inside a JSON value into what they stand for.

    Args:
        value: anything ``json.loads`` returns.

    Returns:
        The value with ``datetime``, ``Decimal``, ``UUID`` … where kombu would put them; what kombu cannot decode
        stays as it is. Values that hold none are returned as they are, not copied.
    """
    try:
        return _revive(value)
    except RecursionError:
        return value


def _revive(value: Any) -> Any:
    if isinstance(value, list):
        items = [_revive(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if not isinstance(value, dict):
        return value
    fields = {key: _revive(item) for key, item in value.items()}
    if fields.keys() == {"__type__", "__value__"}:
        try:
            return _typed(fields)
        except Exception:  # noqa: BLE001
            # Not kombu's: a user's mapping that only looks like it, or a type nobody registered here.
            return value
    return fields if any(fields[key] is not value[key] for key in value) else value


def _loads(payload: Any, max_bytes: int | None) -> Any:
    try:
        return json.loads(_inflated(payload, max_bytes))
    except MessageRefused as exc:
        raise DecodeError(f"A stored result is refused: {exc}") from exc
    except (ValueError, RecursionError, TypeError, LookupError, OSError, EOFError, zlib.error) as exc:
        # The payload itself stays out of the message: it may hold anything.
        raise DecodeError(f"A stored result is not JSON ({type(exc).__name__}).") from exc


def _inflated(payload: Any, max_bytes: int | None) -> Any:
    """Return a payload as it was before it was compressed: half a megabyte may claim to be hundreds."""
    octets = payload.tobytes() if isinstance(payload, memoryview) else payload
    if max_bytes is None or not (isinstance(octets, bytes | bytearray) and octets.startswith(COMPRESSED_PAYLOAD_MAGIC)):
        return decompress_payload(octets)
    method, _, body = octets[len(COMPRESSED_PAYLOAD_MAGIC) :].partition(b"\0")
    return decompressed(body, method.decode(), max_bytes + _BESIDE)
