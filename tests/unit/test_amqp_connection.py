"""Connections under a deadline: kombu's own calls of them still work."""

from __future__ import annotations

import time

import pytest
from kombu.exceptions import OperationalError

from qbridge.amqp import BridgeConnection
from qbridge.backends.deadline import deadline
from qbridge.testing.servers import free_ports


def test_connecting_again_under_a_deadline_ends_with_the_brokers_error() -> None:
    """kombu's ``ensure`` passes the number of retries by position, where the deadline sets its own."""
    (port,) = free_ports(1)
    connection = BridgeConnection(f"amqp://guest:guest@127.0.0.1:{port}//")
    began = time.monotonic()
    with deadline(0.5), pytest.raises(OperationalError):
        connection._ensure_connection(None, 100, 0, 0.2, 1, None)
    assert time.monotonic() - began < 5
