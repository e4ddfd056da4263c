"""What a ``BridgeConfig`` means to Celery: its settings, its queues, and the attributes of typed tasks.

Under ``defaults="safe"`` the settings below are written for the whole app, plain ``@app.task`` tasks included: the
closed list of the reference. Everything about delivery is an attribute of typed tasks alone.
Under ``defaults="celery"`` only what the user set is written.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from kombu.entity import Exchange, Queue

from qbridge.config import BridgeConfig, QueueConfig, overlay

__all__ = ["app_settings", "kombu_queue", "payload_limit", "routing_key", "task_attributes"]

_POOLS = {"process": "prefork", "thread": "threads", "solo": "solo"}
_CONTENT_TYPES = {"json": "application/json", "msgpack": "application/x-msgpack"}
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-_~")


def routing_key(queue: str) -> str:
    """Return the routing key of a queue: its name, percent-encoded but for letters, digits, ``-``, ``_`` and ``~``.

    Topic exchanges split keys at dots and read ``*`` and ``#``; native delays bind ``#.key`` on an exchange that all
    apps of a virtual host share, where a key ``reports.slow`` would match the queue ``slow`` too.
    """
    return "".join(
        character if character in _UNRESERVED else "".join(f"%{byte:02X}" for byte in character.encode())
        for character in queue
    )


def kombu_queue(config: BridgeConfig, queue: QueueConfig) -> Queue:
    """Return the declaration of one queue; what is decided here can never change on a server.

    RabbitMQ: a topic exchange of its own (``qbridge.NAME``: native delays need topic, and plain peers that declare a
    direct exchange called NAME must not clash), one argument ``x-queue-type``, and ``x-max-priority`` if asked for.
    Elsewhere, and under ``defaults="celery"``: what Celery itself would declare.
    """
    if not queue.declare:
        return Queue(queue.name, Exchange("", type="direct"), routing_key=queue.name, no_declare=True)
    if config.broker.kind != "rabbitmq" or config.defaults == "celery":
        return Queue(queue.name, Exchange(queue.name, type="direct"), routing_key=queue.name)
    kind = queue.type or ("classic" if queue.max_priority is not None else config.broker.queue_type)
    arguments: dict[str, Any] = {"x-queue-type": kind}
    if queue.max_priority is not None:
        arguments["x-max-priority"] = queue.max_priority
    exchange = Exchange(f"qbridge.{queue.name}", type="topic", durable=True)
    return Queue(queue.name, exchange, routing_key=routing_key(queue.name), durable=True, queue_arguments=arguments)


def app_settings(config: BridgeConfig) -> dict[str, Any]:
    """Return the settings for Celery's ``conf``; the user's raw ones come last and win."""
    settings = _safe(config) if config.defaults == "safe" else _as_celery(config)
    return overlay(settings, config.celery)


def _safe(config: BridgeConfig) -> dict[str, Any]:
    accept = [_CONTENT_TYPES["json"]]
    if config.serialization.format != "json":
        accept.append(_CONTENT_TYPES[config.serialization.format])
    return {
        # no pickle, and nothing else that was not asked for
        "accept_content": accept,
        "result_accept_content": [*accept],
        "task_serializer": config.serialization.format,
        # results are small and read by many: always JSON, so that any peer can read them
        "result_serializer": "json",
        "event_serializer": "json",
        "enable_utc": True,
        "timezone": config.timezone,
        # a name that nobody declared is a mistake, not a new queue that nobody consumes
        "task_create_missing_queues": False,
        "task_default_queue": config.default_queue,
        "imports": tuple(config.modules),
        # connections are tried again, for as long as it takes, and a closed channel does not end the worker
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,
        **_worker(config),
        **config.broker.celery_settings(),
        **config.results.celery_settings(),
    }


def _worker(config: BridgeConfig) -> dict[str, Any]:
    worker = config.worker
    settings: dict[str, Any] = {
        "worker_consumer": "qbridge.worker.consumer:BridgeConsumer",
        "worker_pool": _POOLS[worker.pool],
        "worker_prefetch_multiplier": worker.prefetch,
        "worker_soft_shutdown_timeout": worker.shutdown_timeout,
        # a run whose connection is gone will be delivered again: end it (process pool) instead of running it twice
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        # Celery's 4 s count while the parent connects anew and does not listen: it then kills processes that are up
        "worker_proc_alive_timeout": 30.0,
        # the application's logging and its standard output stay its own
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        **_optional_worker(config),
    }
    return settings


def _optional_worker(config: BridgeConfig) -> dict[str, Any]:
    worker = config.worker
    given = {
        "worker_concurrency": worker.concurrency,
        "worker_max_tasks_per_child": worker.max_tasks_per_child,
        "worker_max_memory_per_child": worker.max_memory_per_child,
    }
    return {name: value for name, value in given.items() if value is not None}


def _as_celery(config: BridgeConfig) -> dict[str, Any]:
    given = config.model_fields_set
    settings: dict[str, Any] = {}
    for field in ("broker", "results"):
        if field in given:  # else Celery's own default, or what is assigned to the app's settings
            settings |= getattr(config, field).minimal_celery_settings()
    if "timezone" in given:
        settings["timezone"] = config.timezone
    if "default_queue" in given:
        settings["task_default_queue"] = config.default_queue
    if config.modules:
        settings["imports"] = tuple(config.modules)
    if "serialization" in given and "format" in config.serialization.model_fields_set:
        settings["task_serializer"] = config.serialization.format
        settings["accept_content"] = ["json", config.serialization.format]
    if "worker" in given:
        fields = config.worker.model_fields_set
        settings.update(_optional_worker(config))
        if "pool" in fields:
            settings["worker_pool"] = _POOLS[config.worker.pool]
        if "prefetch" in fields:
            settings["worker_prefetch_multiplier"] = config.worker.prefetch
        if "shutdown_timeout" in fields:
            settings["worker_soft_shutdown_timeout"] = config.worker.shutdown_timeout
    return settings


def task_attributes(config: BridgeConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of the Celery task class behind one typed task.

    Args:
        config: the bridge's configuration.
        options: the options of the task's declaration.
    """
    attributes: dict[str, Any] = {
        name: options[name]
        for name in ("time_limit", "soft_time_limit", "rate_limit", "expires")
        if options.get(name) is not None
    }
    serializer = options.get("serialization")
    safe = config.defaults == "safe"
    if serializer is not None or safe:
        attributes["serializer"] = serializer or config.serialization.format
    if options.get("results") is not None:
        attributes["ignore_result"] = not options["results"]
    delivery = options.get("delivery") or (config.delivery if safe or "delivery" in config.model_fields_set else None)
    if delivery is not None:
        late = delivery == "at_least_once"
        attributes.update(acks_late=late, reject_on_worker_lost=late)
    if delivery == "at_least_once" and safe:
        # A killed child: the worker sends the message again, so many times, counted apart from attempts.
        attributes.update(reject_on_worker_lost=False, max_redeliveries=config.worker.max_redeliveries)
    return attributes


def payload_limit(config: BridgeConfig) -> int | None:
    """Return the largest body in bytes; under ``defaults="celery"`` there is none but what the user set."""
    if config.defaults == "celery" and (
        "serialization" not in config.model_fields_set
        or "max_payload_bytes" not in config.serialization.model_fields_set
    ):
        return None
    return config.serialization.max_payload_bytes
