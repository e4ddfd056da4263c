"""What do the workers of the soak run? Tasks that end well, that fail, and that fail twice first."""

from __future__ import annotations

import os
from typing import Any

from bench.faults.recorder import Again
from qbridge import Bridge, BridgeConfig, RabbitMQBroker, RedisBroker, Retry, TaskContext

__all__ = ["bridge", "fails", "tried", "works"]

BROKER, RESULTS = "SOAK_BROKER", "SOAK_RESULTS"
"""Environment variables: the URLs."""


def _broker(url: str) -> Any:
    kinds: dict[str, Any] = {"amqp": RabbitMQBroker, "redis": RedisBroker}
    kind = kinds.get(url.partition(":")[0])
    return url if kind is None else kind.from_url(url).model_copy(update={"publish_timeout": 30.0})


bridge = Bridge(BridgeConfig(broker=_broker(os.environ[BROKER]), results=os.environ[RESULTS]))


@bridge.task(name="soak.works")
def works(number: int, text: str) -> dict[str, Any]:
    """End well."""
    return {"number": number, "text": text}


@bridge.task(name="soak.fails")
def fails(number: int) -> None:
    """Fail, with a traceback to store."""
    raise ValueError(f"{number} does not work")


@bridge.task(
    name="soak.tried", context=True, retry=Retry(on=Again, attempts=3, wait_initial=0.2, wait_max=0.4, wait_jitter=0.2)
)
def tried(ctx: TaskContext, number: int) -> int:
    """Fail twice, and then end well."""
    if not ctx.is_last_attempt:
        raise Again(str(number))
    return number
