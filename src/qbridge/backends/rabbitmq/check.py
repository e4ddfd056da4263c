"""What is wrong between us and this RabbitMQ? A look at the live server that changes nothing on it.

Nothing is declared, consumed or routed that was not there. Permissions are asked for with requests that RabbitMQ
refuses only after it has looked at the account: 403 says that the account may not, any other refusal that it may.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import amqp
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed

from qbridge.backends.base import Finding
from qbridge.backends.deadline import deadline, remaining
from qbridge.backends.network import reach, redact
from qbridge.backends.rabbitmq.connection import BoundedAMQPTransport
from qbridge.backends.rabbitmq.explain import explain, surprise
from qbridge.backends.rabbitmq.publisher import ConfirmChannel, NotConfirmed
from qbridge.backends.urls import Address

if TYPE_CHECKING:
    from qbridge.backends.rabbitmq import RabbitMQBroker

__all__ = ["check"]

QUORUM_QUEUES_SINCE = (3, 8)
QUORUM_PRIORITIES_SINCE = (4, 0)


def check(broker: RabbitMQBroker, queues: Sequence[Any] = (), *, plain: bool = False) -> tuple[Finding, ...]:
    """Look at the server within ``publish_timeout`` seconds.

    Args:
        broker: where it is and who we are.
        queues: ``QueueConfig`` objects.
        plain: whether they are declared as plain Celery does (``defaults="celery"``).
    """
    findings: list[Finding] = []
    with deadline(broker.publish_timeout):
        visit = _Visit(broker)
        try:
            findings.extend(visit.arrive())
            if visit.connection is not None:
                for finding in visit.look(queues, plain):
                    findings.append(finding)  # noqa: PERF402 - what was found before an error counts
        except TimeoutError:
            findings.append(visit.frozen())
        except Exception as error:  # noqa: BLE001 - a check reports, whatever happens
            findings.append(surprise(error, broker, visit.server))
        finally:
            visit.leave()
    return tuple(findings)


class _Alarm(Exception):
    """RabbitMQ says that it has blocked this connection."""


class _Visit:
    def __init__(self, broker: RabbitMQBroker) -> None:
        self.broker = broker
        self.server: Address = broker.servers[0]
        self.connection: Any = None
        self.confirms: ConfirmChannel | None = None
        self.missing: dict[str, list[str]] = {"configure": [], "write": [], "read": []}

    # -- arriving

    def arrive(self) -> Iterator[Finding]:
        """Find a server that accepts, and log in."""
        broker = self.broker
        up: list[Address] = []
        down: list[Finding] = []
        for server in broker.servers:
            patience = min(broker.connect_timeout, (remaining() or 0.0) / 2)
            trouble = reach(server, patience, of="broker", product="RabbitMQ")
            if trouble is None:
                up.append(server)
            else:
                down.append(trouble)
        for trouble in down:
            # one server of several: its clients go to the others
            yield Finding("warning" if up else "error", trouble.code, trouble.what, trouble.todo)
        if not up:
            return
        self.server = up[0]
        connection = self._new_connection()
        started = time.monotonic()
        try:
            connection.connect()
        except TimeoutError:
            yield self.frozen(time.monotonic() - started)
        except (OSError, amqp.exceptions.AMQPError, ValueError, KeyError) as error:
            yield explain(error, self.broker, self.server)
        else:
            self.connection = connection
            yield from self._server()

    def _new_connection(self) -> Any:
        broker = self.broker
        settings = broker.celery_settings()
        options = settings["broker_transport_options"]
        encryption: Any = broker.ssl_options(self.server) if broker.tls else False  # py-amqp's types know only bool
        return BoundedAMQPTransport.Connection(
            host=str(self.server),
            userid=broker.username,
            password=broker.password.get_secret_value(),
            login_method="PLAIN",
            virtual_host=broker.vhost,
            ssl=encryption,
            connect_timeout=min(broker.connect_timeout, remaining() or 0.1),
            read_timeout=options["read_timeout"],
            write_timeout=options["write_timeout"],
            socket_settings=options["socket_settings"],
            client_properties={"connection_name": "qbridge check"},
            on_blocked=self._on_blocked,
        )

    def _on_blocked(self, _reason: str) -> None:
        raise _Alarm  # RabbitMQ reads nothing more from this connection: there is nothing to wait for

    def _server(self) -> Iterator[Finding]:
        about = self.connection.server_properties
        product, version = about.get("product", "an AMQP server"), str(about.get("version", "of unknown version"))
        cluster = f", cluster {about['cluster_name']}" if about.get("cluster_name") else ""
        yield Finding(
            "ok",
            "broker.server",
            f"{product} {version} at {self.server}{cluster}, "
            f"vhost {self.broker.vhost!r}, user {self.broker.username!r}",
        )
        numbers = tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())
        if self.broker.queue_type != "quorum" or not numbers:
            return
        if numbers < QUORUM_QUEUES_SINCE:
            yield Finding(
                "error",
                "broker.version",
                f"RabbitMQ {version} has no quorum queues (they came with 3.8)",
                "Upgrade RabbitMQ, or set queue_type='classic' before the first queue is declared.",
            )
        elif numbers < QUORUM_PRIORITIES_SINCE:
            yield Finding(
                "info",
                "broker.priorities",
                f"quorum queues of RabbitMQ {version} have no priorities (they came with 4.0)",
                "Where priorities are needed: QueueConfig(name, type='classic', max_priority=9).",
            )

    # -- looking around

    def look(self, queues: Sequence[Any], plain: bool) -> Iterator[Finding]:
        """Look at each queue, then publish something that goes nowhere."""
        for queue in queues:
            yield from self._queue(queue, plain)
        user, vhost = shlex.quote(self.broker.username), shlex.quote(self.broker.vhost)
        yield from self._confirm(queues, plain)
        for right, names in self.missing.items():
            if names:
                yield Finding(
                    "error",
                    "broker.permission",
                    f"the user {self.broker.username!r} has no permission to {right} "
                    f"{', '.join(map(repr, dict.fromkeys(names)))} in vhost {self.broker.vhost!r}",
                    f"rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*' "
                    "(the patterns are: configure, write, read)",
                )

    def _queue(self, queue: Any, plain: bool) -> Iterator[Finding]:
        name, declared = queue.name, queue.declare
        kind, arguments = _arguments(self.broker, queue, plain)
        try:
            found = self._ask(lambda channel: channel.queue_declare(name, passive=True))
        except NotFound:
            if not declared:
                yield Finding(
                    "error",
                    "broker.queue_missing",
                    f"the queue {name!r} does not exist, and declare=False says that it is not ours to make",
                    "Have its owner make it, or correct its name, or leave out declare=False.",
                )
            else:
                self._may("configure", name, _impossible(name))
                yield Finding(
                    "info",
                    "broker.queue_missing",
                    f"the queue {name!r} does not exist yet",
                    "Start a worker: it is made.",
                )
        except AccessRefused:
            self.missing["configure"].append(name)
            return
        else:
            trouble = self._mismatch(name, arguments) if declared else None
            yield trouble or Finding(
                "ok",
                "broker.queue",
                f"queue {name!r}{f' ({kind})' if declared else ''}: {found.message_count} waiting, "
                f"{found.consumer_count} consumers",
            )
        self._may("read", name, _impossible_consumer(name))
        if declared and not plain:
            yield from self._exchange(f"qbridge.{name}")
            # Binding the one to the other reads from the exchange (and writes to the queue: see _confirm).
            self._may("read", f"qbridge.{name}", _impossible_consumer(f"qbridge.{name}"))

    def _mismatch(self, name: str, arguments: dict[str, Any]) -> Finding | None:
        """Declare a queue that exists as a worker would: the same again changes nothing, anything else is refused."""
        try:
            self._ask(lambda channel: channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments))
        except PreconditionFailed as error:
            return Finding(
                "error",
                "broker.queue_arguments",
                f"the queue {name!r} exists with other arguments: {_inequality(error)}",
                f"Declare it as it is (QueueConfig({name!r}, type=…, max_priority=…), or declare=False), or empty and "
                f"delete it so that it is made anew: rabbitmqctl delete_queue -p {shlex.quote(self.broker.vhost)} "
                f"{shlex.quote(name)} --if-empty. A queue's arguments cannot be changed.",
            )
        except AccessRefused:
            self.missing["configure"].append(name)
        return None

    def _exchange(self, name: str) -> Iterator[Finding]:
        try:
            self._ask(lambda channel: channel.exchange_declare(name, "topic", passive=True))
        except NotFound:
            # Permissions are patterns of names, whatever the name is of: ask for a queue, which can be refused.
            self._may("configure", name, _impossible(name))
            return
        except AccessRefused:
            self.missing["configure"].append(name)
            return
        try:
            self._ask(lambda channel: channel.exchange_declare(name, "topic", durable=True, auto_delete=False))
        except PreconditionFailed as error:
            yield Finding(
                "error",
                "broker.exchange_arguments",
                f"the exchange {name!r} exists with other arguments: {_inequality(error)}",
                "Delete it in RabbitMQ's management; the next worker makes it anew and binds its queue.",
            )
        except AccessRefused:
            self.missing["configure"].append(name)

    def _confirm(self, queues: Sequence[Any], plain: bool) -> Iterator[Finding]:
        """Publish to each exchange with a key that no queue has: it is returned and confirmed, and goes nowhere."""
        exchanges = [queue.name if plain else f"qbridge.{queue.name}" for queue in queues if queue.declare]
        if not plain:
            # Binding a queue to its exchange writes to the queue; permissions are patterns of names, of whatever.
            exchanges += [queue.name for queue in queues if queue.declare]
        confirmed = False
        # Twice at the end: under an alarm RabbitMQ takes the first message of a connection, and nothing after it.
        # Nobody needs the permission to write to the default exchange: without it, the others must do.
        try:
            for exchange in exchanges:
                try:
                    confirmed = self._publish_nowhere(exchange) or confirmed
                except AccessRefused:
                    self.missing["write"].append(exchange)
            with suppress(AccessRefused):
                for _ in range(2):
                    confirmed = self._publish_nowhere("") or confirmed
        except _Alarm:
            yield Finding(
                "error",
                "broker.alarm",
                f"RabbitMQ at {self.server} takes no messages: a memory or disk alarm is in force",
                "rabbitmq-diagnostics alarms says which; free memory or disk, or consume what is waiting.",
            )
        except (NotConfirmed, TimeoutError):
            yield Finding(
                "error",
                "broker.confirms",
                f"RabbitMQ at {self.server} did not confirm a message in time",
                "It may be overloaded or out of disk: look at rabbitmq-diagnostics status and at its log.",
            )
        else:
            if confirmed:
                yield Finding("ok", "broker.confirms", "a message was published and its arrival confirmed")

    def _publish_nowhere(self, exchange: str) -> bool:
        if self.confirms is None or not self.confirms.usable:
            self.confirms = ConfirmChannel(self.connection)
        self.confirms.publish(amqp.Message(""), exchange=exchange, routing_key=f"qbridge-check-{uuid4().hex}")
        try:
            # A quarter of the time: an alarm lets the first message wait for ever.
            self.confirms.settle(timeout=min(3.0, self.broker.publish_timeout / 4))
        except NotConfirmed as error:
            if error.may_have_arrived:
                raise
        except NotFound:
            self.confirms = None
            return False  # this exchange is not there yet; the account may publish to it
        except AccessRefused:
            self.confirms = None
            raise
        return True

    # -- asking

    def _ask(self, request: Callable[[Any], Any]) -> Any:
        """Make one request on a channel of its own: a refusal closes the channel."""
        channel = self.connection.channel()
        try:
            return request(channel)
        finally:
            if channel.is_open and channel.connection is not None:
                with suppress(OSError, amqp.exceptions.AMQPError):
                    channel.close()

    def _may(self, right: str, name: str, request: Callable[[Any], Any]) -> None:
        try:
            self._ask(request)
        except AccessRefused:
            self.missing[right].append(name)
        except (PreconditionFailed, NotFound):
            pass  # refused for the reason that we gave it, after the account was found to be good enough

    # -- ends

    def frozen(self, waited: float | None = None) -> Finding:
        patience = self.broker.publish_timeout if waited is None else waited
        return Finding(
            "error",
            "broker.frozen",
            f"{self.server} accepts connections and does not answer (waited {patience:.1f} s)",
            "RabbitMQ may be starting, stopped (SIGSTOP) or swapping, or something else listens there: look at "
            "rabbitmq-diagnostics check_running and at its log.",
        )

    def leave(self) -> None:
        if self.connection is None:
            return
        with suppress(Exception), deadline(0.5):  # a server that is blocked or frozen does not say goodbye
            self.connection.close()
        with suppress(Exception):
            self.connection.collect()


def _impossible(name: str) -> Callable[[Any], Any]:
    """A queue of a type that does not exist: refused with 406 after the permission was looked at, nothing is made."""
    arguments = {"x-queue-type": "qbridge-check"}
    return lambda channel: channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)


def _impossible_consumer(name: str) -> Callable[[Any], Any]:
    """A consumer whose priority is no number: refused with 406 after the permission was looked at, nothing is taken."""
    return lambda channel: channel.basic_consume(name, nowait=False, arguments={"x-priority": "none"})


def _arguments(broker: RabbitMQBroker, queue: Any, plain: bool) -> tuple[str, dict[str, Any]]:
    most = queue.max_priority
    if plain:
        return "classic", {}
    kind = queue.type or ("classic" if most is not None else broker.queue_type)
    return kind, {"x-queue-type": kind, **({} if most is None else {"x-max-priority": most})}


def _inequality(error: Exception) -> str:
    """RabbitMQ's own words: which argument, what was asked for, what it is."""
    said = redact(getattr(error, "reply_text", None) or error)
    return said.removeprefix("PRECONDITION_FAILED - ")
