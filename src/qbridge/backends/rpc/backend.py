"""How do results travel back over the broker: Celery's rpc backend, with one receiver per process for all threads."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import celery.exceptions
from celery import states
from celery._state import get_current_worker_task, task_join_will_block
from celery.backends.rpc import RPCBackend as CeleryRPCBackend
from kombu import serialization
from kombu.exceptions import OperationalError

from qbridge.backends.deadline import deadline
from qbridge.backends.forking import begin_anew_after_fork
from qbridge.backends.rpc.inbox import LIMIT, Reply, ReplyInbox
from qbridge.backends.rpc.receiver import ReplyReceiver
from qbridge.backends.storing import KeepsOutcomes
from qbridge.backends.watching import Outcome
from qbridge.serialization.results import TypedResultMixin, has_types

__all__ = ["RPCBackend"]

loads: Callable[..., Any] = cast("Callable[..., Any]", serialization.loads)  # kombu leaves it without types

logger: logging.Logger = logging.getLogger(__name__)

_PATIENCE = 3  # times the app's publish timeout


class _Replies:
    """What one process keeps for one app: the inbox and who fills it."""

    def __init__(self, backend: RPCBackend) -> None:
        app = backend.app
        options = app.conf.result_backend_transport_options or {}
        self.inbox = ReplyInbox(backend.expires, int(options.get("max_kept_results", LIMIT)))
        self.receiver = ReplyReceiver(app, backend.reply_queue, backend.take_delivery, self.inbox.expire)
        self._shelf = app.__dict__
        begin_anew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the parent's connection alone; keeping the object keeps it open."""
        inherited = self._shelf.pop("_qbridge_replies", None)
        self._shelf.setdefault("_qbridge_inherited_replies", []).append(inherited)


class RPCBackend(KeepsOutcomes, TypedResultMixin, CeleryRPCBackend):
    """Celery's rpc results: the wire is the same; on this side any thread can wait for any result, by any API.

    Replies go to one durable queue per process, which outlives a broken connection and a restart of the broker, and
    expires with the results. ``result_backend_transport_options`` may hold ``max_kept_results``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thread_safe = True
        # One at a time: the promises of a group count without locks.
        self._fulfilling = threading.RLock()
        self._listening: dict[int, tuple[Any, Callable[[str, Reply], None]]] = {}

    # -- this process's replies

    @property
    def _replies(self) -> _Replies:
        # Kept by the app: two backends on one queue would each get half of the replies.
        shelf = self.app.__dict__
        replies = shelf.get("_qbridge_replies")
        if replies is None:
            replies = shelf.setdefault("_qbridge_replies", _Replies(self))
        return cast("_Replies", replies)

    @property
    def oid(self) -> str:
        """The address of replies: Celery's own caches it across forks."""
        return str(self.app.thread_oid)

    @property
    def binding(self) -> Any:
        """The reply queue of this process."""
        return self.reply_queue(self.oid)

    def reply_queue(self, address: str) -> Any:
        """The queue of a reply address."""
        # Not auto_delete, as Celery has it: that loses all replies with the connection.
        return self.Queue(
            address, self.exchange, address, durable=True, auto_delete=False, expires=self.expires or 86400
        )

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        """Get ready for the reply, before the task is sent.

        Raises:
            kombu.exceptions.OperationalError: if the reply queue cannot be declared.
        """
        if task_join_will_block() and get_current_worker_task() is not None:
            return None  # inside a task, where results are not waited for
        replies = self._replies
        replies.receiver.receive_for(self.oid)
        replies.inbox.expect(task_id)
        return None

    def expect(self, task_id: str) -> None:
        """A task that another process will send answers to this one, such as the last of a chain."""
        self._replies.receiver.receive_for(self.oid)
        self._replies.inbox.expect(task_id)

    def take_delivery(self, message: Any) -> None:
        """Keep a message from the reply queue; in the receiving thread."""
        try:
            meta = self._decode_message(message.body, message.content_type, message.content_encoding)
            task_id, status = str(meta["task_id"]), meta["status"]
            ready = not isinstance(status, str) or status in states.READY_STATES  # what is none will not change
        except Exception as exc:  # noqa: BLE001
            # Whatever is wrong with it, it is wrong for good, and the next one waits behind it.
            found = (message.properties or {}).get("correlation_id")
            logger.error("A reply could not be read (%s), task %s.", type(exc).__name__, found)  # noqa: TRY400
            if not found:
                return
            task_id, ready = str(found), True
        reply = Reply(message.body, message.content_type, message.content_encoding, ready, time.monotonic())
        self._replies.inbox.put(task_id, reply)

    def _decode_message(self, body: Any, content_type: str | None, content_encoding: str | None) -> dict[str, Any]:
        if content_type == self.content_type:
            return cast("dict[str, Any]", self.decode(body))
        return cast("dict[str, Any]", loads(body, content_type, content_encoding, accept=self.accept))

    def _meta(self, reply: Reply) -> dict[str, Any]:
        meta = self._decode_message(reply.body, reply.content_type, reply.content_encoding)
        return self.meta_from_decoded(self.open_meta(meta, has_types(reply.body)))

    def _meta_or_failure(self, reply: Reply, task_id: str) -> dict[str, Any]:
        # Raised where replies arrive, it would cost all who wait there their connection.
        return self.meta_or_failure(task_id, partial(self._meta, reply))

    # -- for the result hub

    @property
    def result_inbox(self) -> RPCBackend:
        """What the result hub asks."""
        return self

    def knows(self, task_id: str) -> bool:
        """Whether the task was sent from this process, or has answered to it."""
        return self._replies.inbox.knows(task_id)

    def watch(self, task_id: str, callback: Callable[[str], None]) -> None:
        """Call back with the id once the result is there."""
        heard = _Ready(callback)
        reply = self._replies.inbox.listen(task_id, heard)
        if reply is not None:
            heard(task_id, reply)

    def unwatch(self, task_id: str, callback: Callable[[str], None]) -> None:
        """Do not."""
        self._replies.inbox.unlisten(task_id, _Ready(callback))

    def outcome(self, task_id: str, *, take: bool) -> Outcome:
        """The present meta, the exception that reading it raised, or None."""
        reply = self._replies.inbox.find(task_id, take=take)
        if reply is None:
            return None
        try:
            return self._meta(reply)
        except Exception as exc:  # noqa: BLE001
            return exc  # the reader's to deal with

    def forgotten(self, task_id: str) -> bool:
        """Whether the result was here and is no longer."""
        return self._replies.inbox.gone(task_id)

    def trouble(self) -> str | None:
        """Why no reply can arrive now, or None."""
        return self._replies.receiver.trouble

    def close(self) -> None:
        """Stop receiving and delete the reply queue; sending tasks with results raises from now on."""
        replies = self.app.__dict__.get("_qbridge_replies")
        if replies is not None:
            replies.receiver.close()

    # -- Celery's own API

    def get_task_meta(self, task_id: str, *_: Any, **__: Any) -> dict[str, Any]:
        """The present meta; PENDING if nothing has come."""
        self._ensure_not_eager()
        reply = self._replies.inbox.find(task_id)
        return {"status": states.PENDING, "result": None} if reply is None else self._meta(reply)

    poll = get_task_meta

    def is_cached(self, task_id: str) -> bool:
        """Whether a state of the task is here."""
        return self._replies.inbox.find(task_id) is not None

    def forget(self, task_id: str) -> None:
        """Drop the result, also if it comes later."""
        self._cache.pop(task_id, None)
        self._replies.inbox.forget(task_id)

    def reload_task_result(self, task_id: str) -> None:
        """Do nothing: what is here is all there is."""

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Fulfil the result object when its reply comes, for ``result.then``."""
        if getattr(result, "_cache", None) is not None or id(result) in self._listening:
            return result

        def heard(_: str, reply: Reply) -> None:
            if reply.ready:
                self._fulfil(result, self._meta_or_failure(reply, result.id))

        with self._fulfilling:
            self._listening[id(result)] = (result, heard)
        reply = self._replies.inbox.listen(result.id, heard)
        if reply is not None:
            heard(result.id, reply)
        return result

    def add_pending_results(self, results: Iterable[Any], weak: bool = False) -> list[Any]:
        """The same for several."""
        return [self.add_pending_result(result, weak=weak) for result in results]

    def remove_pending_result(self, result: Any) -> Any:
        """Do not."""
        found = self._listening.pop(id(result), None)
        if found is not None:
            self._replies.inbox.unlisten(result.id, found[1])
        return result

    def _fulfil(self, result: Any, meta: dict[str, Any]) -> None:
        with self._fulfilling:
            self.remove_pending_result(result)
            if result._cache is None:
                result._maybe_set_cache(meta)

    def wait_for_pending(self, result: Any, callback: Any = None, propagate: bool = True, **kwargs: Any) -> Any:
        """Wait for one result; what ``AsyncResult.get`` calls."""
        self._ensure_not_eager()
        for _ in self._arrivals([result], **kwargs):
            pass
        return result.maybe_throw(callback=callback, propagate=propagate)

    def iter_native(self, result: Any, no_ack: bool = True, **kwargs: Any) -> Any:
        """Yield ``(id, meta)`` of a group's members as they become ready."""
        self._ensure_not_eager()
        single = []
        for node in result.results:
            if hasattr(node, "_cache"):
                single.append(node)
            else:
                yield node.id, node.children  # a group in the group: the caller waits for its members
        for node in self._arrivals(single, **kwargs):
            yield node.id, node._cache

    def _arrivals(
        self,
        results: list[Any],
        timeout: float | None = None,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[dict[str, Any]], Any] | None = None,
        **_: Any,
    ) -> Iterator[Any]:
        waiting: dict[str, list[Any]] = {}
        for result in results:
            if result._cache is None:
                waiting.setdefault(result.id, []).append(result)
            else:
                yield result
        inbox = self._replies.inbox
        try:
            for task_id, reply in inbox.states(waiting, timeout, on_interval):
                if on_message is not None:
                    on_message(self._meta_or_failure(reply, task_id))
                if reply.ready and task_id in waiting:
                    inbox.find(task_id, take=True)
                    for result in waiting.pop(task_id):
                        self._fulfil(result, self._meta_or_failure(reply, task_id))
                        yield result
        except TimeoutError:
            for result in itertools.chain.from_iterable(waiting.values()):
                promise = result.on_ready
                if promise._svpending is None and not promise._lvpending:
                    self.remove_pending_result(result)  # nobody else is to be told
            raise celery.exceptions.TimeoutError("The operation timed out.") from None

    def _after_fork(self) -> None:
        self._fulfilling = threading.RLock()
        self._listening.clear()
        super()._after_fork()

    # -- in the worker

    def _store_now(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Send a state to who sent the task; confirmed where the app confirms, bounded by its publish timeout."""
        routing_key, correlation_id = self.destination_for(task_id, request)
        if not routing_key:
            return result
        body = self._reply(task_id, state, result, traceback, request)
        publish = partial(self._publish, body, routing_key, correlation_id)
        bound = getattr(self.app, "publish_timeout", None)
        if bound is None:
            publish(retry=True)
        else:
            self._insist(publish, bound, task_id)
        return result

    def _reply(self, task_id: str, state: str, result: Any, traceback: Any, request: Any) -> dict[str, Any]:
        if self.lock is None:
            reply: dict[str, Any] = self._to_result(task_id, state, result, traceback, request)
            return reply
        value, traceback = self.locked(task_id, state, self.encode_result(result, state), traceback, request)
        reply = self._get_result_meta(result=value, state=state, traceback=traceback, request=request)
        return {**reply, "task_id": task_id, "children": None}

    def _insist(self, publish: Callable[..., None], bound: float, task_id: str) -> None:
        # More patient than a sender: the task is done, and its result is lost with the message.
        end = time.monotonic() + _PATIENCE * bound
        pause = 0.05
        while True:
            try:
                with deadline(bound):
                    return publish(retry=False)
            except Exception as exc:
                if getattr(exc, "unroutable", False):
                    logger.info("Nobody waits for the result of task %s: its reply queue is gone.", task_id)
                    return None
                if time.monotonic() + pause > end or not isinstance(exc, self._broker_errors()):
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _broker_errors(self) -> tuple[type[BaseException], ...]:
        transport = self.app.connection_for_write().transport
        return (OperationalError, OSError, *transport.connection_errors, *transport.channel_errors)

    def _publish(self, body: dict[str, Any], routing_key: str, correlation_id: str, *, retry: bool) -> None:
        amqp = self.app.amqp
        with amqp.producer_pool.acquire(block=True) as producer:
            producer.publish(
                body,
                exchange=self.exchange,
                routing_key=routing_key,
                correlation_id=correlation_id,
                serializer=self.serializer,
                retry=retry,
                retry_policy=self.retry_policy,
                delivery_mode=self.delivery_mode,
                confirm_timeout=getattr(amqp, "confirm_timeout", None),
            )


class _Ready:
    """Passes on that a task has ended; equal to another one with the same callback."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[str], None]) -> None:
        self._callback = callback

    def __call__(self, task_id: str, reply: Reply) -> None:
        if reply.ready:
            self._callback(task_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ready) and self._callback == other._callback

    def __hash__(self) -> int:
        return hash(self._callback)
