"""The Celery task behind each typed task: decode, run, encode, inside whatever worker executes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from celery import Task as CeleryTask
from celery.exceptions import Ignore, Reject
from celery.exceptions import Retry as CeleryRetry

from qbridge import aio
from qbridge.celery_settings import payload_limit, task_attributes
from qbridge.config import BridgeConfig
from qbridge.context import TaskContext
from qbridge.exceptions import ArgumentsError, PayloadError
from qbridge.options import Delivery
from qbridge.retry import Retry
from qbridge.serialization.schema import wire_json
from qbridge.task import TaskDefinition

__all__ = ["HEADER_ATTEMPTS_SINCE", "TypedTask", "typed_task"]

HEADER_ATTEMPTS_SINCE = "qbridge_first_attempt"
"""Message header with the time of the first attempt (ISO 8601), for ``Retry(timeout=...)``."""


class _Run:
    """The part of a context that talks to the worker (see ``qbridge.context.Run``)."""

    def __init__(self, task: TypedTask) -> None:
        self.task = task

    def report(self, state: str, meta: Mapping[str, Any]) -> None:
        if not self.task.ignore_result:
            self.task.update_state(state=state, meta=dict(meta))

    def try_again(self, wait: float | None) -> NoReturn:
        self.task.try_again(None, wait)


class TypedTask(CeleryTask):
    """A typed task as Celery sees it: JSON in, JSON out."""

    abstract = True
    Request = "qbridge.worker.request:TypedRequest"
    # arguments are checked by our signature; Celery's check would do it a second time
    typing = False
    Strategy = "qbridge.worker.strategy:typed"

    definition: TaskDefinition
    policy: Retry | None = None
    delivery: Delivery | None = None
    #: Largest encoded result in bytes; None: no limit.
    max_payload_bytes: int | None = None
    #: Whether messages and logs show arguments (Celery's way) or only count them.
    show_arguments = False
    #: Options of every send that the task itself decides: its queue, its priority number.
    routing: Mapping[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Decode the arguments, call the function, encode what it returns."""
        definition = self.definition
        if self.request.called_directly:
            return definition.function(*args, **kwargs)
        given, named = definition.signature.decode_call(args, kwargs)
        if definition.context:
            given.insert(0, self._context())
        try:
            value = definition.function(*given, **named)
            if definition.is_async or inspect.iscoroutine(value):
                value = aio.run(value)
        except (CeleryRetry, Ignore, Reject):
            raise
        except Exception as error:
            self._retry_if_due(error)
            raise
        encoded = definition.signature.encode_result(value)
        self._refuse_large(encoded)
        return encoded

    def _refuse_large(self, encoded: Any) -> None:
        limit = self.max_payload_bytes
        if limit is None or self.ignore_result or encoded is None or isinstance(encoded, bool | int | float):
            return
        size = len(wire_json(encoded))
        if size > limit:
            raise PayloadError(
                f"the result of task {self.name} has {size:,} bytes, the limit is {limit:,}",
                "Store the data and return a reference, or raise serialization.max_payload_bytes.",
            )

    def _context(self) -> TaskContext:
        request = self.request
        headers = request.headers or {}
        ours = {
            key: value for key, value in headers.items() if key not in _CELERY_HEADERS and not key.startswith("qbridge")
        }
        info = request.delivery_info or {}
        return TaskContext(
            task_id=request.id,
            attempt=(request.retries or 0) + 1,
            max_attempts=self.policy.attempts if self.policy is not None else 1,
            queue=queue_named(self.app, info.get("routing_key")),
            headers=ours,
            _run=_Run(self),
        )

    # -- retries

    def _retry_if_due(self, error: Exception) -> None:
        policy = self.policy
        if policy is None or isinstance(error, ArgumentsError | PayloadError):
            return
        wait = policy.next_wait(error, (self.request.retries or 0) + 1, self._elapsed())
        if wait is not None:
            self.try_again(error, wait)

    def try_again(self, error: Exception | None, wait: float | None) -> NoReturn:
        """Schedule the next attempt and end this one; attempts are counted in the message."""
        headers = dict(self.request.headers or {})
        headers.setdefault(HEADER_ATTEMPTS_SINCE, datetime.now(UTC).isoformat())
        self.retry(exc=error, countdown=wait or 0, max_retries=_UNBOUNDED, headers=_own(headers))
        raise AssertionError("Celery's retry always raises")

    def _elapsed(self) -> float:
        began = (self.request.headers or {}).get(HEADER_ATTEMPTS_SINCE)
        try:
            return (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds() if began else 0.0
        except (TypeError, ValueError):
            return 0.0  # somebody else's header

    # -- sending through Celery's own ways: signatures, canvas, beat

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Send as Celery does, with arguments checked: Python values are encoded, JSON values are taken as they are."""
        if not options.get("retries"):  # a retry repeats what was checked
            args, kwargs = self._checked(args or (), kwargs or {})
        return self.send_encoded(args, kwargs, *rest, **options)

    def send_encoded(self, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Send arguments that are JSON already, by Celery's own ``Task.apply_async``, which tracers wrap."""
        if not self.show_arguments:
            options.setdefault("argsrepr", f"({len(args)} hidden)")
            options.setdefault("kwargsrepr", f"{{{len(kwargs)} hidden}}")
        # a tuple, as delay() has it: that is how headers and events show it
        return CeleryTask.apply_async(self, tuple(args), kwargs, *rest, **options)

    def _checked(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        signature = self.definition.signature
        try:
            return signature.encode_call(args, kwargs)
        except ArgumentsError as error:
            try:
                signature.decode_call(args, kwargs)
            except (ArgumentsError, PayloadError):
                raise error from None
            return args, kwargs

    def _get_exec_options(self) -> dict[str, Any]:
        options: dict[str, Any] = super()._get_exec_options()
        return {**options, **self.routing} if self.routing else options


# Celery reads None as "the task's own max_retries", which bounds lost workers, not the attempts of a policy.
_UNBOUNDED = 2**31

_CELERY_HEADERS = frozenset({
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
    "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
    "stamps", "compression",
})  # fmt: skip


def _own(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in headers.items() if key not in _CELERY_HEADERS}


def queue_named(app: Any, routing_key: str | None) -> str | None:
    """Return the queue with this routing key: the name is encoded where it holds dots."""
    for name, queue in app.amqp.queues.items():
        if queue.routing_key == routing_key or name == routing_key:
            return str(name)
    return routing_key


def typed_task(app: Any, config: BridgeConfig, definition: TaskDefinition) -> TypedTask:
    """Return the Celery task behind a typed task, not yet in the app's registry.

    Args:
        app: the bridge's app.
        config: the bridge's configuration.
        definition: what was declared.
    """
    attributes = {
        **task_attributes(config, definition.options),
        "name": definition.name,
        "_app": app,
        "definition": definition,
        "policy": definition.options.get("retry", config.retry),
        "max_payload_bytes": payload_limit(config),
        "show_arguments": config.defaults == "celery",
        "routing": {"queue": definition.queue} if definition.queue else {},
        "__doc__": definition.function.__doc__,
        "__module__": definition.function.__module__,
    }
    made: TypedTask = type(definition.function.__name__, (TypedTask,), attributes)()
    return made
