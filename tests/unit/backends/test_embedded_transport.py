"""The embedded transport as kombu's own classes use it, in one process."""

# long because: one sentence per promise of kombu's transport interface.

from __future__ import annotations

import gc
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import NotFound, PreconditionFailed, RecoverableConnectionError
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import Hub
from kombu.exceptions import ChannelError, OperationalError
from kombu.pidbox import Mailbox

from qbridge.backends.embedded import EmbeddedBroker, register
from qbridge.backends.embedded.presence import _own

assert register.SCHEME

WORK = Queue("work", Exchange("work", type="direct"), routing_key="work")

Connect = Callable[..., Connection]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.db"


@pytest.fixture
def connect(path: Path) -> Iterator[Connect]:
    """Make connections, closed at the end."""
    connections: list[Connection] = []

    def make(**options: Any) -> Connection:
        url = EmbeddedBroker(path=path).celery_url()
        connections.append(Connection(url, transport_options={"publish_timeout": 0.3, **options}))
        return connections[-1]

    yield make
    for connection in connections:
        connection.release()


def publish(connection: Connection, *bodies: Any, queue: Queue = WORK, **options: Any) -> None:
    producer = connection.Producer()
    for body in bodies:
        producer.publish(body, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue], **options)


def receive(connection: Connection, queue: Queue = WORK, *, prefetch: int = 0, **options: Any) -> list[Any]:
    """All messages that a new consumer gets before there is a pause; not acknowledged, its channel stays open."""
    messages: list[Any] = []
    channel = connection.channel()
    channel.basic_qos(0, prefetch, False)
    Consumer(channel, [queue], on_message=messages.append, **options).consume()
    drain(connection)
    return messages


def drain(connection: Connection) -> None:
    try:
        while True:
            connection.drain_events(timeout=0.05)
    except TimeoutError:
        pass


def bodies(messages: list[Any]) -> list[Any]:
    return [message.payload for message in messages]


def test_the_three_levels_are_ordered_and_none_means_normal(connect: Connect) -> None:
    """What a plain producer sends without a priority ranks between low and high."""
    broker = EmbeddedBroker()
    for level in ("low", "normal", "high"):
        publish(connect(), level, priority=broker.celery_priority(level))  # type: ignore[arg-type]
    publish(connect(), "plain", priority=0)
    assert ["high", "normal", "plain", "low"] == bodies(receive(connect()))


@pytest.mark.parametrize("body", ["text", b"\x00bytes\xff", {"a": [1, "é"]}])
def test_bodies_and_headers_arrive_as_they_were_sent(connect: Connect, body: Any) -> None:
    """Text, bytes and JSON, with headers, properties and compression."""
    publish(connect(), body, headers={"x": [1, {"y": None}]}, correlation_id="c", compression="gzip")
    (message,) = receive(connect())
    assert message.payload == body
    assert message.headers["x"] == [1, {"y": None}]
    assert message.properties["correlation_id"] == "c"


def later(seconds: float) -> dict[str, str]:
    """Headers of a task (protocol 2) with an ETA."""
    return {"task": "t", "id": "1", "eta": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}


def test_a_task_with_an_eta_arrives_when_it_is_due(connect: Connect) -> None:
    """A waiting consumer wakes up for it, long before its next sweep; what is no task is not delayed."""
    consumer = connect(sweep_interval=60)
    messages: list[Any] = []
    Consumer(consumer.channel(), [WORK], on_message=messages.append).consume()
    sender = connect()
    publish(sender, "no task", headers={"eta": later(60)["eta"]})
    publish(sender, "later", headers=later(60))
    began = time.time()
    publish(sender, "soon", headers=later(0.3))
    consumer.drain_events(timeout=5)
    assert bodies(messages) == ["no task"]
    consumer.drain_events(timeout=5)
    assert bodies(messages) == ["no task", "soon"]
    assert 0.3 <= time.time() - began < 0.6
    with pytest.raises(TimeoutError):
        consumer.drain_events(timeout=0.05)


@pytest.mark.parametrize("eta", ["2999-01-01T00:00:00", "soon", 5, None], ids=repr)
def test_an_eta_without_zone_or_sense_is_the_workers_business(connect: Connect, eta: Any) -> None:
    """It knows the app's time zone, and it refuses what cannot be read."""
    publish(connect(), "work", headers={"task": "t", "id": "1", "eta": eta})
    assert bodies(receive(connect())) == ["work"]


def test_an_event_loop_is_woken_for_what_is_due(connect: Connect) -> None:
    """To the hundredth of a second, with no sweep in between, and after a time that lay further off."""
    consumer = connect(sweep_interval=60)
    hub = Hub()
    arrived: list[float] = []
    channel = consumer.channel()
    Consumer(channel, [WORK], on_message=lambda message: arrived.append(time.time()), no_ack=True).consume()
    consumer.register_with_event_loop(hub)
    loop = hub.create_loop()
    sender = connect()
    began = time.time()
    for seconds in (30, 0.5, 0.2):
        publish(sender, "work", headers=later(seconds))
    while len(arrived) < 2 and time.time() < began + 5:
        next(loop)
    waited = [when - began for when in arrived]
    assert 0.2 <= waited[0] < 0.4
    assert 0.5 <= waited[1] < 0.7
    hub.close()


def test_prefetch_bounds_what_is_held(connect: Connect) -> None:
    """Each acknowledgement makes room for one more, and a consumer that never acknowledges is not bounded."""
    connection = connect()
    publish(connection, 1, 2, 3, 4)
    messages = receive(connection, prefetch=2)
    assert [1, 2] == bodies(messages)
    messages[0].ack()
    drain(connection)
    assert [1, 2, 3] == bodies(messages)
    publish(connection, *range(5), queue=Queue("free", Exchange("free"), "free"))
    assert len(receive(connection, Queue("free", Exchange("free"), "free"), prefetch=2, no_ack=True)) == 5


@pytest.mark.parametrize("how", ["channel", "connection", "garbage"])
def test_an_orderly_end_returns_what_was_not_acknowledged(connect: Connect, how: str) -> None:
    """At once, in order, marked as redelivered; what was acknowledged stays gone."""
    connection = connect()
    publish(connection, 1, 2, 3)
    messages = receive(connection)
    messages[1].ack()
    if how == "channel":
        messages[0].channel.close()
    elif how == "connection":
        connection.release()
    else:
        finished = messages[0].channel.transport.store
        connection._transport = connection._connection = connection._default_channel = None
        messages.clear()
        gc.collect()
        assert finished is not None
    again = receive(connect())
    assert [1, 3] == bodies(again)
    assert all(message.delivery_info["redelivered"] for message in again)
    assert [1, 1] == [message.headers["x-delivery-count"] for message in again]


def test_the_first_delivery_is_not_marked(connect: Connect) -> None:
    """No header, redelivered False."""
    publish(connect(), 1)
    (message,) = receive(connect())
    assert message.delivery_info["redelivered"] is False
    assert "x-delivery-count" not in message.headers


def test_a_requeued_message_comes_before_the_others_and_a_rejected_one_is_gone(connect: Connect) -> None:
    """Its place in the queue is kept."""
    connection = connect()
    publish(connection, 1, 2, 3)
    messages = receive(connection, prefetch=1)
    messages[0].requeue()
    drain(connection)
    assert [1, 1] == bodies(messages)
    messages[1].reject()
    drain(connection)
    assert [1, 1, 2] == bodies(messages)


def test_acknowledging_several_at_once(connect: Connect) -> None:
    """``multiple`` settles everything up to the tag."""
    connection = connect()
    publish(connection, 1, 2, 3)
    messages = receive(connection)
    messages[1].ack(multiple=True)
    connection.release()
    assert [3] == bodies(receive(connect()))


def test_acknowledging_on_a_closed_channel_is_an_error_kombu_knows(connect: Connect) -> None:
    """The message went back, so the caller must not believe that it is settled."""
    connection = connect()
    publish(connection, 1)
    (message,) = receive(connection)
    message.channel.close()
    with pytest.raises(RecoverableConnectionError):
        message.ack()


def test_getting_single_messages(connect: Connect) -> None:
    """``Queue.get`` claims, or takes, one message; nothing there is None."""
    connection = connect()
    publish(connection, 1, 2)
    queue = WORK(connection.channel())
    message = queue.get()
    assert message.payload == 1
    assert queue.get(no_ack=True).payload == 2
    assert queue.get() is None
    message.ack()
    connection.release()
    assert receive(connect()) == []


def test_topic_and_fanout_exchanges_reach_queues_of_other_connections(connect: Connect) -> None:
    """Bindings live in the file; one queue gets one copy, however many of its bindings match."""
    topic, fanout = Exchange("t", type="topic"), Exchange("f", type="fanout")
    receiver, sender = connect(), connect()
    slow = Queue("slow", topic, routing_key="slow")
    deep = Queue("deep", bindings=[])
    channel = receiver.channel()
    for queue in (slow(channel), Queue("deep", topic, routing_key="reports.#")(channel)):
        queue.declare()
    deep(channel).bind_to(topic, "*.slow")
    Queue("copy", fanout)(channel).declare()
    producer = sender.Producer()
    for key in ("slow", "reports.slow", "reports"):
        producer.publish(key, exchange=topic, routing_key=key, declare=[topic])
    producer.publish("all", exchange=fanout, declare=[fanout])
    assert ["slow"] == bodies(receive(receiver, slow))
    assert ["reports.slow", "reports"] == bodies(receive(receiver, deep))
    assert ["all"] == bodies(receive(receiver, Queue("copy", fanout)))
    assert len(receiver.get_manager().get_bindings()) >= 4


def test_exchanges_keep_their_type_and_unknown_ones_are_errors(connect: Connect) -> None:
    """As on a real broker: nothing is sent into the void in silence."""
    connection = connect()
    Exchange("work", type="direct")(connection.channel()).declare()
    with pytest.raises(PreconditionFailed):
        Exchange("work", type="topic")(connection.channel()).declare()
    with pytest.raises(PreconditionFailed):
        Exchange("other", type="headers")(connection.channel()).declare()
    with pytest.raises(NotFound):
        connection.Producer().publish("x", exchange="nowhere", routing_key="x")
    with pytest.raises(NotFound):
        connection.channel().queue_declare("nowhere", passive=True)
    with pytest.raises(NotFound):
        connection.channel().exchange_declare("nowhere", passive=True)
    with pytest.raises(ChannelError, match="No queue is bound"):
        connection.Producer().publish("x", exchange="work", routing_key="nobody", mandatory=True)


def test_a_queue_is_made_by_sending_to_it_by_name(connect: Connect) -> None:
    """The default exchange loses nothing, even before any worker was started."""
    connect().Producer().publish("early", routing_key="work")
    assert ["early"] == bodies(receive(connect(), Queue("work", no_declare=True)))


def test_a_batch_is_one_transaction(connect: Connect, path: Path) -> None:
    """Nothing is visible before the end, everything after it, nothing if the block fails."""
    connection, other = connect(), connect()
    producer = connection.Producer()
    assert producer.supports_batch_publish
    with producer.batch():
        for number in range(10):
            producer.publish(number, routing_key="work")
        assert other.channel().queue_declare("work").message_count == 0
    assert other.channel().queue_declare("work").message_count == 10

    def broken() -> None:
        with producer.batch():
            producer.publish("lost on purpose", routing_key="work")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        broken()
    assert other.channel().queue_declare("work").message_count == 10


def test_publishing_many_messages_through_the_channel(connect: Connect) -> None:
    """The channel's own way, for bulk submission."""
    channel = connect().channel()
    messages = [(channel.prepare_message(f'"{n}"', content_type="application/json"), "", "work") for n in range(5)]
    channel.publish_many(messages)
    assert [str(number) for number in range(5)] == [
        message.payload for message in receive(connect(), Queue("work", no_declare=True))
    ]


@pytest.mark.parametrize("retry", [False, True])
def test_a_locked_file_is_an_operational_error_within_the_bound(connect: Connect, path: Path, retry: bool) -> None:
    """Also with kombu's retries, which must not multiply it; the error is a connection error of the transport."""
    connection = connect()
    publish(connection, 1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(OperationalError, match="locked") as caught:
        publish(connection, 2, retry=retry, retry_policy={"max_retries": 3, "interval_start": 0.1})
    assert time.monotonic() - began < 1.3
    assert isinstance(caught.value, connection.connection_errors)
    holder.close()
    publish(connection, 3)
    assert [1, 3] == bodies(receive(connection))


def test_a_deleted_file_is_survived_by_senders_that_retry(connect: Connect, path: Path) -> None:
    """Reconnect, declare again, send again: the message is in the new file."""
    connection = connect()
    publish(connection, 1, retry=True)
    for file in path.parent.glob("bridge.db*"):
        if file.is_file():
            file.unlink()
    publish(connection, 2, retry=True, retry_policy={"max_retries": 3})
    assert [2] == bodies(receive(connect()))


def test_a_full_disk_is_an_operational_error_and_nothing_is_half_sent(connect: Connect) -> None:
    """With what to do; what was sent before can still be received and acknowledged."""
    connection = connect()
    publish(connection, 1)
    database = connection.transport.store.database
    ((pages,),) = database.read("PRAGMA page_count")
    database.read(f"PRAGMA max_page_count={pages}")
    with pytest.raises(OperationalError, match="free some space"):
        publish(connection, "x" * 100_000)
    database.close()  # the limit is the connection's: the disk has space again
    assert [1] == bodies(receive(connection))


def test_a_consumer_whose_file_is_deleted_lets_go_of_everything(connect: Connect, path: Path) -> None:
    """The error says so, and closing then leaves neither a reader in the loop nor a descriptor."""
    before = len(os.listdir("/dev/fd"))
    connection, hub = connect(), Hub()
    connection.connect()
    connection.transport.register_with_event_loop(connection.connection, hub)
    Consumer(connection.channel(), [WORK], on_message=lambda message: None).consume()
    for file in path.parent.glob("bridge.db*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(connection.recoverable_connection_errors):
        connection.transport.sweep()
    connection.collect()
    assert hub.readers == {}
    assert hub.timer.queue == [] or all(entry.entry.canceled for entry in hub.timer.queue)
    hub.close()
    assert len(os.listdir("/dev/fd")) <= before


def test_senders_clean_up_behind_dead_listeners(connect: Connect) -> None:
    """Broadcasts without any living consumer must not grow the file for ever."""
    listener, sender = connect(), connect()
    events = Exchange("events", type="topic", delivery_mode="transient")
    queue = Queue("listener", events, routing_key="#", exclusive=True)
    queue(listener.channel()).declare()
    for file in listener.transport.store.folder.iterdir():
        file.unlink()
    _own.discard(listener.transport.party())  # as if it had been another process, killed
    sender.Producer().publish("x", exchange=events, routing_key="a", declare=[events])
    assert not sender.transport.store.queue_exists("listener")
    assert sender.transport.store.database.read("SELECT count(*) FROM message") == [(0,)]


def test_acknowledging_while_the_file_is_locked_is_done_later(connect: Connect, path: Path) -> None:
    """A finished task must not run again because somebody held the file for two seconds."""
    connection = connect()
    publish(connection, 1, 2)
    messages = receive(connection)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    messages[0].ack()
    holder.close()
    connection.transport.sweep()
    connection.release()
    assert [2] == bodies(receive(connect()))


def test_a_locked_file_does_not_disturb_a_consumer(connect: Connect, path: Path) -> None:
    """It waits; its connection, and with it the tasks that it runs, stay its own."""
    connection, sender = connect(sweep_interval=0.1), connect()
    assert receive(connection) == []
    publish(sender, 1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.2)
    holder.close()
    connection.drain_events(timeout=2)


def test_remote_control_works_and_leaves_nothing_behind(connect: Connect) -> None:
    """Fanout to a node, a reply through a temporary queue."""
    mailbox = Mailbox("test", type="fanout")
    serving, asking = connect(), connect()
    node = mailbox(serving).Node("node@here", channel=serving.channel(), state={})
    node.handler(lambda state: "pong")
    node.handlers["ping"] = node.handlers.pop("<lambda>")
    node.listen()
    questions = mailbox(asking)  # one object: its address is the name of the reply queue
    questions._publish("ping", {}, reply_ticket="t", channel=asking.channel())
    serving.drain_events(timeout=2)
    assert [{"node@here": "pong"}] == questions._collect("t", limit=1, timeout=2, channel=asking.channel())
    serving.release()
    rows = asking.transport.store.database.read("SELECT name FROM queue")
    assert rows == []


def test_unreadable_envelopes_are_handed_out_as_what_nobody_can_decode(connect: Connect) -> None:
    """So that they go the way of every bad message, and do not stop the worker."""
    connection = connect()
    publish(connection, 1)
    with connection.transport.store.database.write() as sql:
        sql.execute("UPDATE message SET envelope = 'not json'")
    (message,) = receive(connection)
    assert message.content_type == "application/x-unreadable"
    message.reject()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_a_forked_child_has_no_part_in_its_parents_messages(connect: Connect) -> None:
    """Closing, acknowledging or collecting in the child changes nothing; it can send on its own."""
    connection = connect()
    publish(connection, 1)
    (message,) = receive(connection)
    pid = os.fork()
    if pid == 0:  # pragma: no cover - in the child
        try:
            publish(connection, "from the child")
            message.channel.close()
            connection.collect()
            connection.release()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    other = connect()
    assert ["from the child"] == bodies(receive(other))
    message.ack()
    connection.release()
    other.release()
    assert ["from the child"] == bodies(receive(connect()))


def test_the_event_loop_delivers_one_message_per_turn(connect: Connect) -> None:
    """What a delivery schedules runs before the next delivery, and nothing waits for a timer."""
    hub = Hub()
    connection = connect()
    connection.connect()
    connection.transport.register_with_event_loop(connection.connection, hub)
    seen: list[str] = []

    def on_message(message: Any) -> None:
        seen.append(f"got {message.payload}")
        hub.call_soon(lambda: (message.ack(), seen.append(f"acked {message.payload}")))

    channel = connection.channel()
    channel.basic_qos(0, 1, False)
    Consumer(channel, [WORK], on_message=on_message).consume()
    publish(connect(), *range(20))
    began = time.monotonic()
    while len(seen) < 40:
        hub.run_once()
    assert time.monotonic() - began < 1.0
    assert [f"{what} {number}" for number in range(20) for what in ("got", "acked")] == seen
    readers = len(hub.readers)
    connection.release()
    assert len(hub.readers) == readers - 1
    hub.close()


def test_hundreds_of_connections_leave_no_descriptor_and_no_file(connect: Connect, path: Path) -> None:
    """Opening, sending, consuming and closing is clean."""
    publish(connect(), "warm up")
    before = len(os.listdir("/dev/fd"))
    for _ in range(200):
        with connect() as connection:
            publish(connection, 1)
            assert WORK(connection.channel()).get() is not None
    # SQLite keeps a descriptor for reuse while another connection has locks on the same file.
    assert len(os.listdir("/dev/fd")) <= before + 1
    assert list(path.with_name("bridge.db-parties").iterdir()) == []
