"""The Celery task behind each typed task: decode, run, encode, inside whatever worker executes it."""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NoReturn

from billiard.common import terminate_handler_fired
from celery import Task as CeleryTask
from celery import signals
from celery.exceptions import (
    Ignore,
    Reject,
    SoftTimeLimitExceeded,
    TaskError,
    WorkerShutdown,
    WorkerTerminate,
)
from celery.exceptions import Retry as CeleryRetry
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE

from qbridge import aio
from qbridge.backends.base import TAKEN_FROM
from qbridge.backends.deadline import deadline
from qbridge.backends.storing import KeepsOutcomes
from qbridge.celery_settings import payload_limit, task_attributes
from qbridge.config import BridgeConfig
from qbridge.context import TaskContext
from qbridge.due_by import deadline_of, inherited, limited, passed
from qbridge.exceptions import ArgumentsError, PayloadError, TaskFailed, TaskRevoked
from qbridge.live_run import AskedAgain, LiveRun
from qbridge.options import Delivery
from qbridge.retry import Retry
from qbridge.retrying import History, give_up, hand_over, kept_headers
from qbridge.serialization.results import NEXT_ATTEMPT, error_text
from qbridge.serialization.schema import wire_json
from qbridge.standing import Standing
from qbridge.task import TaskDefinition
from qbridge.versions import decode_received, is_of_another_version

__all__ = ["TypedTask", "typed_task"]


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
    #: Losses of a worker or a process that one message survives; None: Celery's way.
    max_redeliveries: int | None = None
    #: Largest encoded result in bytes; None: no limit.
    max_payload_bytes: int | None = None
    #: Whether messages and logs show arguments (Celery's way) or only count them.
    show_arguments = False
    #: Options of every send that the task itself decides: its queue, its priority number.
    routing: Mapping[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Decode the arguments, call the function, encode what it returns."""
        definition = self.definition
        request = self.request  # Celery looks for it on a stack at each mention
        if request.called_directly:
            return definition.function(*args, **kwargs)
        standing = Standing(self, request)
        standing.begin()
        began = time.time()
        try:
            with limited(deadline_of(request.headers)):
                value = self._tried(request, args, kwargs, began, standing)
        except AskedAgain as asked:
            standing.end()
            self._try_again(asked.error, asked.wait, History.of(request, began))
        except (CeleryRetry, Ignore, Reject):
            standing.end()
            raise
        except Exception as error:
            standing.end()
            if isinstance(error, TaskRevoked) and error.task_id == request.id:
                self._end_revoked(error)
            self._retry_if_due(error, began)
            raise
        except BaseException as error:
            if request.is_eager or _ends_the_process(error):
                raise
            standing.end()
            text = "".join(traceback.format_exception(error))
            raise TaskFailed(type(error).__qualname__, error_text(error), text, str(request.id)) from error
        standing.end()
        encoded = definition.signature.encode_result(value)
        self._refuse_large(encoded)
        return encoded

    def _decoded(self, request: Any, args: Any, kwargs: Any) -> tuple[list[Any], Mapping[str, Any]]:
        """Read the arguments, by the signature of then where the message is of an older version."""
        try:
            return decode_received(self.definition, request.headers, args, kwargs)
        except (ArgumentsError, PayloadError) as error:
            give_up(error, "invalid", request, (request.retries or 0) + 1)
            raise

    def _tried(self, request: Any, args: Any, kwargs: Any, began: float, standing: Standing) -> Any:
        """Read the arguments and call the function; each again in this slot, if the policy says ``where="worker"``."""
        function = self.definition.function
        in_slot = self.policy is not None and self.policy.where == "worker"
        decode = partial(self._decoded, request, args, kwargs)
        # an upcaster may raise what the policy covers, and may block: in the slot, never on the loop
        given, named = self._again_in_the_slot(decode, request, began) if in_slot else decode()

        def call() -> Any:
            first = (self._context(request, began, standing),) if self.definition.context else ()
            return function(*first, *given, **named)

        if in_slot:
            if self.definition.is_async:
                return aio.run(self._again_on_the_loop(call, request, began))
            return self._again_in_the_slot(call, request, began)
        value = call()
        return aio.run(value) if self.definition.is_async or inspect.iscoroutine(value) else value

    def _again_in_the_slot(self, call: Callable[[], Any], request: Any, began: float) -> Any:
        while True:
            try:
                value = call()
                return aio.run(value) if inspect.iscoroutine(value) else value
            except Exception as raised:
                wait = self._next_wait(request, raised, began)
                if wait is None:
                    raise
                error, until = raised, time.monotonic() + wait
            while (left := until - time.monotonic()) > 0:
                _leave_at_shutdown(left, error)
                time.sleep(min(left, _LOOK_UP))
            _count(request, error, wait, began)

    async def _again_on_the_loop(self, call: Callable[[], Any], request: Any, began: float) -> Any:
        while True:
            try:
                return await call()
            except Exception as raised:
                wait = self._next_wait(request, raised, began)
                if wait is None:
                    raise
                error, until = raised, time.monotonic() + wait
            while (left := until - time.monotonic()) > 0:
                _leave_at_shutdown(left, error)
                await asyncio.sleep(min(left, _LOOK_UP))
            _count(request, error, wait, began)

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

    def _context(self, request: Any, began: float, standing: Standing) -> TaskContext:
        given = kept_headers(request.headers or {})
        return TaskContext(
            task_id=request.id,
            attempt=(request.retries or 0) + 1,
            max_attempts=self.policy.attempts if self.policy is not None else 1,
            queue=self._queue_of(request),
            headers={key: value for key, value in given.items() if not key.startswith("qbridge")},
            deadline=deadline_of(request.headers),
            _run=LiveRun(self, request, began, standing),
        )

    def _end_revoked(self, error: TaskRevoked) -> None:
        """End a run that its own ``ctx.check()`` has ended: REVOKED, as a task that was revoked before it ran.

        Raises:
            celery.exceptions.Ignore: but for an eager task, whose caller gets the error.
        """
        request = self.request
        if request.is_eager:
            return
        self.backend.mark_as_revoked(request.id, error.what, request=request, store_result=not self.ignore_result)
        signals.task_revoked.send(sender=self, request=request, terminated=False, signum=None, expired=False)
        raise Ignore from error

    # -- retries

    def _retry_if_due(self, error: Exception, began: float) -> None:
        if self.policy is None or self.policy.where == "worker":
            return  # the slot has tried for as long as the policy says
        wait = self._next_wait(self.request, error, began)
        if wait is not None:
            self._try_again(error, wait, History.of(self.request, began))

    def _next_wait(self, request: Any, error: Exception, began: float) -> float | None:
        """Return the seconds until the next attempt, or None if there is none."""
        policy = self.policy
        if policy is None or isinstance(error, _NEVER_AGAIN):
            return None
        history, wait = History.of(request, began), None
        # the limit is the slot's, and the next attempt there would have no time
        if not (policy.where == "worker" and isinstance(error, SoftTimeLimitExceeded)):
            wait = policy.next_wait(error, history.attempt, history.elapsed, history.idle)
        if wait is not None and not passed(deadline_of(request.headers), wait):
            return wait
        if policy.covers(error):
            give_up(error, "exhausted", request, history.attempt)
        return None

    def _try_again(self, error: Exception | None, wait: float, history: History) -> NoReturn:
        """Schedule the next attempt and end this one; attempts are counted in the message."""
        headers = {**kept_headers(self.request.headers or {}), **history.headers_after(error, wait)}
        told = error if error is not None else TaskError("the task asked for another attempt")
        # our own bounds instead of Celery's: what is sent after a lost connection may be a second next attempt
        options = {"retry": False} if self.app.safe and not self.request.is_eager else {}

        def publish(countdown: float) -> None:
            bound = self.app.publish_timeout
            with nullcontext() if bound is None else deadline(bound):
                self.retry(exc=told, countdown=countdown, max_retries=_UNBOUNDED, headers=headers, **options)

        due = time.time() + wait
        with suppress(AttributeError):  # an exception with slots cannot carry it
            setattr(told, NEXT_ATTEMPT, {"attempt": history.attempt, "next_at": due})
        self._show_retry(told)
        try:
            hand_over(self, wait, publish, late=bool(self.acks_late))
        except CeleryRetry as scheduled:
            with suppress(AttributeError):
                setattr(scheduled.exc, NEXT_ATTEMPT, {"attempt": history.attempt, "next_at": due})
            raise
        except PayloadError as error:
            if self.request.is_eager:
                raise  # of the next attempt, which has run
            refused = error
        # it gains headers with each attempt: what the task raised says more than that there was no room for them
        with suppress(AttributeError):
            delattr(told, NEXT_ATTEMPT)
            told.add_note(f"There is no next attempt: {refused}")
        give_up(told, "too_large", self.request, history.attempt)
        raise told

    def _show_retry(self, error: Exception) -> None:
        """Store the state RETRY before the next attempt is sent, which may end before this one has."""
        request, backend = self.request, self.backend
        ignored = self.ignore_result if request.ignore_result is None else request.ignore_result
        wanted = not ignored or self.store_errors_even_if_ignored
        if wanted and isinstance(backend, KeepsOutcomes) and not request.is_eager:
            backend.store_retry(request, error, "".join(traceback.format_exception(error)))

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any:
        """Return the message of the next attempt: Celery's, for the queue that this one came from.

        Celery takes exchange and routing key from the message. Of one that RabbitMQ has delayed they are those of the
        delay, and the next attempt would go to the default queue; of one that a pattern let in they are the pattern's,
        and it would go to every queue that has it, or to none.
        """
        request = self.request if request is None else request
        if queue is None:
            name = self._queue_of(request)
            queue = name if name in self.app.amqp.queues else None
        return super().signature_from_request(request, args, kwargs, queue, **options)

    def _queue_of(self, request: Any) -> str | None:
        """Return the queue that a request came from: as its worker knows it, else the one that its key names."""
        info: Mapping[str, Any] = request.delivery_info or {}
        taken_from: str | None = info.get(TAKEN_FROM)
        return queue_named(self.app, info.get("routing_key")) if taken_from is None else taken_from

    # -- sending through Celery's own ways: signatures, canvas, beat

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Send as Celery does, with arguments checked: Python values are encoded, JSON values are taken as they are."""
        # a retry repeats what was checked; a step of a chain may have been made by another version
        if not options.get("retries") and not is_of_another_version(self.definition, options.get("headers")):
            args, kwargs = self._checked(args or (), kwargs or {})
        return self.send_encoded(args, kwargs, *rest, **options)

    def send_encoded(self, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Send arguments that are JSON already, by Celery's own ``Task.apply_async``, which tracers wrap."""
        if not self.show_arguments:
            options.setdefault("argsrepr", f"({len(args)} hidden)")
            options.setdefault("kwargsrepr", f"{{{len(kwargs)} hidden}}")
        given, own = options.get("headers"), self.definition.headers
        options["headers"] = inherited({**own, **(given or {})})  # a new one: tracers write into it
        # a tuple, as delay() has it: that is how headers and events show it
        return CeleryTask.apply_async(self, tuple(args), kwargs, *rest, **options)

    def signature(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Return a Celery signature: it says the version of its arguments, as others may send it, and later."""
        made: Any = super().signature(args, *rest, **options)
        made.options["headers"] = {**self.definition.headers, **(made.options.get("headers") or {})}
        return made

    subtask = signature

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

# Errors that another attempt would end in too.
_NEVER_AGAIN = (ArgumentsError, PayloadError, TaskRevoked, CeleryRetry, Ignore, Reject)

# Seconds between two looks, while a task waits in its slot, at whether the worker shuts down.
_LOOK_UP = 0.5

# kombu's native delays put the bits of the delay before the key.
_DELAY = re.compile(rf"^(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")


def _leave_at_shutdown(left: float, error: Exception) -> None:
    """Let the broker keep the rest of a wait if this process's worker shuts down (a pool's children do not know)."""
    state: Any = sys.modules.get("celery.worker.state")
    if state is not None and (state.should_stop not in (None, False) or state.should_terminate not in (None, False)):
        raise AskedAgain(left, error)


def _count(request: Any, error: Exception, wait: float, began: float) -> None:
    """Note in the running request that its next attempt begins, for all who look there."""
    told = History.of(request, began).headers_after(error, wait)
    request.headers = {**(request.headers or {}), **told}
    request.retries = (request.retries or 0) + 1


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
