"""How does a worker send a message again that it has received: its body untouched, confirmed before the old one goes?

It goes to the broker's schedule, to the dead letters, or back to its queue with what was learnt in its headers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from kombu.entity import Queue

from qbridge.backends.base import HEADER_NOT_BEFORE, TAKEN_FROM
from qbridge.backends.deadline import deadline
from qbridge.dead_letters.letter import ADDRESSES, HEADER_DEAD_LETTER, HEADER_LOSSES
from qbridge.worker.unlocking import received

__all__ = ["PATIENCE", "headers_of", "losses_of", "pause_of", "put_off", "queue_of", "raw_body", "send_again"]

_MOST_LOSSES = 2**31
"""More than any limit: a number of any length would be one that cannot be written."""

PATIENCE = 5.0
"""Seconds for the broker to take a message: the worker's loop waits."""

_SHORTEST, _LONGEST = 1.0, 30.0  # seconds that a message rests which goes around

# Not ``expiration``: a message that is given back or kept does not vanish from there.
_PROPERTIES = ("correlation_id", "reply_to", "priority", "message_id", "timestamp", "type", "app_id")

# RabbitMQ drops a message that comes back to a queue of its ``x-death`` list: it takes the delay for a cycle.
# What it has counted begins anew with each message.
_NOT_SENT_AGAIN = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")


def headers_of(message: Any) -> Mapping[str, Any]:
    """Return the headers of a message; empty where somebody put something else in their place."""
    headers = message.headers
    return headers if isinstance(headers, Mapping) else {}


def queue_of(consumer: Any, message: Any) -> str:
    """Return the name of the queue that a message was taken from.

    Brokers of ours say it, and RabbitMQ by the consumer's tag. What the sender wrote tells it for others only: a
    routing key may be a word that a pattern matches, or the name of another queue.

    Args:
        consumer: the worker's.
        message: as it was received.
    """
    info = message.delivery_info
    taken_from = info.get(TAKEN_FROM)
    if taken_from is not None:
        return str(taken_from)
    tags: Mapping[str, str] = consumer.task_consumer._active_tags
    here = info.get("consumer_tag")
    for name, tag in tags.items():
        if tag == here:
            return name
    key, queues = info.get("routing_key"), consumer.app.amqp.queues
    if key in tags or key in queues:
        return str(key)
    where = (info.get("exchange"), key)
    named = (name for name in tags if (queue := queues[name]) and (queue.exchange.name, queue.routing_key) == where)
    return next(named, str(consumer.app.conf.task_default_queue))


def losses_of(message: Any) -> int:
    """Return how many workers or processes were lost with a message, as far as brokers count that.

    Redis and the embedded broker count the deaths of whoever held it, RabbitMQ every return to a quorum queue. What
    was counted before the message was last sent again is in a header.

    Args:
        message: as it was received.
    """
    headers = headers_of(message)
    counted = message.delivery_info.get("loss_count")
    if counted is None:
        counted = headers.get("x-delivery-count")
    counts = (counted, headers.get(HEADER_LOSSES))
    return min(sum(number for number in counts if isinstance(number, int) and number > 0), _MOST_LOSSES)


def pause_of(headers: Mapping[str, Any], since: str) -> tuple[float, float]:
    """Return how long a message that goes around rests now: as long as it has gone around, a second at least.

    Args:
        headers: of the message.
        since: name of the header that says since when it goes around.

    Returns:
        Since when, for that header, in seconds since 1970; and the pause in seconds, half a minute at most.
    """
    now, told = time.time(), headers.get(since)
    began = float(told) if isinstance(told, int | float) and 0 <= told <= now else now  # neither NaN nor a time to come
    return began, min(max(_SHORTEST, now - began), _LONGEST)


def raw_body(message: Any) -> bytes:
    """Return the bytes of a body (of what came, too); py-amqp has made text of them where it knew the encoding."""
    body = message.body
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    if not isinstance(body, str):
        return b"" if body is None else json.dumps(body, default=repr).encode()
    try:
        return body.encode(message.content_encoding or "utf-8")
    except (LookupError, ValueError):  # also one with a null character in it
        return body.encode("utf-8", "surrogatepass")


def _is_sent_again(name: Any) -> bool:
    return not (str(name).startswith(_NOT_SENT_AGAIN) or name in ADDRESSES)


def send_again(
    app: Any,
    message: Any,
    headers: Mapping[str, Any],
    exchange: str,
    routing_key: str,
    *,
    declare: Iterable[Queue] = (),
    **properties: Any,
) -> None:
    """Publish what was received, and wait for the broker to confirm it.

    Args:
        app: the bridge's.
        message: as it was received.
        headers: that it has from now on.
        exchange: where it goes.
        routing_key: likewise.
        declare: what has to be there.
        properties: other than the message's; None: without.

    Raises:
        Exception: whatever the broker or the way to it does.
    """
    kept = {name: message.properties[name] for name in _PROPERTIES if message.properties.get(name)} | properties
    # a dead letter is passed on as it came: a new signature would vouch for it
    as_it_came = HEADER_DEAD_LETTER in headers
    content = received(message) if as_it_came else message
    with deadline(PATIENCE), app.producer_or_acquire() as producer:
        limit = producer.max_payload_bytes
        producer.max_payload_bytes = None  # the broker has the message already
        producer.signing = not as_it_came
        try:
            producer.publish(
                raw_body(content),
                exchange=exchange,
                routing_key=routing_key,
                declare=list(declare),
                headers={name: value for name, value in headers.items() if _is_sent_again(name)},
                # without one kombu would make JSON of the body
                content_type=content.content_type or "application/data",
                content_encoding=content.content_encoding or "binary",
                delivery_mode=2,
                confirm_timeout=PATIENCE,
                retry=False,
                **{name: value for name, value in kept.items() if value is not None},
            )
        finally:
            producer.max_payload_bytes = limit
            producer.signing = True


def put_off(consumer: Any, message: Any, seconds: float, headers: Mapping[str, Any]) -> bool:
    """Send a message to its own queue again, to arrive after a while: on the broker's time, and in nobody's way.

    Args:
        consumer: the worker's.
        message: as it was received; it is up to the caller to acknowledge it.
        seconds: from now; RabbitMQ counts whole ones.
        headers: that it has from now on.

    Returns:
        False if this queue knows no delays: nothing was sent then.

    Raises:
        Exception: whatever the broker or the way to it does.
    """
    app, name = consumer.app, queue_of(consumer, message)
    headers = {HEADER_LOSSES: losses_of(message), **headers}
    if consumer.connection.transport.driver_type != "amqp":
        send_again(app, message, {**headers, HEADER_NOT_BEFORE: round(time.time() + seconds, 3)}, "", name)
        return True
    known = dict(app.amqp.queues)  # asked for another name it would make a queue
    queue = known.get(name)
    with deadline(PATIENCE):
        where = None if queue is None else app.native_delays.route(queue, seconds)
    if where is None:
        return False
    send_again(app, message, headers, *where)
    return True
