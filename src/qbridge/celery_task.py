"""The Celery task behind each typed task: decode, run, encode, inside whatever worker executes it."""

from __future__ import annotations

import inspect
import re
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from billiard.common import terminate_handler_fired
from celery import Task as CeleryTask
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, WorkerShutdown, WorkerTerminate
from celery.exceptions import Retry as CeleryRetry
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE

from qbridge import aio
from qbridge.celery_settings import payload_limit, task_attributes
from qbridge.config import BridgeConfig
from qbridge.context import TaskContext
from qbridge.exceptions import ArgumentsError, PayloadError, TaskFailed
from qbridge.options import CELERY_HEADERS, Delivery
from qbridge.retry import Retry
from qbridge.serialization.results import error_text
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
        self.task.try_again_as_asked(wait)


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
        began = time.time()
        try:
            value = definition.function(*given, **named)
            if definition.is_async or inspect.iscoroutine(value):
                value = aio.run(value)
        except (CeleryRetry, Ignore, Reject):
            raise
        except Exception as error:
            self._retry_if_due(error, began)
            raise
        except BaseException as error:
            if self.request.is_eager or _ends_the_process(error):
                raise
            text = "".join(traceback.format_exception(error))
            raise TaskFailed(type(error).__qualname__, error_text(error), text, str(self.request.id)) from error
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
        given = _given(request.headers or {})
        info = request.delivery_info or {}
        return TaskContext(
            task_id=request.id,
            attempt=(request.retries or 0) + 1,
            max_attempts=self.policy.attempts if self.policy is not None else 1,
            queue=queue_named(self.app, info.get("routing_key")),
            headers={key: value for key, value in given.items() if not key.startswith("qbridge")},
            _run=_Run(self),
        )

    # -- retries

    def _retry_if_due(self, error: Exception, began: float) -> None:
        policy = self.policy
        if policy is None or isinstance(error, ArgumentsError | PayloadError):
            return
        first = self._first_attempt(began)
        wait = policy.next_wait(error, (self.request.retries or 0) + 1, max(0.0, time.time() - first))
        if wait is not None:
            self._try_again(error, wait, first)

    def try_again_as_asked(self, wait: float | None) -> NoReturn:
        """Schedule the attempt that the running one asks for.

        Args:
            wait: seconds; None: what the policy says, or none.

        Raises:
            MaxRetriesExceededError: Celery's, if this was the last attempt that the policy allows.
        """
        policy, attempt = self.policy, (self.request.retries or 0) + 1
        if policy is not None and attempt >= policy.attempts:
            raise MaxRetriesExceededError(f"task {self.name} asks for another run after attempt {attempt}, its last")
        if wait is None:
            wait = policy.wait(attempt) if policy is not None else 0.0
        self._try_again(None, wait, self._first_attempt(time.time()))

    def _try_again(self, error: Exception | None, wait: float, first: float) -> NoReturn:
        """Schedule the next attempt and end this one; attempts are counted in the message."""
        headers = _given(self.request.headers or {})
        headers[HEADER_ATTEMPTS_SINCE] = datetime.fromtimestamp(first, UTC).isoformat()
        self.retry(exc=error, countdown=wait, max_retries=_UNBOUNDED, headers=headers)
        raise AssertionError("Celery's retry always raises")

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any:
        """Return the message of the next attempt: Celery's, for the queue that this one came from.

        Celery takes exchange and routing key from the message; of one that RabbitMQ has delayed they are those of the
        delay, and the next attempt would go to the default queue.
        """
        request = self.request if request is None else request
        if queue is None:
            name = queue_named(self.app, (request.delivery_info or {}).get("routing_key"))
            queue = name if name in self.app.amqp.queues else None
        return super().signature_from_request(request, args, kwargs, queue, **options)

    def _first_attempt(self, began: float) -> float:
        """Return when the first attempt began, in seconds since 1970; this one began at ``began``."""
        said = (self.request.headers or {}).get(HEADER_ATTEMPTS_SINCE)
        try:
            return datetime.fromisoformat(said).timestamp() if said else began
        except (TypeError, ValueError):
            return began  # somebody else's header

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

# kombu's native delays put the bits of the delay before the key.
_DELAY = re.compile(rf"^(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")

# RabbitMQ's notes about a message that was delayed or delivered again.
_BROKER_HEADERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")


def _given(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that neither the protocol nor the broker has added."""
    return {
        key: value
        for key, value in headers.items()
        if key not in CELERY_HEADERS and not str(key).startswith(_BROKER_HEADERS)
    }


def _ends_the_process(error: BaseException) -> bool:
    """Return whether an exception that is no ``Exception`` came from outside, to end more than the task.

    A task's own ``sys.exit()`` does not: Celery takes it for the death of a process and runs the task again and again
    (process pool), stops the worker (solo) or never ends the task (thread).
    """
    if isinstance(error, WorkerShutdown | WorkerTerminate) or terminate_handler_fired():
        return True
    # their time limits and kills: gevent.Timeout, greenlet.GreenletExit
    return type(error).__module__.partition(".")[0] in ("gevent", "eventlet", "greenlet")


def queue_named(app: Any, routing_key: str | None) -> str | None:
    """Return the queue with this routing key: the name is encoded where it holds dots."""
    if routing_key is not None:
        routing_key = _DELAY.sub("", routing_key)
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
