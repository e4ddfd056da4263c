"""What does an error of redis-py mean to the operator, and what is there to do about it?"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Literal

from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    NoPermissionError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from qbridge.backends.base import Finding
from qbridge.backends.network import redact

if TYPE_CHECKING:
    from qbridge.backends.redis.server import RedisServer

__all__ = ["Part", "explain", "secrets_of", "who"]

Part = Literal["broker", "results"]


def who(server: RedisServer) -> str:
    """The account, in words."""
    return f"user {server.username!r}" if server.username else "the default user"


def secrets_of(server: RedisServer) -> list[str]:
    """What must not appear in a message."""
    sentinel = server.sentinel.password if server.sentinel else None
    return [secret.get_secret_value() for secret in (server.password, sentinel) if secret is not None]


def explain(error: Exception, part: Part, server: RedisServer) -> Finding:
    """The finding that an error means.

    Args:
        error: as redis-py raised it.
        part: first part of the finding's code.
        server: what was spoken to.
    """
    place, said = server.place, redact(error, *secrets_of(server))
    cause = error.__cause__ or error.__context__
    if isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError) or "WRONGPASS" in said:
        if "without any password configured" in said:
            return Finding(
                "error",
                f"{part}.credentials",
                f"Redis at {place} has no password, and the configuration gives one",
                "Leave out the password, or set one there (requirepass, or ACL SETUSER).",
            )
        what = "did not get a password" if server.password is None else f"refused {who(server)} or the password"
        return Finding(
            "error",
            f"{part}.credentials",
            f"Redis at {place} {what}",
            "Correct username and password in the configuration.",
        )
    if isinstance(error, BusyLoadingError):
        return Finding(
            "error",
            f"{part}.loading",
            f"Redis at {place} is still loading its data",
            "Wait until it has; INFO shows how far.",
        )
    if isinstance(error, NoPermissionError):
        return Finding(
            "error",
            f"{part}.permission",
            f"Redis at {place} refuses {who(server)} already at the first command: {said}",
            f"ACL SETUSER {server.username or 'default'} ~{server.key_prefix}* '&*' +@all -@dangerous +info, "
            "then ACL SAVE",
        )
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return Finding(
            "error",
            f"{part}.frozen",
            f"Redis at {place} accepts connections and does not answer",
            "It may be stopped (SIGSTOP), swapping, or busy with one long command or script: look at its log."
            + (" Or this port does not speak TLS." if server.tls else ""),
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Finding(
            "error",
            f"{part}.tls",
            f"the certificate of {place} is not trusted: {redact(cause.verify_message)}",
            "Name the authority in tls.ca_file.",
        )
    if isinstance(cause, ssl.SSLError) or "SSL" in said:
        return Finding(
            "error",
            f"{part}.tls",
            f"{place} does not speak TLS as expected: {said}",
            "See that this port speaks TLS (tls-port), and the client certificate if it asks for one.",
        )
    if "DB index is out of range" in said:
        return Finding(
            "error",
            f"{part}.db_missing",
            f"Redis at {place} has no database {server.db}",
            "Use a lower db, or raise 'databases' in redis.conf (a Redis Cluster has only 0).",
        )
    if "protected mode" in said:
        return Finding(
            "error",
            f"{part}.credentials",
            f"Redis at {place} is in protected mode and talks to its own machine only",
            "Set a password there (requirepass, or ACL SETUSER default) and here.",
        )
    return Finding(
        "error",
        f"{part}.check_failed",
        f"the check of Redis at {place} ended early: {type(error).__name__}: {said}",
        "See that this is a Redis, and whether its port speaks TLS; look at its log at this moment.",
    )
