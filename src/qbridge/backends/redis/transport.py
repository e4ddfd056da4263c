"""How the Redis broker is spoken to under ``defaults="safe"``: kombu's transport, its priority lists in our order.

kombu keeps one list per priority step and reads them lowest number first, so nothing can come before the list that
carries a queue's own name (step 0) and with it all unmarked messages. Read in the order 9, 0, 3, 6, step 9 is *high*,
step 0 *normal*, step 3 *low*: unmarked messages stay in the plain list, where ``LLEN`` and autoscalers look for them,
and a plain Celery worker still consumes every list.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["CONSUME_ORDER", "derive"]

CONSUME_ORDER = (9, 0, 3, 6)


class _OurOrder:
    """Mixin for kombu's Redis channels."""

    priority_steps = CONSUME_ORDER

    def priority(self, number: int) -> int:
        """Return the step of a priority number: the largest that is not above it (kombu bisects its own order)."""
        return max((step for step in self.priority_steps if step <= number), default=0)


@cache
def derive(transport: type[Any]) -> type[Any]:
    """Return a subclass of one of kombu's Redis transports (plain, TLS, socket, Sentinel) with our channel."""
    channel = type("Channel", (_OurOrder, transport.Channel), {"__doc__": transport.Channel.__doc__})
    return type(transport.__name__, (transport,), {"Channel": channel, "__doc__": transport.__doc__})
