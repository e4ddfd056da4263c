"""What does an error while connecting to RabbitMQ mean to the operator, and what is there to do about it?"""

from __future__ import annotations

import shlex
import ssl
from typing import TYPE_CHECKING

from amqp.exceptions import AccessRefused, NotAllowed

from qbridge.backends.base import Finding
from qbridge.backends.network import redact
from qbridge.backends.urls import Address

if TYPE_CHECKING:
    from qbridge.backends.rabbitmq import RabbitMQBroker

__all__ = ["explain", "surprise"]


def explain(error: Exception, broker: RabbitMQBroker, server: Address) -> Finding:
    """The finding that an error means.

    Args:
        error: as py-amqp raised it while connecting and logging in.
        broker: as whom and where to.
        server: which server of it.
    """
    if isinstance(error, AccessRefused | NotAllowed):
        return _not_let_in(error, broker, server)
    if isinstance(error, ssl.SSLError):
        return _tls(error, server)
    return _no_amqp(error, server)


def surprise(error: Exception, broker: RabbitMQBroker, server: Address) -> Finding:
    """The finding for an error that nobody foresaw: its own words, without the password."""
    said = redact(error, broker.password.get_secret_value())
    return Finding(
        "error",
        "broker.check_failed",
        f"the check of {server} ended early: {type(error).__name__}: {said}",
        "Look at RabbitMQ's log at this moment.",
    )


def _not_let_in(error: Exception, broker: RabbitMQBroker, server: Address) -> Finding:
    said = str(error)
    user, vhost = shlex.quote(broker.username), shlex.quote(broker.vhost)
    if isinstance(error, AccessRefused):
        if "localhost" in said:
            return Finding(
                "error",
                "broker.credentials",
                f"RabbitMQ at {server} lets the user {broker.username!r} in from its own machine only",
                "Make an account: rabbitmqctl add_user NAME, then rabbitmqctl set_permissions "
                f"-p {vhost} NAME '.*' '.*' '.*'.",
            )
        return Finding(
            "error",
            "broker.credentials",
            f"RabbitMQ at {server} refused user {broker.username!r} or the password",
            f"Correct username and password, or set it there: rabbitmqctl change_password {user} (or add_user).",
        )
    if "not found" in said:
        return Finding(
            "error",
            "broker.vhost_missing",
            f"RabbitMQ at {server} has no vhost {broker.vhost!r}",
            f"rabbitmqctl add_vhost {vhost} && "
            f"rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'{_other_vhost(broker.vhost)}",
        )
    if "refused for user" in said:
        return Finding(
            "error",
            "broker.permission",
            f"the user {broker.username!r} may not enter the vhost {broker.vhost!r} of RabbitMQ at {server}",
            f"rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'",
        )
    return surprise(error, broker, server)


def _other_vhost(vhost: str) -> str:
    other = vhost.removeprefix("/") if vhost.startswith("/") else f"/{vhost}"
    return f"; or did you mean the vhost {other!r}? The two are different." if other else ""


def _tls(error: ssl.SSLError, server: Address) -> Finding:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Finding(
            "error",
            "broker.tls",
            f"the certificate of {server} is not trusted: {redact(error.verify_message)}",
            "Name the authority in tls.ca_file, or the name in the certificate in tls.server_hostname.",
        )
    return Finding(
        "error",
        "broker.tls",
        f"{server} does not speak TLS as expected: {redact(error.reason or error)}",
        "See that this is RabbitMQ's TLS port (5671), and the client certificate if it asks for one.",
    )


def _no_amqp(error: Exception, server: Address) -> Finding:
    return Finding(
        "error",
        "broker.protocol",
        f"{server} accepted the connection and then ended it ({type(error).__name__})",
        "See that this is RabbitMQ's AMQP port: 5672, or with tls=True 5671.",
    )
