"""What the tests of single rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.backends.amqp_line import Line


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A connection to RabbitMQ that is open, and the other end of it."""
    made = Line(monkeypatch)
    sock = made.connection.transport.sock
    with made.server, sock:
        yield made
