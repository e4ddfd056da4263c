"""Which choices do not work together, and what should be written instead?

Checked at construction, so that no worker finds out at night. Under ``defaults="celery"`` only what can never work is
refused: an existing fleet is joined as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.rpc import RpcResults
from qbridge.config.faults import Fault
from qbridge.config.transport_options import check_transport_options

if TYPE_CHECKING:
    from qbridge.config.bridge_config import BridgeConfig
    from qbridge.retry import Retry

__all__ = ["cross_faults", "outlived"]


def cross_faults(config: BridgeConfig) -> Iterator[Fault]:
    """Look at fields that must fit one another.

    Args:
        config: valid field by field.

    Yields:
        One fault per pair that does not fit.
    """
    yield from _queues(config)
    yield from _time_limits(config)
    yield from _keys(config)
    yield from check_transport_options(config)
    if config.defaults == "celery":
        yield from _celerys_worker(config)
    if config.defaults == "safe":
        yield from _default_queue(config)
        yield from _results(config)


def _queues(config: BridgeConfig) -> Iterator[Fault]:
    names = [queue.name for queue in config.queues]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Fault(("queues",), f"queue {name!r} is there twice", "keep one of them")
    for name in sorted(names):
        if f"{name}.dead" in names:
            what = f"queue '{name}.dead' is where the dead letters of {name!r} go"
            yield Fault(("queues",), what, "give it another name")
    for queue in config.queues:
        if not isinstance(config.broker, RabbitMQBroker):
            if queue.type is not None:
                what = f"queue {queue.name!r} has type={queue.type!r}, and only RabbitMQ has queue types"
                yield Fault(("queues",), what, "leave type out")
            if queue.max_priority is not None:
                what = f"queue {queue.name!r} has max_priority, which only RabbitMQ's classic queues need"
                yield Fault(("queues",), what, "leave max_priority out: priorities work on this broker without it")


def _celerys_worker(config: BridgeConfig) -> Iterator[Fault]:
    for name in ("watchdog", "health_file", "health_port", "store_timeout"):
        if name in config.worker.model_fields_set and getattr(config.worker, name) not in (None, 0.0):
            what = f"{name} is read by qbridge's own worker, and defaults='celery' runs Celery's"
            yield Fault(("worker", name), what, "leave it out, or write defaults='safe'")
    results = config.results
    if "cleanup_interval" in results.model_fields_set and getattr(results, "cleanup_interval", None) is not None:
        what = "cleanup_interval is read by qbridge's own worker, and defaults='celery' runs Celery's"
        yield Fault(("results", "cleanup_interval"), what, "leave it out, let beat remove what has expired")


def _keys(config: BridgeConfig) -> Iterator[Fault]:
    serialization = config.serialization
    if not serialization.signing_keys:
        return
    if config.defaults == "celery":
        yield Fault(
            ("serialization", "signing_keys"),
            'under defaults="celery" workers are Celery\'s own, which look at no signature',
            'write defaults="safe", or leave the keys out',
        )
    for name, why in (
        ("worker_consumer", "the worker's consumer is what looks at signatures"),
        ("task_protocol", "only messages of protocol 2 have headers to sign"),
    ):
        if config.celery.get(name) not in (None, 2):
            yield Fault(("celery", name), f"there are signing_keys, and {why}", "leave one of them out")
    if serialization.encryption_keys and config.celery.get("result_extended"):
        yield Fault(
            ("celery", "result_extended"),
            "stores arguments beside results, in clear, and there are encryption_keys",
            "leave one of them out",
        )


def _default_queue(config: BridgeConfig) -> Iterator[Fault]:
    queue = config.queue(config.default_queue)
    if queue is not None and not queue.declare:
        yield Fault(
            ("default_queue",),
            f"the default queue {queue.name!r} has declare=False: tasks without a queue of their own would go to a "
            "queue that this bridge never creates",
            "name a queue of your own as default_queue, and this one with queue=... on the tasks that belong there",
        )


def _time_limits(config: BridgeConfig) -> Iterator[Fault]:
    hard, soft = config.celery.get("task_time_limit"), config.celery.get("task_soft_time_limit")
    if hard is not None and soft is not None and soft > hard:
        yield Fault(
            ("celery", "task_soft_time_limit"),
            "is above task_time_limit: the task would be killed before it is told to stop",
            "make the soft limit the smaller one",
        )
    if config.defaults == "safe" and config.worker.pool != "process":
        for name in ("task_time_limit", "task_soft_time_limit"):
            if config.celery.get(name) is not None:
                yield Fault(
                    ("celery", name),
                    f"worker.pool={config.worker.pool!r} cannot enforce time limits: Celery ignores them there",
                    "write worker.pool='process', or leave the limit out",
                )


def _results(config: BridgeConfig) -> Iterator[Fault]:
    if isinstance(config.results, RpcResults) and not config.broker.capabilities.rpc_results:
        yield Fault(
            ("results",),
            f"rpc results travel over the broker, and {config.broker.kind} does not carry them",
            "write a Redis or database URL, or use RabbitMQ as the broker",
        )
    if config.retry is not None:
        what = outlived(config, config.retry)
        if what is not None:
            todo = "write a larger results.expires, or a Retry with fewer or shorter waits"
            yield Fault(("results", "expires"), what, todo)


def outlived(config: BridgeConfig, retry: Retry) -> str | None:
    """Return how results expire before a retry has ended; None if they do not, or if that cannot be told.

    Args:
        config: has the results.
        retry: of the config or of a task.
    """
    expires, longest = getattr(config.results, "expires", None), retry.longest()
    if expires is None or longest is None or longest < expires:
        return None
    return f"results expire after {expires:g} s, before the last retry, {longest:g} s after the first attempt"
