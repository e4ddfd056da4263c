"""How does a worker see to it that a task does not run twice at once? By claims beside the results.

RabbitMQ delivers again what was not acknowledged on a connection that broke, while the task runs on. So a thread of
the worker claims what has run for half a second, and renews that each second; a message that comes again waits until a
run that goes on elsewhere would have been claimed, and then until nobody has the claim. Tasks that run for less cost
nothing. Redis and the embedded broker lease messages themselves, and need none of this.

The same thread learns which tasks were revoked while this worker was not there.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from celery.concurrency import prefork
from celery.utils.log import get_logger
from celery.worker import state

from qbridge.backends.claims import ANYBODY, Claim, Wanted, claim_store
from qbridge.dead_letters.letter import HEADER_UNSTORED_SINCE
from qbridge.standing import AGAIN, HEADER_ONCE, HOLDER, TOKEN, WAITED, comes_again
from qbridge.worker.resending import put_off
from qbridge.worker.running import AdoptingRequest

__all__ = ["Claims"]

logger = get_logger(__name__)

_TICK = 0.2
_YOUNG = 0.5
"""Seconds for which a run is not worth a claim."""
_FIRST_LOOK = 1.5
"""Seconds after which a run that goes on elsewhere has been claimed: its youth, two ticks, and time to spare."""
LEASE = 3.0
"""Seconds without a renewal after which a claim is anybody's: a task whose worker died starts within five."""
_RENEW = 1.0
_PATIENCE = 10.0
"""Seconds for which a store that does not answer keeps a message waiting; then it runs without a claim."""
_IN_HAND = 5.0
"""Seconds for which a message waits here; then the broker keeps it, if it can, for ``_AWAY`` seconds each time."""
_AWAY = 2.0
_LEARN = 5.0


@dataclass
class _Waiting:
    """A message that came again, and waits until nobody has its claim."""

    message: Any
    again: Callable[[Any], Any]
    due: float
    since: float = field(default_factory=time.monotonic)


class Claims:
    """What one worker claims, and what it waits for.

    Args:
        consumer: the worker's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._app: Any = consumer.app
        self._store = claim_store(self._app.backend) if self._app.safe else None
        if self._store is not None and not self._app.holder:
            self._app.holder = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._renewed: dict[str, float] = {}
        self._lost: set[str] = set()
        self._over: deque[tuple[str, str]] = deque()
        self._learnt, self._learn_at = 0, 0.0
        self._needed = False
        self._failing = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # -- in the worker's loop

    def start(self) -> None:
        """Learn what is revoked, and begin; called whenever the worker begins to consume."""
        if self._store is None or not self._consumer.connection:
            return
        # not asked for later: while there is no connection, what runs has to stay claimed
        self._needed = self._consumer.connection.transport.driver_type == "amqp"
        with self._lock:
            self._waiting.clear()  # those of a connection before this one are delivered again
        if self._thread is None or not self._thread.is_alive():
            self._try(self._learn)
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="qbridge-claims", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End; what is claimed is anybody's when its lease ends."""
        self._stopped.set()

    def holds(self, message: Any, again: Callable[[Any], Any]) -> bool:
        """Tell whether a message has to wait, because its task may run elsewhere.

        Args:
            message: as it came.
            again: called with it, in the worker's loop, when it may run.
        """
        info, headers = message.delivery_info, message.headers or {}
        # what goes around for want of its results has no run beside it, unless its broker may have delivered it twice,
        # or its key was sent twice
        sent_again = AGAIN in headers and (HEADER_ONCE in headers or HEADER_UNSTORED_SINCE not in headers)
        if TOKEN in info or not (sent_again or (self._needed and comes_again(info, headers))):
            return False
        task = self._app.tasks.get(headers.get("task"))
        if not getattr(task, "acks_late", False) or getattr(task, "definition", None) is None:
            return False
        wait = 0.0 if headers.get(AGAIN) == WAITED else _FIRST_LOOK
        with self._lock:
            self._waiting.append(_Waiting(message, again, time.monotonic() + wait))
        return True

    def let_go(self, requests: Iterable[Any]) -> None:
        """Release what runs had claimed whose processes are dead: who has their messages need not wait for the lease.

        Args:
            requests: of the runs.
        """
        if self._store is not None:
            for request in requests:
                holder = request.delivery_info.get(HOLDER)
                if holder:
                    self._over.append((str(request.id), holder))

    def _go_on(self, waiting: _Waiting, holder: str, token: int) -> None:
        """Hand a message on that has waited."""
        if self._is_there(waiting.message):
            waiting.message.delivery_info.update({HOLDER: holder, TOKEN: token})
            waiting.again(waiting.message)

    def _put_away(self, waiting: _Waiting) -> None:
        """Let the broker keep a message for a while: it has one of this worker's places."""
        message = waiting.message
        if not self._is_there(message):
            return
        try:
            if put_off(self._consumer, message, _AWAY, {**message.headers, AGAIN: WAITED}):
                message.ack_log_error(logger, self._consumer.connection_errors)
                return
        except Exception as error:  # noqa: BLE001 - it stays here, unacknowledged
            logger.warning("Cannot let the broker keep task %s: %s", message.headers.get("id"), error)
        with self._lock:
            self._waiting.append(waiting)

    def _is_there(self, message: Any) -> bool:
        return getattr(message.channel, "connection", None) is not None

    def _end(self, request: Any) -> None:
        """End a run that was taken over, where the pool can."""
        if isinstance(self._consumer.pool, prefork.TaskPool) and request in state.active_requests:
            request.cancel(self._consumer.pool, emit_retry=False)
            if self._is_there(request.message):
                request.acknowledge()

    # -- in the thread

    def _run(self) -> None:
        while not self._stopped.wait(_TICK):
            now = time.monotonic()
            if now >= self._learn_at:
                self._try(self._learn)
            self._try(self._claim_running)
            for waiting in self._due(now):
                self._look(waiting)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever a server and a driver do: the next tick tries again
            if not self._failing:
                logger.warning("Cannot keep claims beside the results (%s: %s)", type(error).__name__, error)
            self._failing = True
        else:
            self._failing = False

    def _learn(self) -> None:
        self._learn_at = time.monotonic() + _LEARN
        assert self._store is not None
        ids, self._learnt = self._store.revoked_since(self._learnt)
        self._consumer.revocations.learn(ids)
        for task_id in ids:
            state.revoked.add(task_id)  # for plain tasks, and `inspect revoked`; it is not large

    def _release(self) -> None:
        assert self._store is not None
        while self._over:
            key, holder = self._over.popleft()  # once: a lease that ends by itself is no harm
            self._store.release("run", key, holder)

    def _claim_running(self) -> None:
        assert self._store is not None
        self._release()
        now = time.time()
        running = {}
        for request in _snapshot():
            began = request.time_start
            if not began or request.acknowledged or now - began < _YOUNG or not isinstance(request, AdoptingRequest):
                continue
            holder = request.delivery_info.get(HOLDER)
            if not (self._needed or HEADER_ONCE in request.message.headers):
                continue  # the lease on the message is the claim
            if holder and request.task.acks_late and str(request.id) not in self._lost:
                running[str(request.id)] = (request, holder, now - began)
        tick = time.monotonic()
        wanted = [
            Wanted(key, holder, LEASE, running=ran, over=ANYBODY)
            for key, (_, holder, ran) in running.items()
            if tick - self._renewed.get(key, -LEASE) >= _RENEW - _TICK / 2
        ]
        claims = self._store.take("run", wanted) if wanted else []
        for one, claim in zip(wanted, claims, strict=True):
            self._renewed[one.key] = tick
            if claim.holder != one.holder:
                self._lost.add(one.key)
                logger.warning("Task %s was taken over by another worker while it ran here", one.key)
                self._consumer.call_soon(self._end, running[one.key][0])
        self._renewed = {key: when for key, when in self._renewed.items() if key in running}
        self._lost &= {str(request.id) for request in _snapshot()}

    def _due(self, now: float) -> list[_Waiting]:
        with self._lock:
            due = [waiting for waiting in self._waiting if waiting.due <= now]
            self._waiting = [waiting for waiting in self._waiting if waiting.due > now]
        return [waiting for waiting in due if self._is_there(waiting.message)]

    def _look(self, waiting: _Waiting) -> None:
        assert self._store is not None
        key, holder = str(waiting.message.headers.get("id")), f"{self._app.holder}/{uuid.uuid4().hex[:8]}"
        waited = time.monotonic() - waiting.since
        try:
            (claim,) = self._store.take("run", [Wanted(key, holder, LEASE)])
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: nobody waits for ever
            if waited > _PATIENCE:
                logger.warning("Task %s came again and runs without a claim: %s", key, error)
                self._consumer.call_soon(self._go_on, waiting, holder, 0)
            else:
                self._wait(waiting, _RENEW)
            return
        if claim.holder == holder:
            self._consumer.call_soon(self._go_on, waiting, holder, claim.token)
            return
        self._wait_for(claim, waiting, waited)

    def _wait_for(self, claim: Claim, waiting: _Waiting, waited: float) -> None:
        key = waiting.message.headers.get("id")
        logger.info("Task %s came again while it runs elsewhere: it waits", key)
        waiting.due = time.monotonic() + min(max(claim.left, 0.0) + 0.05, _RENEW)
        if waited > _IN_HAND or waiting.message.headers.get(AGAIN) == WAITED:
            self._consumer.call_soon(self._put_away, waiting)
        else:
            self._wait(waiting, min(max(claim.left, 0.0) + 0.05, _RENEW))

    def _wait(self, waiting: _Waiting, seconds: float) -> None:
        waiting.due = time.monotonic() + seconds
        with self._lock:
            self._waiting.append(waiting)


def _snapshot() -> tuple[Any, ...]:
    while True:
        try:
            return tuple(state.active_requests)
        except RuntimeError:  # the loop has changed it meanwhile
            continue
