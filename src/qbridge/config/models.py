"""What can be said about queues, workers and payloads?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from qbridge.backends.base import REDIS_KEYS
from qbridge.config.faults import ConfigModel
from qbridge.exceptions import ConfigurationError
from qbridge.serialization.keys import Key, read_key, refuse_duplicates
from qbridge.serialization.lock import Lock

__all__ = ["QueueConfig", "SerializationConfig", "WorkerConfig", "check_queue_name"]

PoolName = Literal["process", "thread", "solo"]
QueueType = Literal["quorum", "classic"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: kombu's native delayed delivery owns these names on the whole virtual host.
_DELAY_QUEUE = re.compile(r"celery_delayed_\d+")
#: AMQP names are short strings.
_LIMIT = 255
# Keys in Redis, where a queue is one too, of what is not acknowledged.
_UNACKNOWLEDGED = ("unacked", "unacked_index", "unacked_mutex")


def check_queue_name(name: str, *, declare: bool = True) -> str:
    """Refuse a queue name that some broker could not carry.

    Args:
        name: the name.
        declare: True if qbridge also names an exchange, a routing key and a dead-letter queue after it.

    Returns:
        The name.

    Raises:
        ConfigurationError: if the name is empty, too long, reserved, or has characters that get lost on the way.
    """
    if not name or name != name.strip():
        raise ConfigurationError("a queue name is empty or has spaces around it", "write a name such as 'reports'")
    if _CONTROL.search(name) or not name.isprintable():
        raise ConfigurationError("a queue name has unprintable characters", "write a name such as 'reports'")
    if "," in name:
        raise ConfigurationError(
            f"the queue name {name!r} has a comma, where `--queues` takes names apart", "write '-' or '.' instead"
        )
    if name.startswith("amq."):
        raise ConfigurationError(f"the queue name {name!r} starts with 'amq.', reserved by RabbitMQ", "write another")
    if name.startswith(REDIS_KEYS) or name in _UNACKNOWLEDGED:
        raise ConfigurationError(f"the queue name {name!r} is that of a key in Redis that is no queue", "write another")
    if _DELAY_QUEUE.fullmatch(name):
        raise ConfigurationError(f"the queue name {name!r} belongs to RabbitMQ's delayed delivery", "write another")
    # Ours are wrapped in an exchange name and percent-encoded into a routing key; queues of others are only named.
    spelt = max(len(f"qbridge.{name}".encode()), len(quote(name, safe="").encode())) if declare else len(name.encode())
    if spelt > _LIMIT:
        raise ConfigurationError(
            f"a queue name of {len(name.encode())} bytes is too long for AMQP, whose names have at most {_LIMIT} bytes",
            "write a shorter one (characters other than letters, digits, '_', '-', '~' and '.' count three times)",
        )
    return name


class QueueConfig(ConfigModel):
    """A queue that the bridge sends to or consumes.

    Args:
        name: its name on the broker.
        type: ``"quorum"`` or ``"classic"``; None: what the broker's ``queue_type`` says, or classic where
            ``max_priority`` is set. RabbitMQ only.
        declare: False for a queue of another system: it is used as it is, never declared.
        max_priority: RabbitMQ classic queues only: how many priority levels the queue is declared with.
    """

    name: str
    """Name of the queue on the broker; none that a broker uses itself, such as `amq.…`, `qbridge.…` or `unacked`."""
    type: QueueType | None = None
    """RabbitMQ only: `quorum` or `classic`; unset: the broker's `queue_type`, or `classic` if it has `max_priority`."""
    declare: bool = True
    """False for a queue of another system: used as it is, never declared."""
    max_priority: Annotated[int, Field(ge=1, le=255)] | None = None
    """RabbitMQ classic queues only: levels of priority that the queue is declared with.
    A queue that exists cannot change it."""

    if TYPE_CHECKING:

        def __init__(
            self,
            name: str,
            *,
            type: QueueType | None = None,  # noqa: A002 - the field's name
            declare: bool = True,
            max_priority: int | None = None,
        ) -> None: ...

    else:

        def __init__(self, *name: str, **values: Any) -> None:
            if len(name) > 1 or (name and "name" in values):
                raise TypeError("QueueConfig takes one name, the rest by keyword: QueueConfig('a', declare=False)")
            super().__init__(**({"name": name[0]} if name else {}), **values)

        __init__.__pydantic_base_init__ = True  # see ConfigModel

    @model_validator(mode="after")
    def _name_fits(self) -> QueueConfig:
        check_queue_name(self.name, declare=self.declare)
        if self.max_priority is not None and self.type == "quorum":
            raise ConfigurationError(
                f"queue {self.name!r} is a quorum queue with max_priority, which RabbitMQ refuses",
                "write type='classic', or leave max_priority out",
            )
        if self.max_priority is not None and not self.declare:
            raise ConfigurationError(
                f"queue {self.name!r} has max_priority but declare=False: its owner decides on its arguments",
                "leave max_priority out",
            )
        return self


class WorkerConfig(ConfigModel):
    """What a worker is: its pool, its size, and when it gives up.

    Args:
        pool: how tasks run beside one another.
        concurrency: tasks at a time; None: one per core.
        prefetch: messages taken in advance per slot.
        max_redeliveries: crashes of a worker that one message survives.
        unknown_task_grace: seconds for which a task that a worker does not know is left to others.
        keep_expired: whether a task that had expired before it could run becomes a dead letter too.
        shutdown_timeout: seconds that running tasks get when the worker is told to stop.
        max_tasks_per_child: tasks after which a process of the pool is replaced; None: never.
        max_memory_per_child: KiB of resident memory above which a process of the pool is replaced; None: never.
        store_timeout: seconds for which a task that has ended offers its outcome to a result backend that is away.
        watchdog: seconds after which a worker that is up and does no work reconnects, then ends; 0: never.
        health_file: file in which the worker tells how it is; None: none.
        health_port: port on which it answers that; 0: a free one; None: none.
        health_host: address of that port.
    """

    pool: PoolName = "process"
    """How tasks run beside one another: `process` (time limits are enforced), `thread`, or `solo` (one at a time)."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Tasks that run at a time; unset: one per core."""
    # 1: what a busy worker holds back, an idle one cannot take (Celery's 4 hoards work).
    prefetch: Annotated[int, Field(ge=1)] = 1
    """Messages taken in advance per slot."""
    # 5: a deploy or an evicted container may kill a worker a few times in a row; a message that kills it each time
    # must end somewhere.
    max_redeliveries: Annotated[int, Field(ge=0)] = 5
    """Crashes of a worker that one message survives before it becomes a dead letter."""
    # 300 s: a rolling deploy has new workers by then, and who waits for the result waits for no longer than usual.
    unknown_task_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """Seconds for which a task that a worker does not know is left to other workers before it becomes a dead letter."""
    # False: who says when a task is of no use any more has said what is to become of it.
    keep_expired: bool = False
    """Whether a task that had expired, or was past its deadline, before it could run becomes a dead letter too.
    It is REVOKED in any case."""
    # 25 s: below the 30 s that container platforms wait before they kill.
    shutdown_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    """Seconds that running tasks get when the worker is told to stop; set it below the platform's grace period."""
    max_tasks_per_child: Annotated[int, Field(ge=1)] | None = None
    """Tasks after which a process of the pool is replaced; unset: never. `process` only."""
    max_memory_per_child: Annotated[int, Field(ge=1)] | None = None
    """KiB of resident memory above which a process of the pool is replaced after its task; unset: never.
    `process` only."""
    # 15 min: longer than a restart or a failover, and half of the time after which RabbitMQ closes the channel of a
    # message that is not acknowledged.
    store_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 900.0
    """Seconds for which a task that has ended offers its outcome to a result backend that does not take it.
    Then its message goes back, and it runs again."""
    # 60 s: longer than any bounded wait inside a worker (connecting, storing a result), and short for a queue that
    # nobody works on.
    watchdog: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    """Seconds after which a worker that is up and does no work connects anew, and ends if that does not help.
    0: never."""
    health_file: Path | None = None
    """File in which a worker tells every two seconds how it is; `python -m qbridge.probe` reads it."""
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port with `/live` and `/ready` over HTTP; 0: a free one, which the log names."""
    # This machine only: what it tells is no secret, but nobody asked for an open port.
    health_host: str = "127.0.0.1"
    """Address of that port; `0.0.0.0` for probes from outside a container."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            pool: PoolName = "process",
            concurrency: int | None = None,
            prefetch: int = 1,
            max_redeliveries: int = 5,
            unknown_task_grace: float = 300.0,
            keep_expired: bool = False,
            shutdown_timeout: float = 25.0,
            max_tasks_per_child: int | None = None,
            max_memory_per_child: int | None = None,
            store_timeout: float = 900.0,
            watchdog: float = 60.0,
            health_file: Path | str | None = None,
            health_port: int | None = None,
            health_host: str = "127.0.0.1",
        ) -> None: ...

    @model_validator(mode="after")
    def _pool_can(self) -> WorkerConfig:
        if self.pool == "solo" and self.concurrency not in (None, 1):
            raise ConfigurationError(
                "pool='solo' runs one task at a time, so concurrency above 1 would be ignored",
                "write pool='thread' or 'process', or leave concurrency out",
            )
        for name in ("max_tasks_per_child", "max_memory_per_child"):
            if self.pool != "process" and getattr(self, name) is not None:
                raise ConfigurationError(
                    f"{name} replaces processes, and pool={self.pool!r} has none to replace",
                    f"write pool='process', or leave {name} out",
                )
        return self


def _keys(value: Any) -> Any:
    """One text, or several; none is in a message about what is wrong with it."""
    if isinstance(value, str | SecretStr):
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        value = [part for part in text.split(",") if part.strip()]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigurationError("should be a list of keys", "write ['id:secret'], newest first")
    found = []
    for each in value:
        text = each.get_secret_value() if isinstance(each, SecretStr) else each
        if not isinstance(text, str):
            raise ConfigurationError("should be a list of texts", "write ['id:secret'], newest first")
        read_key(text)
        found.append(SecretStr(text.strip()))
    return tuple(found)


class SerializationConfig(ConfigModel):
    """How arguments and results are written down.

    Args:
        format: ``"json"`` or ``"msgpack"``.
        max_payload_bytes: largest encoded message or result.
        signing_keys: with which messages and results are signed; the first signs, all are accepted.
        encryption_keys: with which bodies are encrypted besides; the first encrypts, all are accepted.
        require_signatures: False while keys are rolled out: what is not signed is accepted too.
    """

    format: Literal["json", "msgpack"] = "json"
    """How arguments and results are encoded; every Celery peer reads `json`. There is no pickle here."""
    # 1 MiB: brokers keep messages in memory and copy them between nodes; what is larger belongs into a store of its
    # own, with its key in the message.
    max_payload_bytes: Annotated[int, Field(ge=1024, le=512 * 1024 * 1024)] = 1_048_576
    """Largest encoded message or result, in bytes, before compression; a larger one is refused where it is made, and
    a larger message by the worker too."""
    signing_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_keys)] = ()
    """Keys, `id:base64`, with which messages and results are signed; the first signs, and each is accepted. A worker
    runs nothing then that no holder of one has sent. `qbridge keys` makes one."""
    encryption_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_keys)] = ()
    """Keys, `id:base64`, with which arguments and results are encrypted besides; the first encrypts, and each is
    accepted. Needs `signing_keys`, and `qbridge[crypto]`."""
    require_signatures: bool = True
    """False while keys are rolled out: what is not signed is accepted too."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            format: Literal["json", "msgpack"] = "json",  # noqa: A002 - the field's name
            max_payload_bytes: int = 1_048_576,
            signing_keys: Iterable[str | SecretStr] | str = (),
            encryption_keys: Iterable[str | SecretStr] | str = (),
            require_signatures: bool = True,
        ) -> None: ...

    @field_validator("format")
    @classmethod
    def _installed(cls, value: str) -> str:
        if value == "msgpack" and find_spec("msgpack") is None:
            raise ConfigurationError("msgpack is not installed", "pip install 'qbridge[msgpack]', or write 'json'")
        return value

    @model_validator(mode="after")
    def _keys_fit(self) -> SerializationConfig:
        signing, encryption = _read(self.signing_keys), _read(self.encryption_keys)
        refuse_duplicates(signing)
        refuse_duplicates(encryption, others=signing)
        if encryption and not signing:
            raise ConfigurationError(
                "encryption_keys without signing_keys would let anybody send what he likes in clear",
                "set signing_keys too",
            )
        if encryption and find_spec("cryptography") is None:
            raise ConfigurationError(
                "encryption_keys need cryptography, which is not installed", 'pip install "qbridge[crypto]"'
            )
        return self

    def lock(self) -> Lock | None:
        """Return what signs and encrypts; None: nothing does."""
        signing = _read(self.signing_keys)
        return Lock(signing, _read(self.encryption_keys), required=self.require_signatures) if signing else None


def _read(keys: Iterable[SecretStr]) -> list[Key]:
    return [read_key(key.get_secret_value()) for key in keys]
