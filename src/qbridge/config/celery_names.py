"""Which raw Celery settings exist, and of which type?

The names come from Celery itself (``celery.app.defaults``) when they are first needed, so that importing the
configuration does not import Celery; what Celery 5.7 reads without listing it there is listed here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import timedelta, tzinfo
from functools import cache
from os import PathLike
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

from qbridge.config.faults import Fault
from qbridge.config.suggest import closest

__all__ = [
    "check_setting",
    "closest_old_name",
    "closest_setting",
    "known_settings",
    "new_name",
    "old_names",
    "parse_setting",
    "zone_exists",
]

#: Read by Celery 5.7, but missing in its own table: (type, where it is read).
_UNLISTED = {
    "result_backend_thread_safe": "bool",  # celery/backends/base.py
    "redis_backend_health_check_interval": "float",  # celery/backends/redis.py
    "redis_backend_credential_provider": "any",  # celery/backends/redis.py: an object or its dotted name
    "redis_client_name": "string",  # celery/backends/redis.py
    "override_backends": "dict",  # celery/loaders/base.py
    "cassandra_secure_bundle_path": "string",  # celery/backends/cassandra.py
    "dynamodb_endpoint_url": "string",  # celery/backends/dynamodb.py
    "firestore_project": "string",  # celery/backends/gcs.py
    "gcs_threadpool_maxsize": "int",  # celery/backends/gcs.py
}

#: Where Celery's table says one type and its code takes more.
_WIDER: Mapping[str, str] = {
    "accept_content": "strings",
    "result_accept_content": "strings",
    "cassandra_servers": "strings",
    "imports": "strings",
    "include": "strings",
    "broker_url": "string or strings",
    "broker_read_url": "string or strings",
    "broker_write_url": "string or strings",
    "broker_use_ssl": "bool or dict",
    "broker_failover_strategy": "string or callable",
    "broker_heartbeat": "float",
    "broker_heartbeat_checkrate": "float",
    "broker_password": "string or callable",
    "broker_login_method": "string",
    "cassandra_port": "int or string",
    "cassandra_auth_kwargs": "dict",
    "result_expires": "float or timedelta",
    "result_failure_expires": "float or timedelta",
    "result_chord_expires": "float or timedelta",
    "result_backend": "string",
    "result_cache_max": "int",
    "beat_schedule": "dict",
    "beat_scheduler": "string or class",
    "beat_cron_starting_deadline": "int",
    "control_exchange": "string",
    "database_engine_callback": "string or callable",
    "security_key_password": "bytes or string",
    "task_annotations": "any",
    "task_routes": "any",
    "task_queues": "dict or list",
    "task_default_delivery_mode": "int or string",
    "task_default_rate_limit": "int or string or float",
    "task_default_priority": "int",
    "timezone": "string or tzinfo",
    "worker_agent": "string or class",
    "worker_autoscaler": "string or class",
    "worker_concurrency": "concurrency",
    "worker_consumer": "string or class",
    "worker_pool": "string or class",
    "worker_state_db": "string or path",
    "worker_timer": "string or class",
}

#: None means something here although the default is not None.
_NONE_MEANS_SOMETHING = frozenset(
    {
        "broker_connection_max_retries",
        "broker_connection_retry_on_startup",
        "broker_connection_timeout",
        "broker_heartbeat",
        "broker_pool_limit",
        "control_queue_expires",
        "control_queue_ttl",
        "event_queue_expires",
        "event_queue_ttl",
        "redis_socket_timeout",
        "result_expires",
        "result_cache_max",
        "worker_log_format",
        "worker_task_log_format",
        "task_annotations",
    }
)

#: Numbers that may be negative, with what that means.
_MAY_BE_NEGATIVE = frozenset({"result_cache_max"})  # -1: no cache
#: Numbers that may be infinite.
_MAY_BE_INFINITE = frozenset({"result_backend_max_retries"})

_EXPECTED = {
    "any": "anything",
    "bool": "True or False",
    "bytes": "bytes",
    "callable": "a function",
    "class": "a class",
    "concurrency": "a whole number above 0, or 'auto'",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "path": "a path",
    "string": "text",
    "strings": "a list of texts",
    "timedelta": "a timedelta",
    "tzinfo": "a tzinfo",
}


@cache
def known_settings() -> Mapping[str, str]:
    """All settings that Celery 5.7 reads.

    Returns:
        Name to type; a type is one or more words joined with `` or ``.
    """
    from celery.app.defaults import NAMESPACES, flatten  # here, so that reading a configuration does not load Celery

    types = {name: _type_word(option.type) for name, option in flatten(NAMESPACES)}
    return MappingProxyType({**types, **_UNLISTED, **_WIDER})


def _type_word(declared: Any) -> str:
    word = declared.__name__ if isinstance(declared, type) else str(declared)
    return {"str": "string", "tuple": "list"}.get(word, word)


@cache
def _old_names() -> Mapping[str, str]:
    from celery.app.defaults import _TO_NEW_KEY  # Celery has no public name for the table

    return MappingProxyType(dict(_TO_NEW_KEY))


@cache
def _defaults() -> Mapping[str, Any]:
    from celery.app.defaults import DEFAULTS

    return MappingProxyType(dict(DEFAULTS))


def new_name(old: str) -> str | None:
    """Today's name of a setting that is written in the style of Celery 3.

    Args:
        old: such as ``"CELERYD_CONCURRENCY"``.

    Returns:
        Such as ``"worker_concurrency"``; None if Celery knows no such old name.
    """
    return _old_names().get(old)


def unknown_setting(name: str) -> str:
    """What to write instead of a name that Celery does not read."""
    lowered = name.lower()
    bare = lowered.removeprefix("celery_")
    for candidate in (new_name(name), lowered, bare):
        if candidate is not None and candidate in known_settings():
            return f"write {candidate}"
    meant = closest_setting(bare)
    return f"did you mean {meant!r}?" if meant else ""


def closest_setting(bare: str) -> str | None:
    """The setting that was probably meant.

    Args:
        bare: what was written, in lower case and without a namespace.
    """
    # Who writes "backend" or "acks_late" has forgotten the first word, not misspelt another setting.
    for family in ("task", "worker", "result", "broker", "beat"):
        if f"{family}_{bare}" in known_settings():
            return f"{family}_{bare}"
    meant = closest(bare, known_settings())
    # The first word must be alike too: plugins have settings of their own, redbeat_lock_timeout is no redis_... .
    if meant is None or not closest(bare.partition("_")[0], [meant.partition("_")[0]], likeness=0.7):
        return None
    return meant


def old_names(setting: str) -> list[str]:
    """The names of Celery 3 for one of today's settings.

    Args:
        setting: today's name.
    """
    return [old for old, new in _old_names().items() if new == setting]


def closest_old_name(name: str) -> str | None:
    """The name of Celery 3 that was probably meant.

    Args:
        name: what was written.
    """
    return closest(name, _old_names(), likeness=0.75)


def check_setting(name: str, value: Any) -> Fault | None:
    """Judge one raw setting.

    Args:
        name: as it was written.
        value: its value; never shown.

    Returns:
        What is wrong with it, or None.
    """
    path = ("celery", name)
    kinds = known_settings().get(name)
    if kinds is None:
        todo = unknown_setting(name) or (
            "remove it; a setting of a plugin of Celery is assigned at run time: bridge.celery.conf[...] = ..."
        )
        return Fault(path, "Celery 5.7 reads no such setting", todo)
    if value is None:
        if name in _NONE_MEANS_SOMETHING or name in _UNLISTED or _defaults().get(name) is None:
            return None
        return Fault(path, "is None, which Celery does not understand here", f"write {_words(kinds)}, or leave it out")
    if not any(_IS[kind](value) for kind in kinds.split(" or ")):
        return Fault(path, f"should be {_words(kinds)}, not {type(value).__name__}", f"write {_words(kinds)}")
    if name == "timezone" and isinstance(value, str) and not zone_exists(value):
        return Fault(path, "is not a time zone that exists here", "write an IANA name such as 'UTC' or 'Europe/Berlin'")
    return _check_number(path, name, value) or _check_pickle(path, name, value)


def zone_exists(name: str) -> bool:
    """True if this machine knows a time zone of this name."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError
        return False
    return True


def _words(kinds: str) -> str:
    return " or ".join(_EXPECTED[kind] for kind in kinds.split(" or "))


def _check_number(path: tuple[str, ...], name: str, value: Any) -> Fault | None:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if math.isnan(value) or (math.isinf(value) and name not in _MAY_BE_INFINITE):
        return Fault(path, "is not a finite number", "write a number")
    if value < 0 and name not in _MAY_BE_NEGATIVE:
        return Fault(path, "is negative", "write 0 or more")
    if name in ("task_time_limit", "task_soft_time_limit") and value == 0:
        return Fault(path, "is 0, which Celery takes for no limit", "leave it out, or write seconds above 0")
    return None


def _check_pickle(path: tuple[str, ...], name: str, value: Any) -> Fault | None:
    if not (name.endswith(("_serializer", "accept_content"))):
        return None
    words = {value} if isinstance(value, str) else set(value)
    if words & {"pickle", "application/x-python-serialize"}:
        return Fault(
            path,
            "names pickle, which runs the code of whoever can write to the broker",
            "write 'json' (or 'msgpack') and pass models, dataclasses and standard types: qbridge encodes them",
        )
    return None


def _is_text_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(part, str) for part in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_IS: Mapping[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "bool": lambda value: isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)),
    "bytes": lambda value: isinstance(value, bytes),
    "callable": callable,
    "class": lambda value: isinstance(value, type),
    "concurrency": lambda value: value == "auto" or (_is_int(value) and value >= 0),
    "dict": lambda value: isinstance(value, Mapping),
    "float": _is_number,
    "int": _is_int,
    "list": lambda value: isinstance(value, (list, tuple, set, frozenset)),
    "path": lambda value: isinstance(value, PathLike),
    "string": lambda value: isinstance(value, str),
    "strings": lambda value: _is_text_list(value) or isinstance(value, str),
    "timedelta": lambda value: isinstance(value, timedelta),
    "tzinfo": lambda value: isinstance(value, tzinfo),
}


def parse_setting(name: str, text: str) -> Any:
    """Read a raw setting from the environment, where everything is text.

    Args:
        name: name of the setting.
        text: its value there.

    Returns:
        The value in the setting's type, or the text if it does not look like one (the check then says so).
    """
    kinds = known_settings().get(name, "any").split(" or ")
    lowered = text.strip().lower()
    if "bool" in kinds and lowered in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return lowered in ("true", "yes", "on", "1")
    if "strings" in kinds and not lowered.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if set(kinds) & {"int", "float", "dict", "list", "strings", "any", "concurrency"}:
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text
