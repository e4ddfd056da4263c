"""The task on qbridge: what its workers load, and what the sender sends with."""

from __future__ import annotations

import os
from typing import Any

from celery.signals import worker_ready

from bench.faults.cells import HEARTBEAT, LEASE, PUBLISH_TIMEOUT
from bench.faults.recorder import Again
from bench.faults.work import do, say_ready
from bench.faults.workload import ATTEMPTS, TASK
from qbridge import Bridge, BridgeConfig, RabbitMQBroker, RedisBroker, Retry, TaskContext, WorkerConfig

__all__ = ["bridge", "work"]


def _broker(url: str) -> Any:
    if url.startswith("amqp"):
        return RabbitMQBroker.from_url(url).model_copy(
            update={"heartbeat": HEARTBEAT, "publish_timeout": PUBLISH_TIMEOUT}
        )
    if url.startswith("redis"):
        return RedisBroker.from_url(url).model_copy(update={"lease": LEASE, "publish_timeout": PUBLISH_TIMEOUT})
    return url


def _worker() -> WorkerConfig:
    pool: Any = os.environ["FAULTS_POOL"]
    return WorkerConfig(pool=pool, concurrency=int(os.environ["FAULTS_CONCURRENCY"]))


bridge = Bridge(
    BridgeConfig(broker=_broker(os.environ["FAULTS_BROKER"]), results=os.environ["FAULTS_RESULTS"], worker=_worker())
)


@bridge.task(
    name=TASK, context=True, retry=Retry(on=Again, attempts=ATTEMPTS, wait_initial=0.5, wait_max=2, wait_jitter=0.5)
)
def work(ctx: TaskContext, number: int, pieces: int = 0, pause: float = 0.0, failures: int = 0) -> int:
    """Run one attempt."""
    return do(number, ctx.attempt, pieces, pause, failures)


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _say_ready(sender: Any = None, **_: Any) -> None:
    say_ready(str(sender.hostname))
