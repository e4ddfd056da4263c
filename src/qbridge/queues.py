"""Which queues does a bridge know, which does its worker consume, and what do priorities mean on them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kombu.entity import Queue

from qbridge.celery_settings import kombu_queue
from qbridge.config import BridgeConfig, QueueConfig, did_you_mean
from qbridge.exceptions import UnknownQueueError
from qbridge.options import Priority
from qbridge.task import TaskDefinition

__all__ = ["KnownQueues"]


class KnownQueues:
    """The queues of the configuration and those that tasks name.

    Args:
        config: the bridge's configuration.
        definitions: returns the tasks declared so far.
    """

    def __init__(self, config: BridgeConfig, definitions: Callable[[], Iterable[TaskDefinition]]) -> None:
        self._config = config
        self._definitions = definitions

    def configs(self, default: str | None = None) -> dict[str, QueueConfig]:
        """Return all queues by name.

        Args:
            default: name of the default queue; None: the configuration's.
        """
        queues = {queue.name: queue for queue in self._config.queues}
        named = [definition.queue for definition in self._definitions() if definition.queue]
        for name in (default or self._config.default_queue, *named):
            if name not in queues:
                queues[name] = QueueConfig(name)
        return queues

    @property
    def any_named(self) -> bool:
        """True if the configuration or a task names a queue."""
        return bool(self._config.queues) or any(definition.queue for definition in self._definitions())

    def declarations(self, default: str) -> tuple[list[Queue], list[str]]:
        """Return all queues as kombu declares them, and the names of those that a worker leaves to others.

        Left to others are the queues of remote tasks, unless they are configured or carry tasks of this bridge too.
        """
        queues = self.configs(default)
        remote = {definition.queue for definition in self._definitions() if definition.remote}
        ours = {definition.queue or default for definition in self._definitions() if not definition.remote}
        configured = {queue.name for queue in self._config.queues}
        left_to_others = [name for name in queues if name in remote - ours - configured - {default}]
        return [kombu_queue(self._config, queue) for queue in queues.values()], left_to_others

    def refuse_unknown(self, name: str, also_known: Iterable[str] = ()) -> None:
        """Refuse a queue that nobody declared.

        Args:
            name: the queue's name.
            also_known: names that were assigned to Celery's settings at run time.

        Raises:
            UnknownQueueError: with a did-you-mean.
        """
        known = {*self.configs(), *also_known}
        if name not in known:
            near = did_you_mean(name, known)
            hint = near[:1].upper() + near[1:] if near else f"Declared are: {', '.join(sorted(known))}."
            raise UnknownQueueError(
                f"no queue {name!r} is declared",
                f"{hint} A queue is declared in BridgeConfig(queues=...) or on a task.",
            )

    def priority(self, level: Priority, queue: str, server_version: Callable[[], tuple[int, ...]]) -> int | None:
        """Return the AMQP priority number that stands for a level on a queue, or None to send none.

        Args:
            level: ``"low"``, ``"normal"`` or ``"high"``.
            queue: the queue's name.
            server_version: asks RabbitMQ for its version; called only where that decides.

        Raises:
            UnsupportedFeature: if the queue has no priorities; names the way.
        """
        broker = self._config.broker
        if broker.kind == "redis" and self._config.defaults == "celery":
            # kombu's own transport, which takes the lowest number first; unmarked messages have 0 there
            return {"high": 0, "normal": 3, "low": 6}[level]
        declared = self.configs().get(queue)
        levels = declared.max_priority if declared is not None else None
        asks = broker.kind == "rabbitmq" and level != "normal" and levels is None
        return broker.celery_priority(
            level,
            queue_type=declared.type if declared is not None else None,
            max_priority=levels,
            server_version=server_version() if asks else None,
        )
