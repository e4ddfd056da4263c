"""Has this been sent already? One send per idempotency key, and one per arguments of a unique task.

Whoever sends first leaves a claim in the result backend: the key, the id of its task, and a digest of the arguments.
Whoever comes later is given that task's handle. The claim says ``sending`` until the broker has the message. A sender
that dies in between, or cannot tell whether the message arrived, is followed by one that sends the same id again,
marked so that a worker looks first whether the task has run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from celery import states

from qbridge.backends.claims import Claim, ClaimStore, Wanted, claim_store
from qbridge.backends.deadline import deadline
from qbridge.backends.urls import mask_url
from qbridge.exceptions import (
    ArgumentsError,
    BrokerUnavailable,
    ConfigurationError,
    QBridgeError,
    ResultsUnavailable,
    ResultUnknown,
    UnsupportedFeature,
)
from qbridge.standing import AGAIN, HEADER_ONCE
from qbridge.task import Call, TaskDefinition

__all__ = ["Key", "SendOnce", "key_of", "refuse_keys"]

_SENDING, _SENT, _DOUBTFUL = "sending", "sent", "doubtful"
_LOOK = 0.02
# Seconds beyond publish_timeout after which a sender that has not said "sent" is taken for dead.
_GRACE = 5.0


@dataclass(frozen=True)
class Key:
    """What may be sent once.

    Args:
        claim: the key of the claim.
        task: name of the task.
        told: as the user knows it, for messages.
        digest: of the arguments.
        until_it_ends: True for a unique task: the next may be sent when this one has ended.
    """

    claim: str
    task: str
    told: str
    digest: str
    until_it_ends: bool


def key_of(definition: TaskDefinition, call: Call, given: str | None) -> Key | None:
    """Return the key under which a call is sent, or None.

    Args:
        definition: of the task.
        call: its encoded arguments.
        given: the ``idempotency_key``.

    Raises:
        ConfigurationError: if the task is unique and a key is given too, or if ``unique`` returns no text.
    """
    unique = definition.options.get("unique", False)
    if given is None and unique is False:
        return None
    arguments = definition.signature.by_name(*call)
    digest = _digest(json.dumps(arguments, sort_keys=True, default=repr))
    if given is not None:
        if unique is not False:
            raise ConfigurationError(
                f"task {definition.name} is unique, and an idempotency_key was given too",
                "Take one of them: the key, or unique=... where the task is declared.",
            )
        return Key(_digest("key", definition.name, given), definition.name, f"key {given!r}", digest, False)
    told: object = digest if isinstance(unique, bool) else unique(arguments)
    if not isinstance(told, str):
        raise ConfigurationError(
            f"unique=... of task {definition.name} returned a {type(told).__name__}", "Return a text."
        )
    return Key(_digest("unique", definition.name, told), definition.name, "arguments", digest, True)


def refuse_keys(definition: TaskDefinition, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be sent in bulk.

    Raises:
        UnsupportedFeature: if the call has a key, or the task is unique.
    """
    if "idempotency_key" in options or definition.options.get("unique", False) is not False:
        raise UnsupportedFeature(
            f"send_many does not look whether a call of task {definition.name} was sent before",
            "Send calls with an idempotency_key, and those of unique tasks, one by one.",
        )


class SendOnce:
    """Sends what was not sent yet.

    Args:
        app: the bridge's app.
        bound: seconds that one send may take, with the wait for another one.
        takes: seconds that must be left for it to begin when that other one has failed.
        window: seconds for which a key is remembered.
        state_of: returns the state of a task.
    """

    def __init__(self, app: Any, bound: float, takes: float, window: float, state_of: Callable[[str], str]) -> None:
        self._app = app
        self._bound = bound
        self._takes = takes
        self._window = window
        self._state_of = state_of

    def send(self, key: Key, options: dict[str, Any], publish: Callable[[dict[str, Any]], Any]) -> str:
        """Send, unless that was done, and return the id of the task.

        Args:
            key: what may be sent once.
            options: of the send, with ``task_id``.
            publish: sends with the given options.

        Raises:
            ArgumentsError: if the idempotency key was used with other arguments.
            ResultsUnavailable: if the result backend cannot tell; nothing was sent.
            UnsupportedFeature: if it keeps no claims.
            BrokerUnavailable: if the broker does not take the message, or another send with the key has used the time.
        """
        store = self._store()
        end = time.monotonic() + self._bound
        task_id, state = self._take(store, key, str(options["task_id"]), end)
        if state == _SENT:
            return task_id
        again = state == _DOUBTFUL
        headers = {**(options.get("headers") or {}), HEADER_ONCE: True}
        if again:
            headers[AGAIN] = True
        try:
            # Celery's own bounds stay as they are
            with deadline(end - time.monotonic()) if self._app.safe else nullcontext():
                publish({**options, "task_id": task_id, "headers": headers})
        except BaseException as error:
            arrived = getattr(error, "may_have_arrived", not isinstance(error, QBridgeError | ValueError | TypeError))
            self._say(store, key, task_id, _DOUBTFUL if arrived or again else None)
            raise
        self._say(store, key, task_id, _SENT)
        return task_id

    def _store(self) -> ClaimStore:
        store = claim_store(self._app.backend)
        if store is None:
            raise UnsupportedFeature(
                "an idempotency_key, or a unique task, needs results that keep claims: rpc and none do not",
                "Set results to redis://... or to a database.",
            )
        return store

    def _take(self, store: ClaimStore, key: Key, task_id: str, end: float) -> tuple[str, str]:
        """Return the id that counts, and whether its message is to be sent, is sent, or may be there."""
        wanted = Wanted(key.claim, task_id, self._window, note=f"{_SENDING} {key.digest}")
        waited = False
        while True:
            claim = self._asked(store, wanted)
            late = waited and end - time.monotonic() < self._takes
            if claim.holder == task_id:
                if late:
                    self._say(store, key, task_id, None)
                    raise _not_in_time(key, arrived=False)
                return task_id, _SENDING
            state, _, digest = claim.note.partition(" ")
            if not key.until_it_ends and digest != key.digest:
                raise ArgumentsError(
                    f"the idempotency {key.told} of task {key.task} was used with other arguments",
                    "A key stands for one call: use another one for another call.",
                    key.task,
                )
            if state == _SENT:
                if not (key.until_it_ends and self._has_ended(claim.holder)):
                    return claim.holder, _SENT
                wanted = Wanted(key.claim, task_id, self._window, note=wanted.note, over=claim.holder)
            elif state == _DOUBTFUL or claim.age > self._bound + _GRACE:
                if late:
                    raise _not_in_time(key, arrived=True)
                self._asked(store, Wanted(key.claim, claim.holder, self._window, note=f"{_SENDING} {digest}"))
                return claim.holder, _DOUBTFUL
            elif time.monotonic() > end:
                raise _not_in_time(key, arrived=True)
            else:
                waited = True
                time.sleep(_LOOK)  # somebody sends it just now

    def _asked(self, store: ClaimStore, wanted: Wanted) -> Claim:
        try:
            (claim,) = store.take("once", [wanted])
        except QBridgeError:
            raise
        except Exception as error:
            where = mask_url(str(self._app.backend.as_uri()))
            raise ResultsUnavailable(
                f"the result backend at {where} cannot say whether this was sent before: {type(error).__name__}",
                "Nothing was sent. Run `qbridge check`, and send again.",
            ) from error
        return claim

    def _has_ended(self, task_id: str) -> bool:
        try:
            return self._state_of(task_id) in states.READY_STATES
        except ResultUnknown:  # it was forgotten here
            return True

    def _say(self, store: ClaimStore, key: Key, task_id: str, state: str | None) -> None:
        """Note what became of the message; where that fails, the next sender finds ``sending``, and waits."""
        try:
            if state is None:
                store.release("once", key.claim, task_id)
            else:
                store.take("once", [Wanted(key.claim, task_id, self._window, note=f"{state} {key.digest}")])
        except Exception as error:  # noqa: BLE001 - the message is what counts
            self._app.log.get_default_logger().warning("Cannot note what became of a send: %s", type(error).__name__)


def _not_in_time(key: Key, *, arrived: bool) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"another send with the same {key.told} of task {key.task} has used the time for this one",
        "Send again: with the same key nothing is sent twice.",
        arrived,
    )


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()
