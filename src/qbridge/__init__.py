"""qbridge: a typed facade over Celery.

The public names, loaded when first used: importing the package opens nothing and pulls in no driver.
"""

from __future__ import annotations

from importlib import import_module

# Type checkers take it for typing's. Without the import a probe that looks at a worker every few seconds costs half.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from qbridge.backends.database import DatabaseResults as DatabaseResults
    from qbridge.backends.embedded import EmbeddedBroker as EmbeddedBroker
    from qbridge.backends.none import NoResults as NoResults
    from qbridge.backends.rabbitmq import RabbitMQBroker as RabbitMQBroker
    from qbridge.backends.redis import RedisBroker as RedisBroker
    from qbridge.backends.redis import RedisResults as RedisResults
    from qbridge.backends.rpc import RpcResults as RpcResults
    from qbridge.bridge import Bridge as Bridge
    from qbridge.calls import Item as Item
    from qbridge.config import BridgeConfig as BridgeConfig
    from qbridge.config import QueueConfig as QueueConfig
    from qbridge.config import SerializationConfig as SerializationConfig
    from qbridge.config import WorkerConfig as WorkerConfig
    from qbridge.context import Progress as Progress
    from qbridge.context import Retrying as Retrying
    from qbridge.context import TaskContext as TaskContext
    from qbridge.dead_letters import DeadLetter as DeadLetter
    from qbridge.dead_letters import DeadLetters as DeadLetters
    from qbridge.exceptions import ArgumentsError as ArgumentsError
    from qbridge.exceptions import BatchError as BatchError
    from qbridge.exceptions import BrokerUnavailable as BrokerUnavailable
    from qbridge.exceptions import ConfigurationError as ConfigurationError
    from qbridge.exceptions import DeadLetterUnknown as DeadLetterUnknown
    from qbridge.exceptions import DuplicateTaskError as DuplicateTaskError
    from qbridge.exceptions import PayloadError as PayloadError
    from qbridge.exceptions import QBridgeError as QBridgeError
    from qbridge.exceptions import ResultsUnavailable as ResultsUnavailable
    from qbridge.exceptions import ResultTimeout as ResultTimeout
    from qbridge.exceptions import ResultUnknown as ResultUnknown
    from qbridge.exceptions import TaskFailed as TaskFailed
    from qbridge.exceptions import TaskRevoked as TaskRevoked
    from qbridge.exceptions import UnknownQueueError as UnknownQueueError
    from qbridge.exceptions import UnsupportedFeature as UnsupportedFeature
    from qbridge.report import Report as Report
    from qbridge.result import TaskResult as TaskResult
    from qbridge.retry import Retry as Retry
    from qbridge.task import AsyncTask as AsyncTask
    from qbridge.task import Task as Task
    from qbridge.task import TaskSet as TaskSet

__version__ = "0.1.0"

__all__ = [
    "ArgumentsError",
    "AsyncTask",
    "BatchError",
    "Bridge",
    "BridgeConfig",
    "BrokerUnavailable",
    "ConfigurationError",
    "DatabaseResults",
    "DeadLetter",
    "DeadLetterUnknown",
    "DeadLetters",
    "DuplicateTaskError",
    "EmbeddedBroker",
    "Item",
    "NoResults",
    "PayloadError",
    "Progress",
    "QBridgeError",
    "QueueConfig",
    "RabbitMQBroker",
    "RedisBroker",
    "RedisResults",
    "Report",
    "ResultTimeout",
    "ResultUnknown",
    "ResultsUnavailable",
    "Retry",
    "Retrying",
    "RpcResults",
    "SerializationConfig",
    "Task",
    "TaskContext",
    "TaskFailed",
    "TaskResult",
    "TaskRevoked",
    "TaskSet",
    "UnknownQueueError",
    "UnsupportedFeature",
    "WorkerConfig",
    "__version__",
]

# where each name lives; a unit test keeps the two lists equal
_HOMES = {
    "ArgumentsError": "exceptions",
    "AsyncTask": "task",
    "BatchError": "exceptions",
    "Bridge": "bridge",
    "BridgeConfig": "config",
    "BrokerUnavailable": "exceptions",
    "ConfigurationError": "exceptions",
    "DatabaseResults": "backends.database",
    "DeadLetter": "dead_letters",
    "DeadLetterUnknown": "exceptions",
    "DeadLetters": "dead_letters",
    "DuplicateTaskError": "exceptions",
    "EmbeddedBroker": "backends.embedded",
    "Item": "calls",
    "NoResults": "backends.none",
    "PayloadError": "exceptions",
    "Progress": "context",
    "QBridgeError": "exceptions",
    "QueueConfig": "config",
    "RabbitMQBroker": "backends.rabbitmq",
    "RedisBroker": "backends.redis",
    "RedisResults": "backends.redis",
    "Report": "report",
    "ResultTimeout": "exceptions",
    "ResultUnknown": "exceptions",
    "ResultsUnavailable": "exceptions",
    "Retry": "retry",
    "Retrying": "context",
    "RpcResults": "backends.rpc",
    "SerializationConfig": "config",
    "Task": "task",
    "TaskContext": "context",
    "TaskFailed": "exceptions",
    "TaskResult": "result",
    "TaskRevoked": "exceptions",
    "TaskSet": "task",
    "UnknownQueueError": "exceptions",
    "UnsupportedFeature": "exceptions",
    "WorkerConfig": "config",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'qbridge' has no attribute {name!r}")
    value = getattr(import_module(f"qbridge.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
