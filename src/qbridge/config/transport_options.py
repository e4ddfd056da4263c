"""Which transport options does the chosen service's driver read?

kombu and py-amqp swallow names that they do not know, so a misspelt timeout is no timeout. The names come from the
drivers themselves: the Redis channel's own list, and the signature of ``amqp.Connection``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qbridge.config.faults import Fault
from qbridge.config.suggest import did_you_mean

if TYPE_CHECKING:
    from qbridge.config.bridge_config import BridgeConfig

__all__ = ["broker_options", "check_transport_options", "result_options"]

#: kombu/connection.py ``_extract_failover_opts``: read for every transport.
_RETRY = frozenset(
    {
        "max_retries",
        "interval_start",
        "interval_step",
        "interval_max",
        "connect_retries_timeout",
        "errback",
        "callback",
    }
)
#: kombu/messaging.py lays the publish retry policy over the options; these are read from a policy.
_POLICY = frozenset({"on_revive", "retry_errors", "timeout"})
#: kombu/transport/redis.py reads these beside its list, virtual/base.py the last one.
_REDIS_BESIDE = frozenset({"reauth_check_interval", "polling_interval", "credential_provider"})
#: celery/backends/redis.py and base.py.
_REDIS_RESULTS = frozenset(
    {
        "global_keyprefix",
        "result_chord_ordered",
        "retry_policy",
        "master_name",
        "min_other_sentinels",
        "sentinel_kwargs",
    }
)

#: Options that a field of the room owns.
_OWNED: Mapping[tuple[str, str], Mapping[str, str]] = MappingProxyType(
    {
        ("broker", "rabbitmq"): {"heartbeat": "heartbeat", "ssl": "tls", "connect_timeout": "connect_timeout"},
        ("broker", "redis"): {
            "visibility_timeout": "visibility_timeout",
            "global_keyprefix": "key_prefix",
            "master_name": "sentinel",
            "sentinel_kwargs": "sentinel",
            "socket_connect_timeout": "connect_timeout",
        },
        ("broker", "embedded"): {"publish_timeout": "publish_timeout"},
        ("results", "redis"): {
            "global_keyprefix": "key_prefix",
            "master_name": "sentinel",
            "sentinel_kwargs": "sentinel",
        },
    }
)


@cache
def broker_options(kind: str) -> frozenset[str]:
    """The names that ``broker_transport_options`` can have.

    Args:
        kind: of the broker.
    """
    if kind == "rabbitmq":
        from amqp import Connection  # drivers are loaded only where options are given

        return _RETRY | _POLICY | (frozenset(inspect.signature(Connection).parameters) - {"kwargs"})
    if kind == "redis":
        from kombu.transport.redis import SentinelChannel

        return _RETRY | _POLICY | _REDIS_BESIDE | frozenset(SentinelChannel.from_transport_options)
    from kombu.transport.virtual import Channel

    return _RETRY | _POLICY | {"polling_interval"} | frozenset(Channel.from_transport_options)


def result_options(kind: str) -> frozenset[str]:
    """The names that ``result_backend_transport_options`` can have.

    Args:
        kind: of the result backend.
    """
    return _REDIS_RESULTS if kind == "redis" else frozenset({"global_keyprefix"})


def check_transport_options(config: BridgeConfig) -> Iterator[Fault]:
    """Look at both kinds of transport options among the raw settings.

    Args:
        config: the configuration.

    Yields:
        One fault per option that nothing reads or that a field owns; values are not shown.
    """
    for setting, field, room, known in (
        ("broker_transport_options", "broker", config.broker, broker_options),
        ("result_backend_transport_options", "results", config.results, result_options),
    ):
        given = config.celery.get(setting)
        if not isinstance(given, Mapping):
            continue
        # What a room says itself, its own classes may read.
        own = room.celery_settings().get(setting, {})
        yield from _check(setting, given, known(room.kind) | set(own), room.kind)
        owned = _OWNED.get((field, room.kind), {}) if config.defaults == "safe" else {}
        for name in sorted(set(map(str, given)) & set(owned)):
            yield Fault(("celery", setting, name), "has a typed field of its own", f"write {field}.{owned[name]}")


def _check(setting: str, given: Mapping[Any, Any], known: frozenset[str], kind: str) -> Iterator[Fault]:
    for name in given:
        if name not in known:
            todo = did_you_mean(str(name), known) or f"known: {', '.join(sorted(known))}"
            yield Fault(("celery", setting, str(name)), f"nothing reads this option with {kind}", todo)
