"""Does anybody answer at this address? The first question of every live check, bounded and without a driver."""

from __future__ import annotations

import errno
import socket
import threading
from queue import Empty, SimpleQueue
from typing import Any, Literal

from qbridge.backends.base import Finding
from qbridge.backends.urls import Address

__all__ = ["reach", "redact"]


def reach(server: Address, timeout: float, *, of: Literal["broker", "results"], product: str) -> Finding | None:
    """Look the host up and open a TCP connection.

    Args:
        server: whom to reach.
        timeout: seconds in all, the name service included.
        of: first part of the finding's code.
        product: what should be listening there, for the message.

    Returns:
        None if somebody accepts, else the finding ``<of>.unreachable``, which says how it failed.
    """
    code = f"{of}.unreachable"
    try:
        addresses = _look_up(server, timeout)
    except TimeoutError:
        return Finding(
            "error",
            code,
            f"the name service did not say within {timeout:g} s what {server.host!r} is",
            "Look at the name service (getent hosts NAME), or write an address.",
        )
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        return Finding(
            "error",
            code,
            f"the host {server.host!r} is not known to the name service ({why})",
            "Correct the host in the configuration, or add it to DNS or /etc/hosts.",
        )
    failure: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as attempt:
            attempt.settimeout(timeout / len(addresses))
            try:
                attempt.connect(address)
            except OSError as error:
                failure = failure or error
            else:
                return None
    if isinstance(failure, ConnectionRefusedError):
        return Finding(
            "error",
            code,
            f"nothing listens at {server} (connection refused)",
            f"Start {product} there, or correct host and port in the configuration.",
        )
    if isinstance(failure, TimeoutError):
        return Finding(
            "error",
            code,
            f"{server} did not accept a connection within {timeout:g} s",
            f"See that {product}'s machine is up and that no firewall drops packets to this port.",
        )
    number = failure.errno if failure is not None else None
    why = errno.errorcode.get(number, str(number)) if number is not None else "no address"
    return Finding(
        "error", code, f"{server} cannot be reached ({why})", "Look at the network between this machine and that one."
    )


def redact(text: object, *secrets: str | None) -> str:
    """One line of a lower library's words, without the secrets and without line breaks.

    Args:
        text: an exception, or text.
        secrets: what must not appear; None and empty ones are ignored.
    """
    line = " ".join(str(text).split())
    for secret in secrets:
        if secret:
            line = line.replace(secret, "**")
    return line[:300]


def _look_up(server: Address, timeout: float) -> list[Any]:
    """``getaddrinfo`` with a bound: it has none, so it runs in a thread that is left behind when time is up."""
    answer: SimpleQueue[list[Any] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(list(socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="qbridge-lookup", daemon=True).start()
    try:
        found = answer.get(timeout=timeout)
    except Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found
