"""How a message of a typed task becomes a request: its body is read once, as plain JSON."""

from __future__ import annotations

import json
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import registry

from qbridge.versions import version_in
from qbridge.worker.resending import losses_of
from qbridge.worker.screening import fault_of

__all__ = ["typed"]


def typed(task: Any, app: Any, consumer: Any, **options: Any) -> Any:
    """Return Celery's own message handler, fed with a body that kombu's JSON hooks have not rewritten.

    kombu makes objects of every ``{"__type__": …, "__value__": …}`` in a body, a user's own data included, and
    cannot read unknown ones. The signature looks for such values where an annotation expects them.
    """
    handle = default(task, app, consumer, **options)
    accept = consumer_accept(app)
    # what a task is declared with its worker reads, whatever the app's other messages are
    own_type = registry.name_to_type.get(task.serializer) if task.definition.options.get("serialization") else None

    bound, version = task.max_redeliveries, task.definition.version
    leave_newer = getattr(consumer, "on_newer_version", None)  # under defaults="celery" the consumer is Celery's

    def typed_message_handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **rest: Any) -> Any:
        if leave_newer is not None and version_in(message.headers) > version:
            return leave_newer(message, task.definition)
        message.consumer = consumer  # whom the request asks to keep what it gives up
        if bound is not None and message.delivery_info.get("redelivered") and losses_of(message) > bound:
            message.lost = True  # not run any more
        if body is None:
            if message.content_type == "application/json":
                if "application/json" not in accept and "json" not in accept:
                    raise ContentDisallowed("JSON is not in accept_content")
                message._decoded_cache = _plain_body(message)
                return handle(message, body, ack, reject, callbacks, **rest)
            if message.content_type == own_type and message.accept is not None:
                message.accept = {*message.accept, own_type}
            if not isinstance(message.payload, list | tuple):
                raise InvalidTaskError("the body is not a list of arguments")
        elif (fault := fault_of(body)) is not None:  # protocol 1: headers and arguments in one mapping
            raise InvalidTaskError(fault)
        return handle(message, body, ack, reject, callbacks, **rest)

    return typed_message_handler


def consumer_accept(app: Any) -> frozenset[str]:
    """Return the content types and serializer names that the app accepts."""
    return frozenset(app.conf.accept_content or ())


def _plain_body(message: Any) -> list[Any]:
    try:
        raw = message.body
        if isinstance(raw, memoryview):
            raw = raw.tobytes()
        if isinstance(raw, bytes):
            raw = raw.decode(message.content_encoding if message.content_encoding not in (None, "binary") else "utf-8")
        body = json.loads(raw)
    except (ValueError, LookupError, RecursionError) as error:
        raise DecodeError(f"the body is not JSON: {error}") from error
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], list) and isinstance(body[1], dict)):
        raise InvalidTaskError("the body is not [args, kwargs, embed], as task protocol 2 has it")
    if not isinstance(body[2], dict | None):
        raise InvalidTaskError("the third part of the body is not a mapping")
    return body
