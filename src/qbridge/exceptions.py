"""Every error that qbridge raises, in one tree.

::

    QBridgeError
    ├── ConfigurationError (also ValueError)   the configuration or a definition cannot work
    │   ├── UnknownQueueError                  a queue that nobody declared
    │   ├── DuplicateTaskError                 one task name, two functions
    │   └── UnsupportedFeature                 this broker, result backend or pool cannot do it
    ├── ArgumentsError (also TypeError)        arguments that do not fit the task's signature
    ├── PayloadError (also ValueError)         a value that cannot cross the wire
    ├── BrokerUnavailable (also ConnectionError)
    ├── ResultsUnavailable (also ConnectionError)
    ├── ResultTimeout (also TimeoutError)
    ├── ResultUnknown                          no such id, expired, or forgotten
    ├── DeadLetterUnknown (also LookupError)   no dead letter with that id
    ├── TaskFailed                             a remote failure that cannot be rebuilt as its own type
    ├── TaskRevoked                            the task was revoked, or its time was over
    └── BatchError                             a bulk submission that was not confirmed as a whole

The classes never move: Celery stores their module and name beside failed results.
Every field is passed to ``Exception.__init__`` by position and the message is made in ``__str__``, so that an
error survives pickle and the JSON result path (``cls(*args)`` rebuilds it); a unit test proves it for each.
``__str__`` is defined once, at the root, because an ``OSError`` with two fields would print them as errno and strerror.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ArgumentsError",
    "BatchError",
    "BrokerUnavailable",
    "ConfigurationError",
    "DeadLetterUnknown",
    "DuplicateTaskError",
    "PayloadError",
    "QBridgeError",
    "ResultTimeout",
    "ResultUnknown",
    "ResultsUnavailable",
    "TaskFailed",
    "TaskRevoked",
    "UnknownQueueError",
    "UnsupportedFeature",
]


class QBridgeError(Exception):
    """Root of all errors of qbridge.

    Args:
        what: what happened, to which object: one sentence without a full stop.
        todo: what to do next; may be empty.
    """

    def __init__(self, what: str = "", todo: str = "", *fields: Any) -> None:
        # not super(): OSError would take the fields for errno, strerror and a file name, and drop one from args
        Exception.__init__(self, what, todo, *fields)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.what}. {self.todo}" if self.todo else self.what


class ConfigurationError(QBridgeError, ValueError):
    """A configuration or a definition cannot work; raised before anything is sent or started."""


class UnknownQueueError(ConfigurationError):
    """A queue was named that is neither in the configuration nor on any task."""


class DuplicateTaskError(ConfigurationError):
    """A task name is used twice, for two different functions."""


class UnsupportedFeature(ConfigurationError):
    """This broker, result backend or pool cannot do what was asked; the message names the way."""


class ArgumentsError(QBridgeError, TypeError):
    """Arguments do not fit the signature of the task.

    Args:
        what: names the task and each field with its fault; never shows the values.
        todo: what to do next.
        task: name of the task.
        errors: one mapping per fault: ``loc`` (path, a tuple or list), ``msg``, ``type``, as pydantic reports them.
    """

    def __init__(
        self, what: str = "", todo: str = "", task: str = "", errors: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(what, todo, task, list(errors))
        self.task = task
        self.errors: list[Mapping[str, Any]] = list(errors)


class PayloadError(QBridgeError, ValueError):
    """A value cannot cross the wire: not serializable, too large, or not readable as what it should be."""


class BrokerUnavailable(QBridgeError, ConnectionError):
    """The broker did not take the message within the bound.

    Args:
        what: which server, how long was waited.
        todo: what to try.
        may_have_arrived: True if the message may be on the broker all the same (no confirmation was seen).
    """

    def __init__(self, what: str = "", todo: str = "", may_have_arrived: bool = False) -> None:
        super().__init__(what, todo, may_have_arrived)
        self.may_have_arrived = may_have_arrived


class ResultsUnavailable(QBridgeError, ConnectionError):
    """The result backend cannot be reached, or cannot answer this question from here."""


class ResultTimeout(QBridgeError, TimeoutError):
    """The result did not arrive in time; the task may still be queued or running.

    Args:
        what: which task, how long was waited.
        todo: what to try.
        task_id: id of the task.
    """

    def __init__(self, what: str = "", todo: str = "", task_id: str = "") -> None:
        super().__init__(what, todo, task_id)
        self.task_id = task_id


class ResultUnknown(QBridgeError):
    """The result is proven gone or never was: no such id, expired, or forgotten."""

    def __init__(self, what: str = "", todo: str = "", task_id: str = "") -> None:
        super().__init__(what, todo, task_id)
        self.task_id = task_id


class DeadLetterUnknown(QBridgeError, LookupError):
    """There is no dead letter with this id: never was, replayed, or discarded.

    Args:
        what: which id.
        todo: where to look.
        letter_id: the id.
    """

    def __init__(self, what: str = "", todo: str = "", letter_id: str = "") -> None:
        super().__init__(what, todo, letter_id)
        self.letter_id = letter_id


class TaskFailed(QBridgeError):
    """The task failed in the worker with an error that cannot be rebuilt here as its own type.

    Args:
        type_name: the remote exception's qualified name, such as ``"shop.errors.OutOfStock"``.
        message: its text.
        remote_traceback: the traceback as the worker saw it, or an empty string.
        task_id: id of the task.
    """

    def __init__(self, type_name: str = "", message: str = "", remote_traceback: str = "", task_id: str = "") -> None:
        # The root's first two fields are what and todo; this class stores its own four instead.
        Exception.__init__(self, type_name, message, remote_traceback, task_id)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback
        self.task_id = task_id
        self.what: str = f"task {task_id} failed in the worker with {type_name}: {message}"
        self.todo = ""


class TaskRevoked(QBridgeError):
    """The task was revoked or had expired before it ran, or its ``ctx.check()`` found so while it ran."""

    def __init__(self, what: str = "", todo: str = "", task_id: str = "") -> None:
        super().__init__(what, todo, task_id)
        self.task_id = task_id


class BatchError(QBridgeError):
    """A bulk submission was not confirmed as a whole; says what became of each message.

    Args:
        what: what happened.
        todo: what to do next.
        confirmed: ids of messages that the broker confirmed.
        unsent: ids of messages that were certainly not taken.
        uncertain: ids of messages that may or may not be on the broker.
    """

    def __init__(
        self,
        what: str = "",
        todo: str = "",
        confirmed: Sequence[str] = (),
        unsent: Sequence[str] = (),
        uncertain: Sequence[str] = (),
    ) -> None:
        super().__init__(what, todo, list(confirmed), list(unsent), list(uncertain))
        self.confirmed: list[str] = list(confirmed)
        self.unsent: list[str] = list(unsent)
        self.uncertain: list[str] = list(uncertain)
