"""Which raw Celery settings have a typed field of their own?

The table is closed: under ``defaults="safe"`` these settings are refused in ``celery={...}`` with the field to write
instead, so that nothing is said twice. Under ``defaults="celery"`` they are taken: what has a field is lifted into it,
and only a field that was given another value is a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from types import MappingProxyType
from typing import Any

from qbridge.config.faults import Fault
from qbridge.config.tree import Path

__all__ = ["OWNED", "Lifted", "Owner", "lift", "owned_settings", "refuse_owned"]


class CannotLift(Exception):
    """A setting's value has no counterpart in the field; it keeps its meaning as a raw setting."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Owner:
    """The field that owns a setting.

    Args:
        field: where in the configuration.
        lift: makes the field's value of the setting's; None: the field covers it, but not one to one.
    """

    field: Path
    lift: Callable[[Any], Any] | None = None


def _pool(value: Any) -> str:
    known = {"prefork": "process", "processes": "process", "threads": "thread", "solo": "solo"}
    if not isinstance(value, str) or value not in known:
        raise CannotLift
    return known[value]


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CannotLift
    return value


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise CannotLift


def _delivery(late: Any) -> str:
    return "at_least_once" if late else "at_most_once"


def _format(value: Any) -> str:
    if value not in ("json", "msgpack"):
        raise CannotLift
    return str(value)


def _zone(value: Any) -> str:
    if isinstance(value, tzinfo):
        name = getattr(value, "key", None)
        if not isinstance(name, str):
            raise CannotLift
        return name
    return str(value)


def _queue_list(value: Any) -> tuple[dict[str, Any], ...]:
    """Plain names only: a queue with its own exchange and binding is Celery's business, not a QueueConfig."""
    if isinstance(value, Mapping):
        named = [(str(name), options) for name, options in value.items()]
    else:
        named = [(part if isinstance(part, str) else str(getattr(part, "name", "")), part) for part in value]
    if not all(name for name, _ in named):
        raise CannotLift
    return tuple(_queue(name, options) for name, options in named)


def _queue(name: str, options: Any) -> dict[str, Any]:
    arguments = (options.get("queue_arguments") if isinstance(options, Mapping) else None) or (
        getattr(options, "queue_arguments", None) or {}
    )
    queue: dict[str, Any] = {"name": name}
    if arguments.get("x-queue-type") in ("quorum", "classic"):
        queue["type"] = arguments["x-queue-type"]
    most = getattr(options, "max_priority", None) or arguments.get("x-max-priority")
    if most:
        queue["max_priority"] = most
    if getattr(options, "no_declare", None):
        queue = {"name": name, "declare": False}
    return queue


def _broker(*settings: str) -> dict[str, Owner]:
    return {name: Owner(("broker",)) for name in settings}


def _results(*settings: str) -> dict[str, Owner]:
    return {name: Owner(("results",)) for name in settings}


#: Setting to owner.
OWNED: Mapping[str, Owner] = MappingProxyType(
    {
        **_broker("broker_read_url", "broker_write_url", "broker_host", "broker_port", "broker_user"),
        **_broker("broker_password", "broker_vhost", "broker_transport", "broker_use_ssl"),
        "broker_url": Owner(("broker",), _same),
        "broker_heartbeat": Owner(("broker", "heartbeat")),
        "broker_connection_timeout": Owner(("broker", "connect_timeout")),
        **_results("cache_backend", "database_url", "redis_host", "redis_port", "redis_db", "redis_username"),
        **_results("redis_password", "redis_backend_use_ssl"),
        "result_backend": Owner(("results",), _same),
        "result_expires": Owner(("results", "expires")),
        "result_persistent": Owner(("results", "persistent")),
        "task_serializer": Owner(("serialization", "format"), _format),
        "result_serializer": Owner(("serialization", "format")),
        "accept_content": Owner(("serialization", "format")),
        "result_accept_content": Owner(("serialization", "format")),
        "task_acks_late": Owner(("delivery",), _delivery),
        "task_acks_on_failure": Owner(("delivery",)),
        "task_acks_on_failure_or_timeout": Owner(("delivery",)),
        "task_acks_on_timeout": Owner(("delivery",)),
        "task_reject_on_worker_lost": Owner(("delivery",)),
        "task_retry_on_worker_lost": Owner(("worker", "max_redeliveries")),
        "task_queues": Owner(("queues",), _queue_list),
        "task_default_queue": Owner(("default_queue",), _same),
        "task_default_queue_type": Owner(("broker", "queue_type")),
        "task_create_missing_queues": Owner(("queues",)),
        "task_create_missing_queue_type": Owner(("queues",)),
        "task_create_missing_queue_exchange_type": Owner(("queues",)),
        "task_default_exchange": Owner(("default_queue",)),
        "task_default_exchange_type": Owner(("default_queue",)),
        "task_default_routing_key": Owner(("default_queue",)),
        "task_queue_max_priority": Owner(("queues",)),
        "worker_pool": Owner(("worker", "pool"), _pool),
        "worker_concurrency": Owner(("worker", "concurrency"), _whole_number),
        "worker_prefetch_multiplier": Owner(("worker", "prefetch"), _whole_number),
        "worker_max_tasks_per_child": Owner(("worker", "max_tasks_per_child"), _whole_number),
        "worker_max_memory_per_child": Owner(("worker", "max_memory_per_child"), _whole_number),
        "worker_soft_shutdown_timeout": Owner(("worker", "shutdown_timeout"), _same),
        "imports": Owner(("modules",), _names),
        "include": Owner(("modules",), _names),
        "timezone": Owner(("timezone",), _zone),
    }
)


def owned_settings() -> Mapping[str, str]:
    """The closed table for the reference.

    Returns:
        Name of the raw setting to the field that owns it, dotted.
    """
    return {name: ".".join(owner.field) for name, owner in sorted(OWNED.items())}


def refuse_owned(raw: Mapping[str, Any]) -> list[Fault]:
    """Under ``defaults="safe"``: one fault for each setting that has a field.

    Args:
        raw: names and values; values are not shown.
    """
    return [
        Fault(
            ("celery", name),
            "has a typed field of its own",
            f"write {'.'.join(OWNED[name].field)} (under defaults='celery' the raw setting is taken too)",
        )
        for name in raw
        if name in OWNED
    ]


@dataclass(frozen=True)
class Lifted:
    """A raw setting as the value of its field."""

    setting: str
    field: Path
    value: Any


def lift(raw: Mapping[str, Any]) -> list[Lifted]:
    """Under ``defaults="celery"``: say the owned settings in terms of fields, where there is an exact counterpart.

    Args:
        raw: names and values that have passed ``check_setting``.
    """
    lifted: dict[Path, Lifted] = {}
    for name, value in raw.items():
        owner = OWNED.get(name)
        if owner is None or owner.lift is None or value is None:
            continue
        try:
            said = Lifted(name, owner.field, owner.lift(value))
        except CannotLift:
            continue
        if owner.field == ("modules",) and owner.field in lifted:
            said = Lifted(name, owner.field, tuple(dict.fromkeys((*lifted[owner.field].value, *said.value))))
        lifted[owner.field] = said
    # Some choices of Celery fit no WorkerConfig together (recycling with threads): Celery ignores them, so do we.
    pool = lifted.get(("worker", "pool"))
    if pool is not None and pool.value != "process":
        lifted.pop(("worker", "max_tasks_per_child"), None)
        lifted.pop(("worker", "max_memory_per_child"), None)
    if pool is not None and pool.value == "solo":
        lifted.pop(("worker", "concurrency"), None)
    return list(lifted.values())
