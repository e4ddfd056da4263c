"""Which broker and which result backend does a Celery configuration mean?

Settings that become fields are taken out of the raw ones; what has no field stays there.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from qbridge.backends.embedded import EmbeddedBroker
from qbridge.backends.none import NoResults
from qbridge.backends.urls import Address, join_url
from qbridge.config.faults import faults_of
from qbridge.config.rooms import BROKERS, RESULTS, Side, explicit, url_text
from qbridge.config.transport_options import broker_options
from qbridge.exceptions import ConfigurationError

__all__ = ["take_broker", "take_results"]

Report = Callable[[Any, str, str, str], None]
Raw = dict[str, Any]

_BROKER_PARTS = ("broker_host", "broker_port", "broker_user", "broker_password", "broker_vhost", "broker_transport")
_REDIS_PARTS = ("redis_host", "redis_port", "redis_db", "redis_username", "redis_password")
#: Schemes that Celery encrypts without verifying anybody, unless told to.
_UNVERIFIED = {"amqps": "amqps://", "rediss": "rediss://"}


def take_broker(raw: Raw, report: Report) -> dict[str, Any]:
    """Take the broker out of the raw settings.

    Args:
        raw: settings by today's names; what becomes a field is removed.
        report: called with level, code, what and todo.

    Returns:
        ``{"broker": ...}``, or nothing if the settings name no broker.
    """
    url = _broker_url(raw, report)
    use_ssl = raw.pop("broker_use_ssl", None)
    if url is None:
        if use_ssl:
            report("error", "celery.broker", "broker_use_ssl has no broker_url to go with", "write broker_url too")
        return {}
    options = raw.get("broker_transport_options")
    options = dict(options) if isinstance(options, Mapping) else {}
    fields = _room_fields(BROKERS, url, options, report)
    if fields is None:
        raw.pop("broker_transport_options", None)
        return {"broker": EmbeddedBroker()}  # never another server than the one that was meant
    kind = fields["kind"]
    _take_tls(fields, use_ssl, url, "broker", report)
    if kind == "redis":
        _move(
            options, fields, {"visibility_timeout": "visibility_timeout", "socket_connect_timeout": "connect_timeout"}
        )
        _move(options, fields, {"global_keyprefix": "key_prefix"})
    elif kind == "rabbitmq":
        if "broker_heartbeat" in raw:
            fields["heartbeat"] = raw.pop("broker_heartbeat") or 0
        _move(raw, fields, {"broker_connection_timeout": "connect_timeout"})
    for name in [name for name in options if name not in broker_options(kind)]:
        del options[name]
        what = f"broker_transport_options[{name!r}]: nothing reads this option with {kind}, it is ignored"
        report("warning", "celery.ignored", what, "remove it")
    raw.pop("broker_transport_options", None)
    if options:
        raw["broker_transport_options"] = options
    return {"broker": _tried(BROKERS, fields, "broker", report, EmbeddedBroker)}


def take_results(raw: Raw, report: Report) -> dict[str, Any]:
    """Take the result backend out of the raw settings.

    Args:
        raw: settings by today's names; what becomes a field is removed.
        report: called with level, code, what and todo.

    Returns:
        ``{"results": ...}``, or nothing if the settings name no result backend.
    """
    url = _results_url(raw, report)
    if url is None:
        return {}
    options = raw.get("result_backend_transport_options")
    options = dict(options) if isinstance(options, Mapping) else {}
    use_ssl = raw.pop("redis_backend_use_ssl", None)
    fields = _room_fields(RESULTS, url, options, report)
    if fields is None:
        return {"results": NoResults()}
    kind = fields["kind"]
    if kind == "redis":
        _take_tls(fields, use_ssl, url, "results", report)
        _move(options, fields, {"global_keyprefix": "key_prefix"})
        _move(
            raw, fields, {"redis_socket_timeout": "socket_timeout", "redis_socket_connect_timeout": "connect_timeout"}
        )
    elif kind == "database":
        _move(raw, fields, {"database_table_names": "table_names", "database_table_schemas": "table_schemas"})
        if "database_create_tables_at_setup" in raw:
            fields["create_tables"] = bool(raw.pop("database_create_tables_at_setup"))
    elif kind == "rpc" and raw.get("result_persistent") is not None:
        fields["persistent"] = bool(raw.pop("result_persistent"))
    if kind != "none":
        expires = raw.get("result_expires")
        expires = expires.total_seconds() if isinstance(expires, timedelta) else expires
        if expires:  # 0 and None: for ever, which stays a raw setting
            fields["expires"] = expires
            del raw["result_expires"]
    raw.pop("result_backend_transport_options", None)
    if options:
        raw["result_backend_transport_options"] = options
    return {"results": _tried(RESULTS, fields, "results", report, NoResults)}


def _broker_url(raw: Raw, report: Report) -> str | None:
    parts = {name: raw.pop(name) for name in _BROKER_PARTS if raw.get(name) is not None}
    urls = {
        name: text
        for name in ("broker_url", "broker_read_url", "broker_write_url")
        if (text := url_text(raw.pop(name, None)))
    }
    of_environment = os.environ.get("CELERY_BROKER_URL")
    if of_environment:
        if urls.get("broker_url", of_environment) != of_environment:
            report(
                "warning",
                "celery.environment",
                "CELERY_BROKER_URL in the environment says something else than broker_url; it was taken, as by Celery",
                "say it once: QBRIDGE_BROKER, or broker_url",
            )
        urls["broker_url"] = of_environment
    if len(set(urls.values())) > 1:
        report(
            "error",
            "celery.broker",
            "broker_read_url or broker_write_url name another server than broker_url; a bridge has one broker",
            "make two bridges, one per server",
        )
    url = urls.get("broker_url") or urls.get("broker_write_url") or urls.get("broker_read_url")
    if url is not None:
        transport = parts.get("broker_transport")
        if transport is not None and "://" in url and not url.startswith(str(transport)):
            what = "broker_transport overrides the scheme of broker_url; the scheme was taken"
            report("warning", "celery.broker", what, "remove broker_transport")
        return url
    if not parts:
        return None
    host = str(parts.get("broker_host") or "localhost")
    if "://" in host:
        return host
    password = parts.get("broker_password")
    if password is not None and not isinstance(password, str):
        report("error", "celery.broker", "broker_password is a function; qbridge reads a password once", "write text")
        password = None
    vhost = str(parts.get("broker_vhost", ""))
    scheme = str(parts.get("broker_transport") or "amqp")
    server = Address(host, int(parts["broker_port"])) if parts.get("broker_port") else None
    url = join_url(
        scheme,
        username=parts.get("broker_user"),
        password=password,
        server=server or Address(host, 6379 if scheme.startswith("redis") else 5672),
        path="" if vhost == "/" else vhost,
    )
    return url if scheme != "pyamqp" else f"amqp{url.removeprefix('pyamqp')}"


def _results_url(raw: Raw, report: Report) -> str | None:
    url = raw.pop("result_backend", None)
    of_environment = os.environ.get("CELERY_RESULT_BACKEND")
    if of_environment:
        if url not in (None, of_environment):
            report(
                "warning",
                "celery.environment",
                "CELERY_RESULT_BACKEND in the environment says something else than result_backend; it was taken, "
                "as by Celery",
                "say it once: QBRIDGE_RESULTS, or result_backend",
            )
        url = of_environment
    if url in ("database", "db") and raw.get("database_url"):
        url = f"db+{raw.pop('database_url')}"
    if url == "redis":
        parts = {name: raw.pop(name) for name in _REDIS_PARTS if raw.get(name) is not None}
        return join_url(
            "redis",
            username=parts.get("redis_username"),
            password=parts.get("redis_password"),
            server=Address(str(parts.get("redis_host", "localhost")), int(parts.get("redis_port", 6379))),
            path=str(parts.get("redis_db", 0)),
        )
    return url if isinstance(url, str) and url else None


def _room_fields(side: Side, url: str, options: dict[str, Any], report: Report) -> dict[str, Any] | None:
    """The fields that a URL means; None, with a finding, if no room can read it."""
    what, todo = "", ""
    master = options.pop("master_name", None)
    sentinel = options.pop("sentinel_kwargs", None)
    if url.startswith("sentinel://") and master and "master_name=" not in url:
        url += f"{'&' if '?' in url else '?'}master_name={quote(str(master), safe='')}"
    try:
        room = side.from_url(url)
        fields = {**explicit(room), "kind": room.kind}
    except ConfigurationError as error:
        [fault, *_] = faults_of(error)
        what, todo = fault.what, fault.todo
        fields = {}
    if not fields:
        setting = "broker_url" if side is BROKERS else "result_backend"
        report("error", f"celery.{'broker' if side is BROKERS else 'results'}", f"{setting}: {what}", todo)
        return None
    if sentinel and "sentinel" in fields and isinstance(sentinel, Mapping):
        account = {name: sentinel[name] for name in ("username", "password") if sentinel.get(name) is not None}
        fields["sentinel"] = {**fields["sentinel"], **account}
        left = sorted(set(map(str, sentinel)) - {"username", "password"})
        if left:
            text = (
                f"sentinel_kwargs: {', '.join(left)} have no counterpart, qbridge bounds the Sentinels' answers itself"
            )
            report("info", "celery.sentinel", text, "use connect_timeout and publish_timeout")
    return fields


def _take_tls(fields: dict[str, Any], given: Any, url: str, field: str, report: Report) -> None:
    scheme = _UNVERIFIED.get(url.partition("://")[0])
    if given is None and scheme is not None and "cert_reqs" not in url:
        what = f"Celery encrypts {scheme} without verifying the server's certificate; qbridge verifies it"
        report("info", "celery.tls", what, f"where that cannot be: {field}={{..., 'tls': {{'verify': False}}}}")
    if not given:
        return
    if not isinstance(given, Mapping):
        what = "broker_use_ssl=True encrypts without verifying the server's certificate, and was taken over so"
        report(
            "warning",
            "celery.tls",
            what,
            f"write {field}.tls = {{'ca_file': ...}}, or True for the system's authorities",
        )
        fields["tls"] = {"verify": False}
        return
    options = {str(name).removeprefix("ssl_"): value for name, value in given.items()}
    tls: dict[str, Any] = {"verify": _verifies(options.pop("cert_reqs", None))}
    names = {
        "ca_certs": "ca_file",
        "certfile": "cert_file",
        "keyfile": "key_file",
        "server_hostname": "server_hostname",
    }
    for option, name in names.items():
        if options.get(option) is not None:
            tls[name] = options[option]
        options.pop(option, None)
    if fields["kind"] == "rabbitmq":  # py-amqp compares the host name only when it is told one
        tls["check_hostname"] = tls.get("server_hostname") is not None
    elif "check_hostname" in options:
        tls["check_hostname"] = bool(options.pop("check_hostname"))
    if not tls["verify"]:
        what = "TLS without verifying the server's certificate was taken over"
        report("warning", "celery.tls", what, f"write {field}.tls = {{'ca_file': ...}}")
    for name in sorted(options):
        report("warning", "celery.tls", f"the TLS option {name!r} has no counterpart", "see the fields of TLS")
    fields["tls"] = tls


def _verifies(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower().removeprefix("cert_") == "required"
    return bool(value == ssl.CERT_REQUIRED)


def _move(source: dict[str, Any], fields: dict[str, Any], names: Mapping[str, str]) -> None:
    for setting, name in names.items():
        if source.get(setting) is not None:
            fields[name] = source.pop(setting)


def _tried(side: Side, fields: dict[str, Any], field: str, report: Report, otherwise: Callable[[], Any]) -> Any:
    """The room made of the fields; what it cannot be made with is reported, and a harmless room stands in."""
    problem: ConfigurationError | None = None
    try:
        model = side.rooms[fields["kind"]]
        return model(**fields)
    except ConfigurationError as error:
        problem = error
    report("error", f"celery.{field}", f"the settings do not make a {side.word}: {problem.what}", problem.todo)
    return otherwise()
