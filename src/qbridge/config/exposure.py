"""Who could get in with this configuration? What ``check`` says of it before it looks at any server.

Nothing here is an error: a private network may be as good as a password. It is said, so that somebody has decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from qbridge.backends.base import Finding
from qbridge.backends.database import DatabaseResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults

if TYPE_CHECKING:
    from qbridge.config.bridge_config import BridgeConfig

__all__ = ["exposure"]

_SAFE_TYPES = {"json", "application/json", "msgpack", "application/x-msgpack"}
_ENCRYPTING = {"require", "verify-ca", "verify-full"}  # libpq's sslmode


def exposure(config: BridgeConfig) -> Iterator[Finding]:
    """Look at addresses, credentials, content types and keys.

    Args:
        config: valid.

    Yields:
        What an operator should have decided on purpose; no secret is shown.
    """
    if isinstance(config.broker, RabbitMQBroker):
        yield from _rabbitmq(config.broker)
    for part, room in (("broker", config.broker), ("results", config.results)):
        if isinstance(room, RedisBroker | RedisResults):
            yield from _redis(part, room)
    if isinstance(config.results, DatabaseResults):
        yield from _database(config.results)
    yield from _content_types(config)
    yield from _keys(config)


def _rabbitmq(broker: RabbitMQBroker) -> Iterator[Finding]:
    remote = next((server.host for server in broker.servers if not _is_here(server.host)), None)
    if remote is None:
        return
    if broker.username == "guest" and broker.password.get_secret_value() == "guest":
        yield Finding(
            "warning",
            "broker.guest",
            f"everybody knows the account guest, and {remote} is another machine",
            "Make an account of its own with a password, and delete guest.",
        )
    if broker.tls is None:
        yield _in_clear("broker", "RabbitMQ", remote, "Write amqps://, or broker.tls.")


def _redis(part: str, room: RedisBroker | RedisResults) -> Iterator[Finding]:
    if room.unix_socket is not None:
        return
    hosts = [room.host] if room.sentinel is None else [server.host for server in room.sentinel.servers]
    remote = next((host for host in hosts if not _is_here(host)), None)
    if remote is None:
        return
    if room.password is None:
        yield Finding(
            "warning",
            f"{part}.no_password",
            f"the Redis at {remote} is another machine, and is asked without a password",
            f"Set one on the server (requirepass, or an ACL), and {part}.password.",
        )
    if room.tls is None:
        yield _in_clear(part, "Redis", remote, f"Write rediss://, or {part}.tls.")


def _database(results: DatabaseResults) -> Iterator[Finding]:
    url = urlsplit(results.url.get_secret_value())
    host, query = url.hostname, dict(parse_qsl(url.query))
    if not host or _is_here(host) or url.scheme.startswith("sqlite"):
        return
    if query.get("sslmode") not in _ENCRYPTING and not any(name.startswith("ssl_") for name in query):
        yield _in_clear("results", "database", host, "For PostgreSQL, add ?sslmode=verify-full to the URL.")


def _in_clear(part: str, product: str, host: str, todo: str) -> Finding:
    what = f"what is sent to the {product} at {host} is not encrypted: passwords, arguments, results"
    return Finding("warning", f"{part}.no_tls", what, todo)


def _content_types(config: BridgeConfig) -> Iterator[Finding]:
    for name in ("accept_content", "result_accept_content"):
        given: Any = config.celery.get(name)
        more = sorted({str(kind) for kind in given or ()} - _SAFE_TYPES)
        if more:
            yield Finding(
                "warning",
                "configuration.content_types",
                f"{name} accepts {', '.join(more)} beside JSON: what reads a pickle or YAML can be made to run code",
                "Accept json alone, and msgpack if you send it.",
            )


def _keys(config: BridgeConfig) -> Iterator[Finding]:
    serialization = config.serialization
    if serialization.signing_keys and not serialization.require_signatures:
        yield Finding(
            "warning",
            "configuration.signatures_not_required",
            "there are signing_keys, and what is not signed is accepted all the same",
            "When everything has the keys, take serialization.require_signatures=False away.",
        )


def _is_here(host: str) -> bool:
    """Whether a host is this machine, as far as its name tells."""
    if host in ("localhost", "localhost.localdomain", ""):
        return True
    try:
        return ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False
