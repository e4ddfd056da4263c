"""When acknowledgements reach RabbitMQ that are made one right after the other: without a server."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amqp import spec
from tests.unit.backends.amqp_line import CHANNEL, Line, method

from qbridge.backends.rabbitmq import acks
from qbridge.testing.servers import ThrowawayCA
from qbridge.testing.waiting import wait_until

NEVER = 600.0


def ack(tag: int) -> bytes:
    """The frame that py-amqp writes for it."""
    return method(spec.Basic.Ack, "Lb", tag, False)


def arrived(line: Line) -> bytes:
    """What the server has got; not waiting for more."""
    line.server.setblocking(False)
    try:
        return line.server.recv(65536)
    except BlockingIOError:
        return b""
    finally:
        line.server.setblocking(True)


def watchers() -> list[threading.Thread]:
    """Threads that see to what waits."""
    return [thread for thread in threading.enumerate() if thread.name == "qbridge-acks"]


@pytest.fixture
def line(line: Line) -> Iterator[Line]:
    """The same, which leaves no thread behind."""
    yield line
    line.connection.acks.end()
    wait_until(lambda: not watchers(), 10, what="the threads to end")


@pytest.fixture
def patient(line: Line, monkeypatch: pytest.MonkeyPatch) -> Line:
    """The same; what waits is not sent because it has waited for long."""
    monkeypatch.setattr(acks, "_WAIT", NEVER)
    monkeypatch.setattr(acks.HeldAcks, "_watch", lambda self: setattr(self, "_thread", None))
    return line


@pytest.mark.parametrize(("prefetch", "together"), [(0, 16), (1, 1), (2, 1), (3, 1), (4, 2), (20, 10), (64, 16)])
def test_several_go_in_one_write(patient: Line, prefetch: int, together: int) -> None:
    """As many as leave the broker with others under way; octet by octet what py-amqp would write."""
    patient.connection.hold_acks(prefetch)
    for tag in range(1, together):
        patient.channel.basic_ack(tag)
        assert arrived(patient) == b""
    patient.channel.basic_ack(together)
    assert arrived(patient) == b"".join(ack(tag) for tag in range(1, together + 1))
    patient.channel.basic_ack(together + 1)
    assert bool(patient.connection.acks) is (together > 1)


def test_nobody_waits_who_has_not_asked_to(patient: Line) -> None:
    """A program that acknowledges and does something else."""
    patient.channel.basic_ack(1)
    assert arrived(patient) == ack(1)


def test_whatever_is_written_takes_them_along(patient: Line) -> None:
    """In the order in which it was said; so does the end of the connection."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    patient.channel.basic_reject(2, requeue=True)
    patient.channel.basic_ack(3)
    patient.channel.basic_ack(5, multiple=True)
    several = method(spec.Basic.Ack, "Lb", 5, True)
    assert arrived(patient) == ack(1) + method(spec.Basic.Reject, "Lb", 2, True) + ack(3) + several
    assert not patient.connection.acks


def test_they_go_when_nothing_is_left_to_read(patient: Line) -> None:
    """The loop will wait for the socket then, and the broker may wait for the acknowledgement."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    with pytest.raises(TimeoutError):
        patient.connection.drain_events(timeout=0)
    assert arrived(patient) == ack(1)
    patient.channel.basic_ack(2)
    with pytest.raises(TimeoutError):
        patient.connection.drain_events(timeout=0.01)
    assert arrived(patient) == ack(2)


def test_they_go_before_a_wait_not_after_it(patient: Line) -> None:
    """What the wait is for may depend on them."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    waiting = threading.Thread(target=patient.connection.drain_events, kwargs={"timeout": 20}, daemon=True)
    waiting.start()
    patient.server.settimeout(10)
    assert patient.server.recv(100) == ack(1)
    patient.server.sendall(method(spec.Channel.Flow, "b", True))
    assert patient.server.recv(100) == method(spec.Channel.FlowOk, "b", True)
    waiting.join(10)
    assert not waiting.is_alive()


def test_they_go_while_the_thread_that_made_them_does_something_else(line: Line) -> None:
    """A long task right after a short one: nothing is read and nothing written. It counts as a sign of life."""
    line.connection.hold_acks(64)
    for tag in range(1, 4):
        before = line.connection.bytes_sent
        line.channel.basic_ack(tag)
        line.server.settimeout(10)
        assert line.server.recv(100) == ack(tag)
        wait_until(lambda before=before: line.connection.bytes_sent == before + 1, 10, what="the count")
    assert len(watchers()) == 1


class Narrow:
    """A socket that takes five octets at a time, or none."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.calls = 0

    def send(self, octets: Any, flags: int) -> int:
        self.calls += 1
        if self.calls % 3 == 0:
            raise BlockingIOError
        return int(self.sock.send(bytes(octets[:5]), flags))


def test_what_the_socket_takes_in_parts_arrives_whole(line: Line) -> None:
    """Whoever writes next begins with the rest."""
    line.connection.hold_acks(64)
    transport = line.connection.transport
    sock, transport.sock = transport.sock, Narrow(transport.sock)  # the thread's: ours has the socket itself
    expected = received = b""
    line.server.settimeout(10)
    try:
        for tag in range(1, 30):
            line.channel.basic_ack(tag)
            expected += ack(tag)
            if tag % 5 == 0:
                received += line.server.recv(3)
            if tag % 7 == 0:
                line.channel.basic_reject(tag, requeue=False)
                expected += method(spec.Basic.Reject, "Lb", tag, False)
        while len(received) < len(expected):
            received += line.server.recv(65536)
    finally:
        transport.sock = sock
    assert received == expected


class Full(Narrow):
    """A socket for which the system has no memory at first."""

    def send(self, octets: Any, flags: int) -> int:
        self.calls += 1
        if self.calls < 3:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return int(self.sock.send(octets, flags))


def test_what_the_system_has_no_room_for_is_written_later(line: Line) -> None:
    """The connection is well: the messages would stay unacknowledged for as long as it lives."""
    line.connection.hold_acks(64)
    transport = line.connection.transport
    sock, transport.sock = transport.sock, Full(transport.sock)
    line.server.settimeout(10)
    try:
        line.channel.basic_ack(1)
        assert line.server.recv(100) == ack(1)
    finally:
        transport.sock = sock


def test_a_lost_connection_is_left_to_the_loop(line: Line) -> None:
    """The thread raises nothing, and ends; nothing is held back any more."""
    line.connection.hold_acks(64)
    line.server.close()
    line.channel.basic_ack(1)
    wait_until(lambda: not watchers(), 10, what="the thread to end")
    assert not line.connection.acks
    with pytest.raises(OSError):
        line.channel.basic_ack(2)


def test_a_connection_that_is_given_up_holds_nothing(patient: Line) -> None:
    """Its messages are delivered again; an acknowledgement of one of them fails, as it always has."""
    patient.connection.hold_acks(64)
    channel = patient.channel
    channel.basic_ack(1)
    patient.connection.collect()
    assert not patient.connection.acks
    assert arrived(patient) == b""
    with pytest.raises(Exception, match="already closed"):
        channel.basic_ack(2)


def test_a_connection_that_nobody_has_any_more_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does the thread keep the connection."""
    monkeypatch.setattr(acks, "_LOST", 0.05)
    made = Line(monkeypatch)
    sock = made.connection.transport.sock
    with made.server, sock:
        made.connection.hold_acks(64)
        made.channel.basic_ack(1)
        assert watchers()
        gone = weakref.ref(made.connection)
        made.connection.channels.clear()
        made.channel = made.connection = made.got = None
        wait_until(lambda: gc.collect() is not None and gone() is None, 10, what="the connection to be gone")
        wait_until(lambda: not watchers(), 10, what="the thread to end")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_a_forked_child_sends_nothing_of_its_parents(patient: Line) -> None:
    """The socket is one for both."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if not patient.connection.acks else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool(patient.connection.acks)
    patient.connection.transport.write(b"")
    assert arrived(patient) == ack(1)


def test_without_another_thread_each_goes_by_itself(patient: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have as many as it is allowed."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patient.connection.hold_acks(64)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    patient.channel.basic_ack(1)
    assert arrived(patient) == ack(1)
    monkeypatch.undo()


def test_who_holds_the_lock_for_long_does_not_keep_a_connection_open(patient: Line) -> None:
    """A thread that is stuck in a write, say."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    with patient.connection.acks.lock:
        patient.connection.collect()
    assert not patient.connection.acks


def test_what_cannot_wait_takes_the_others_along(patient: Line) -> None:
    """A task that is acknowledged before it runs."""
    patient.connection.hold_acks(64)
    patient.channel.basic_ack(1)
    patient.channel.basic_ack(2)
    patient.channel.settle_now()
    assert arrived(patient) == ack(1) + ack(2)
    patient.channel.settle_now()
    assert arrived(patient) == b""


def test_over_tls_each_goes_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its socket takes no flags: a write by a second thread might block."""
    line = Line(monkeypatch, ThrowawayCA(tmp_path))
    with line.server, line.connection.transport.sock:
        line.connection.hold_acks(64)
        line.channel.basic_ack(1)
        line.server.settimeout(10)
        assert line.server.recv(100) == ack(1)


def test_the_channel_is_the_one_of_the_messages(patient: Line) -> None:
    """Tags count for each channel."""
    patient.connection.hold_acks(64)
    patient.server.sendall(method(spec.Channel.OpenOk, "S", b"", channel=2))
    other = patient.connection.channel()
    patient.server.recv(65536)
    assert other.channel_id != CHANNEL
    other.basic_ack(1)
    patient.connection.transport.write(b"")
    assert arrived(patient) == method(spec.Basic.Ack, "Lb", 1, False, channel=other.channel_id)
