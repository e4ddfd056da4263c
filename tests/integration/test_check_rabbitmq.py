"""``check`` on a real RabbitMQ: each trouble by its name, nothing changed on the server, no secret said."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import amqp
import celery
import pytest

from qbridge.backends.base import Finding
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.config import QueueConfig
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until

SECRET = "s3cret-password"


@pytest.fixture
def vhost(qbridge_rabbitmq: RabbitMQServer) -> Iterator[str]:
    """URL of an empty vhost."""
    with qbridge_rabbitmq.heal().fresh() as url:
        yield url


@contextmanager
def channel_on(url: str) -> Iterator[Any]:
    """A channel of an administrator's own connection."""
    broker = RabbitMQBroker.from_url(url)
    account = {"userid": broker.username, "password": broker.password.get_secret_value()}
    with amqp.Connection(host=str(broker.servers[0]), virtual_host=broker.vhost, **account) as connection:
        yield connection.channel()


@contextmanager
def account(server: RabbitMQServer, url: str, **permissions: str) -> Iterator[RabbitMQBroker]:
    """A broker model for a user with its own password; without permissions named, one that may not enter."""
    broker = RabbitMQBroker.from_url(url)
    server.create_user("weak", SECRET)
    if permissions:
        server.set_permissions("weak", broker.vhost, **permissions)
    try:
        yield broker.model_copy(update={"username": "weak", "password": type(broker.password)(SECRET)})
    finally:
        server.delete_user("weak")


def look(broker: RabbitMQBroker, *queues: Any, **how: Any) -> dict[str, list[Finding]]:
    """Findings by code; their time is bounded and they keep the password to themselves."""
    started = time.monotonic()
    findings = list(broker.check(queues, **how))
    assert time.monotonic() - started < broker.publish_timeout + 1
    assert SECRET not in repr(findings)
    assert all(finding.todo for finding in findings if finding.level in ("error", "warning"))
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    return by_code


def errors(found: dict[str, list[Finding]]) -> Sequence[str]:
    """Codes of what is wrong."""
    return [code for code, findings in found.items() if any(finding.level == "error" for finding in findings)]


def test_a_healthy_server_has_no_errors_and_is_left_as_it_was(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """Its version is named, a message is confirmed, no queue and no exchange appears."""
    broker = RabbitMQBroker.from_url(vhost)
    found = look(broker, QueueConfig("default"), QueueConfig("pri", max_priority=5))
    assert [] == errors(found)
    assert "RabbitMQ" in found["broker.server"][0].what
    assert "broker.confirms" in found
    assert 2 == len(found["broker.queue_missing"])
    assert {} == qbridge_rabbitmq.queues(broker.vhost)
    with channel_on(vhost) as channel, pytest.raises(amqp.NotFound):
        channel.exchange_declare("qbridge.default", "topic", passive=True)


def test_messages_are_not_touched(vhost: str) -> None:
    """Neither taken nor marked as delivered before."""
    with channel_on(vhost) as channel:
        channel.queue_declare("q", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.basic_publish(amqp.Message("x"), routing_key="q")
        wait_until(lambda: channel.queue_declare("q", passive=True).message_count == 1, timeout=10, what="the message")
        found = look(RabbitMQBroker.from_url(vhost), QueueConfig("q"))
        assert "1 waiting" in found["broker.queue"][0].what
        message = channel.basic_get("q")
        assert message.delivery_info["redelivered"] is False
        assert 0 == message.headers.get("x-delivery-count", 0)


@pytest.mark.parametrize(
    ("there", "ours", "argument"),
    [
        ({"x-queue-type": "classic"}, QueueConfig("q"), "x-queue-type"),
        ({}, QueueConfig("q"), "x-queue-type"),
        ({"x-queue-type": "classic", "x-max-priority": 5}, QueueConfig("q", max_priority=9), "x-max-priority"),
    ],
)
def test_a_queue_with_other_arguments_is_named_with_the_argument(
    vhost: str, there: dict[str, Any], ours: QueueConfig, argument: str
) -> None:
    """Before a worker ends with PRECONDITION_FAILED."""
    with channel_on(vhost) as channel:
        channel.queue_declare("q", durable=True, auto_delete=False, arguments=there)
    found = look(RabbitMQBroker.from_url(vhost), ours)
    assert ["broker.queue_arguments"] == errors(found)
    assert argument in found["broker.queue_arguments"][0].what
    assert "rabbitmqctl delete_queue" in found["broker.queue_arguments"][0].todo


def test_an_exchange_of_another_type_is_named(vhost: str) -> None:
    """Before a worker ends with PRECONDITION_FAILED."""
    with channel_on(vhost) as channel:
        channel.exchange_declare("qbridge.q", "direct", durable=True, auto_delete=False)
    assert ["broker.exchange_arguments"] == errors(look(RabbitMQBroker.from_url(vhost), QueueConfig("q")))


def test_a_queue_of_plain_celery_is_right_under_celerys_defaults(vhost: str) -> None:
    """And wrong under ours."""
    app = celery.Celery("t", broker=vhost, set_as_current=False)
    with app.connection_for_write() as connection:
        app.amqp.queues["celery"].bind(connection.channel()).declare()
    assert [] == errors(look(RabbitMQBroker.from_url(vhost), QueueConfig("celery"), plain=True))
    assert ["broker.queue_arguments"] == errors(look(RabbitMQBroker.from_url(vhost), QueueConfig("celery")))


def test_a_queue_of_others_must_be_there(vhost: str) -> None:
    """``declare=False`` says that nobody of ours makes it."""
    found = look(RabbitMQBroker.from_url(vhost), QueueConfig("theirs", declare=False))
    assert ["broker.queue_missing"] == errors(found)
    with channel_on(vhost) as channel:
        channel.queue_declare("theirs", durable=False, auto_delete=False)
    assert [] == errors(look(RabbitMQBroker.from_url(vhost), QueueConfig("theirs", declare=False)))


def test_a_wrong_password_is_named_as_such(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """And is not shown."""
    with account(qbridge_rabbitmq, vhost, configure=".*") as broker:
        wrong = broker.model_copy(update={"password": type(broker.password)(f"{SECRET}x")})
        assert ["broker.credentials"] == errors(look(wrong))


def test_a_missing_vhost_comes_with_the_command_to_make_it(vhost: str) -> None:
    """And with the reminder that a leading slash makes another one."""
    broker = RabbitMQBroker.from_url(vhost).model_copy(update={"vhost": "/nowhere"})
    (finding,) = look(broker)["broker.vhost_missing"]
    assert "'/nowhere'" in finding.what
    assert "rabbitmqctl add_vhost /nowhere" in finding.todo
    assert "'nowhere'" in finding.todo


def test_an_account_that_may_not_enter_comes_with_the_command(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """No permission in this vhost at all."""
    with account(qbridge_rabbitmq, vhost) as broker:
        (finding,) = look(broker)["broker.permission"]
        assert f"rabbitmqctl set_permissions -p {broker.vhost} weak" in finding.todo


@pytest.mark.parametrize("right", ["configure", "write", "read"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_permission_is_named(right: str, exists: bool, vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """Which one, on what, whether the queue is there or not; and nothing is made or taken on the way."""
    if exists:
        with channel_on(vhost) as channel:
            channel.queue_declare("q", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
            channel.exchange_declare("qbridge.q", "topic", durable=True, auto_delete=False)
    with account(qbridge_rabbitmq, vhost, **{right: "^nothing$"}) as broker:
        found = look(broker, QueueConfig("q"))
        assert ["broker.permission"] == errors(found)
        (finding,) = found["broker.permission"]
        assert f"no permission to {right} " in finding.what
        assert "'q'" in finding.what
        assert "'qbridge.q'" in finding.what
        assert exists == bool(qbridge_rabbitmq.queues(broker.vhost))


def test_permissions_are_looked_at_name_by_name(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """A pattern that was written for the queue alone is found out."""
    with account(qbridge_rabbitmq, vhost, configure="^q$") as broker:
        (finding,) = look(broker, QueueConfig("q"))["broker.permission"]
        assert "configure 'qbridge.q' in" in finding.what


def test_an_alarm_is_named(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """The server takes no messages, and says so when one is sent."""
    if not qbridge_rabbitmq.private:
        pytest.skip("an alarm is set off on a private node only")
    qbridge_rabbitmq.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        broker = RabbitMQBroker.from_url(vhost)
        # The node looks at its memory once a second.
        wait_until(lambda: ["broker.alarm"] == errors(look(broker)), timeout=30, what="the alarm")
    finally:
        qbridge_rabbitmq.ctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: not errors(look(broker)), timeout=30, what="the end of the alarm")


def test_a_frozen_server_is_named_in_time(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """It accepts, and does not answer."""
    qbridge_rabbitmq.freeze()
    try:
        broker = RabbitMQBroker.from_url(vhost).model_copy(update={"publish_timeout": 2.0})
        assert ["broker.frozen"] == errors(look(broker))
    finally:
        qbridge_rabbitmq.heal()


def test_a_server_that_freezes_under_way_is_named_in_time(vhost: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """What was found before is still said."""
    broker = RabbitMQBroker.from_url(vhost).model_copy(update={"publish_timeout": 3.0})

    @dataclass
    class FreezesTheServer:
        """As QueueConfig; its name is asked for when the server is in the middle of things."""

        declare: bool = True
        type: None = None
        max_priority: None = None

        @property
        def name(self) -> str:
            qbridge_rabbitmq.freeze()
            return "q"

    try:
        found = look(broker, FreezesTheServer())
    finally:
        qbridge_rabbitmq.heal()
    assert "broker.server" in found
    assert ["broker.frozen"] == errors(found)


def test_nobody_there_is_named(vhost: str) -> None:
    """Refused, or not known to the name service."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        broker = RabbitMQBroker(host="127.0.0.1", port=closed.getsockname()[1])
        (finding,) = look(broker)["broker.unreachable"]
        assert "refused" in finding.what
    (finding,) = look(RabbitMQBroker(host="no.such.host.invalid"))["broker.unreachable"]
    assert "name service" in finding.what


def test_one_server_of_a_cluster_may_be_away(vhost: str) -> None:
    """Clients go to the others: a warning, and the rest is looked at."""
    parts = urlsplit(vhost)
    broker = RabbitMQBroker.from_url(vhost)
    cluster = RabbitMQBroker(hosts=("127.0.0.1:1", f"{parts.hostname}:{parts.port}"), vhost=broker.vhost)
    cluster = cluster.model_copy(update={"username": broker.username, "password": broker.password})
    found = look(cluster)
    assert [] == errors(found)
    assert "warning" == found["broker.unreachable"][0].level
    assert "broker.confirms" in found


def test_tls_to_a_plain_port_is_named(vhost: str) -> None:
    """And not reported as a broker that is down."""
    assert ["broker.tls"] == errors(look(RabbitMQBroker.from_url(vhost.replace("amqp://", "amqps://"))))
