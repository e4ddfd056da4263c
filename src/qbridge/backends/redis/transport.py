"""How the Redis broker is spoken to under ``defaults="safe"``: kombu's transport, with claims that are leased.

kombu pops a message and then notes that it did: what it popped when it dies is gone. Here one script moves messages
from the lists to ``unacked`` and leases them to this consumer, as many at once as it has room for. A thread renews the
lease for as long as the process lives, so a task may run longer than any timeout, and what a dead worker held is taken
over.
Lists, envelopes and ``unacked`` are kombu's: plain Celery's producers and workers share the queues.

An idle consumer waits in Redis for an entry of a queue's stream, which our senders write, and looks every 100 ms,
because plain producers do not. Nothing is popped by waiting.

Messages with an ``eta`` to come lie in a schedule until any consumer of ours moves those that are due to their list.

Priorities in our order. kombu keeps one list per priority step and reads them lowest number first, so nothing can come
before the list that carries a queue's own name (step 0) and with it all unmarked messages. Read in the order
9, 0, 3, 6, step 9 is *high*, step 0 *normal*, step 3 *low*: unmarked messages stay in the plain list, where ``LLEN``
and autoscalers look for them, and a plain Celery worker still consumes every list.

Anybody can push anything on a list. What is no message at all ends kombu's event loop, and with it the worker; here it
is thrown away with an error in the log.
"""

from __future__ import annotations

import os
import threading
import uuid
from functools import cache
from typing import Any

from kombu.transport import virtual

from qbridge.backends.redis.broadcasts import Broadcasts
from qbridge.backends.redis.claiming import Claiming
from qbridge.backends.redis.inherited import not_for_children
from qbridge.backends.redis.leasing import Leasing
from qbridge.backends.redis.listening import Listening
from qbridge.backends.redis.places import Places
from qbridge.backends.redis.qos import QoS
from qbridge.backends.redis.sending import Sending
from qbridge.backends.redis.staying import Staying
from qbridge.serialization.limits import BoundedMessage

__all__ = ["CONSUME_ORDER", "derive"]

CONSUME_ORDER = (9, 0, 3, 6)


class _Message(virtual.Message, BoundedMessage):
    """kombu's message, which is not decompressed to any size."""


class _OurChannel(Places, Sending, Claiming, Leasing, Staying, Listening, Broadcasts):
    """Mixin for kombu's Redis channels."""

    Message = _Message
    QoS = QoS
    priority_steps = CONSUME_ORDER

    #: Seconds without a renewal after which others take over what is held.
    lease = 30.0

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._holder = ""
        self._owners = 0
        self._process = os.getpid()
        self._settling = threading.RLock()
        self._no_ack: set[str] = set()
        self._asked: tuple[str, Any] = ("", None)
        self._wait = None
        self._since = 0
        self._woken: dict[str, str] = {}
        self._whole = False
        self._wrong: set[bytes] = set()
        super().__init__(*args, **kwargs)
        self._holder = f"{uuid.uuid4().hex}:{int(self.lease * 1000)}"  # lease: known by now, and read by sweeps

    def _get_pool(self: Any, *args: Any, **kwargs: Any) -> Any:
        make = super()._get_pool  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        return not_for_children(make(*args, **kwargs))


@cache
def derive(transport: type[Any]) -> type[Any]:
    """Return a subclass of one of kombu's Redis transports (plain, TLS, socket, Sentinel) with our channel."""
    options = (*transport.Channel.from_transport_options, "lease")
    body = {"__doc__": transport.Channel.__doc__, "from_transport_options": options}
    channel = type("Channel", (_OurChannel, transport.Channel), body)
    return type(transport.__name__, (transport,), {"Channel": channel, "__doc__": transport.__doc__})
