"""Who answers all callers of one bridge that wait for results: one thread, or none where results come by themselves.

Callers leave a *ticket* and sleep, in a thread or on an event loop. The hub's daemon thread is the only one that
speaks to the result backend; a server that hangs, hangs it and nobody else: each caller leaves when its time is up.
The thread begins with the first ticket and ends when there has been none for a while.
"""

# long because: tickets, thread and drivers share one lock and one set of waiters; apart they were harder to follow.

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from celery.backends.base import DisabledBackend
from celery.exceptions import ImproperlyConfigured

from qbridge.backends.forking import begin_anew_after_fork
from qbridge.backends.watching import Alarm, Inbox, PollingWatcher, Watcher, is_ready
from qbridge.exceptions import (
    ConfigurationError,
    PayloadError,
    QBridgeError,
    ResultsUnavailable,
    ResultTimeout,
    ResultUnknown,
)
from qbridge.result_hub.tickets import NOTHING, AsyncTicket, SyncTicket, Ticket

__all__ = ["ResultHub"]

_GRACE = 0.8  # seconds in which a first look is awaited, though a caller's timeout is shorter
_IDLE = 5.0  # seconds without tickets after which the thread ends
_SLOW = 0.5  # seconds without an answer after which a server counts as not answering
_FORGOTTEN = 10_000  # ids
_CLOSED = ("the bridge is closed", "Make a new one to read results.")


class ResultHub:
    """Waits for results, for any number of callers.

    Args:
        app: the Celery app whose backend keeps the results; it is looked up when needed, so it may be changed.
        poll_min: seconds between the first questions to a backend that has to be polled.
        poll_max: seconds between the later ones.
        look_timeout: seconds that one look may take.
    """

    def __init__(
        self, app: Any, *, poll_min: float = 0.001, poll_max: float = 0.015, look_timeout: float = 5.0
    ) -> None:
        self._app = app
        self._look_timeout = look_timeout
        self._poll = (poll_min, poll_max)
        self._forgotten: OrderedDict[str, None] = OrderedDict()
        self._closed = False
        self.after_fork()
        begin_anew_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew: in a forked child the other threads do not exist, and their locks may be held."""
        self._lock = threading.RLock()
        self._waiting: dict[str, list[Ticket]] = {}
        self._orders: list[Ticket] = []
        self._new: dict[str, None] = {}
        self._gone: dict[str, None] = {}
        self._thread: threading.Thread | None = None
        self._alarm: Alarm | None = None
        self._watcher: Watcher | None = None
        self._backend: Any = None
        self._trouble: str | None = None
        self._busy_since: float | None = None

    # -- for callers

    def wait(self, task_id: str, timeout: float) -> dict[str, Any]:
        """Wait until a task has ended.

        Args:
            task_id: id of the task.
            timeout: seconds; 0 looks once.

        Returns:
            The meta of the ended task.

        Raises:
            ResultTimeout: if it has not ended in time.
            ResultsUnavailable: if the result backend cannot be reached, or cannot answer from here.
            ResultUnknown: if the result was forgotten, or dropped.
            PayloadError: if what is stored cannot be read.
        """
        ticket = SyncTicket(task_id, "wait")
        self._enter(ticket)
        try:
            outcome = ticket.wait(timeout)
            if outcome is NOTHING and timeout < _GRACE and self._hurry(ticket):
                outcome = ticket.wait(_GRACE - max(timeout, 0.0))
        finally:
            self._leave(ticket)
        return self._ended(outcome, task_id, timeout)

    async def wait_async(self, task_id: str, timeout: float) -> dict[str, Any]:
        """Do the same without blocking the event loop; may be cancelled at any time."""
        ticket = AsyncTicket(task_id, "wait")
        self._enter(ticket)
        try:
            outcome = await ticket.wait(timeout)
            if outcome is NOTHING and timeout < _GRACE and self._hurry(ticket):
                outcome = await ticket.wait(_GRACE - max(timeout, 0.0))
        finally:
            self._leave(ticket)
        return self._ended(outcome, task_id, timeout)

    def look(self, task_id: str) -> dict[str, Any]:
        """Read the present meta, in whatever state, once.

        Args:
            task_id: id of the task.

        Returns:
            The meta; ``{"status": "PENDING", …}`` if nothing is stored.

        Raises:
            ResultsUnavailable: if the result backend does not answer within ``look_timeout``, or cannot from here.
            ResultUnknown: if the result was forgotten, or dropped.
            PayloadError: if what is stored cannot be read.
        """
        return self._looked(self._ask(task_id, "look"), task_id)

    async def look_async(self, task_id: str) -> dict[str, Any]:
        """Do the same without blocking the event loop."""
        return self._looked(await self._ask_async(task_id, "look"), task_id)

    def forget(self, task_id: str) -> None:
        """Delete what is stored; asking for it again raises ``ResultUnknown``.

        Args:
            task_id: id of the task.

        Raises:
            ResultsUnavailable: if the result backend does not answer within ``look_timeout``.
        """
        self._deleted(self._ask(task_id, "forget"), task_id)

    async def forget_async(self, task_id: str) -> None:
        """Do the same without blocking the event loop."""
        self._deleted(await self._ask_async(task_id, "forget"), task_id)

    def clear(self, task_id: str) -> None:
        """Delete what is stored of a task that is to run again; whoever asks for it waits for that.

        Args:
            task_id: id of the task.

        Raises:
            ResultsUnavailable: if the result backend does not answer within ``look_timeout``.
        """
        self._deleted(self._ask(task_id, "clear"), task_id)

    def restore(self, task_id: str, meta: Mapping[str, Any]) -> None:
        """Store what was cleared, unless something is stored by now.

        Args:
            task_id: id of the task.
            meta: as ``look`` returned it.

        Raises:
            ResultsUnavailable: if the result backend does not answer within ``look_timeout``.
        """
        self._deleted(self._ask(task_id, "restore", meta), task_id)

    def close(self) -> None:
        """End all waits with ``ResultsUnavailable`` and close the backend's connections; final."""
        with self._lock:
            self._closed = True
            tickets = [ticket for each in self._waiting.values() for ticket in each] + self._orders
            self._waiting.clear()
            self._orders.clear()
            thread, alarm = self._thread, self._alarm
            if alarm is not None:
                alarm.ring()
        for ticket in tickets:
            ticket.answer(ResultsUnavailable(*_CLOSED))
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)
        # A backend that was never made has nothing to close.
        with suppress(Exception):
            close = getattr(getattr(self._app, "_backend", None), "close", None)
            if close is not None:
                close()

    # -- tickets

    def _inbox(self) -> Inbox | None:
        # Not made here: that imports and reads settings, which is the thread's work.
        return getattr(getattr(self._app, "_backend", None), "result_inbox", None)

    def _enter(self, ticket: Ticket) -> None:
        if self._closed:
            raise ResultsUnavailable(*_CLOSED)
        if ticket.task_id in self._forgotten:
            self._refuse_forgotten(ticket.task_id)
        inbox = self._inbox()
        if inbox is not None:
            self._answer_from(inbox, ticket)
            return
        with self._lock:
            if self._closed:
                raise ResultsUnavailable(*_CLOSED)
            if ticket.order == "wait":
                self._waiting.setdefault(ticket.task_id, []).append(ticket)
                self._new[ticket.task_id] = None
                self._gone.pop(ticket.task_id, None)
            else:
                self._orders.append(ticket)
            if self._thread is None:
                self._alarm = Alarm()
                self._thread = threading.Thread(
                    target=self._run, args=(self._alarm,), name="qbridge-results", daemon=True
                )
                self._thread.start()
            elif self._alarm is not None:
                self._alarm.ring()

    def _leave(self, ticket: Ticket) -> None:
        task_id = ticket.task_id
        with self._lock:
            ticket.left = True
            if ticket in self._orders:
                self._orders.remove(ticket)
            tickets = self._waiting.get(task_id)
            if tickets is None or ticket not in tickets:
                return
            tickets.remove(ticket)
            if tickets:
                return
            del self._waiting[task_id]
            if self._new.pop(task_id, NOTHING) is NOTHING:
                self._gone[task_id] = None
        inbox = self._inbox()
        if inbox is not None:
            inbox.unwatch(task_id, self._arrived)

    def _hurry(self, ticket: Ticket) -> bool:
        """Time is up; whether the backend was not asked yet, so that a ready result may still be found."""
        with self._lock:
            ticket.hurried = not ticket.looked
            return ticket.hurried

    def _ask(self, task_id: str, order: str, meta: Mapping[str, Any] | None = None) -> Any:
        ticket = SyncTicket(task_id, order)
        ticket.meta = meta or {}
        self._enter(ticket)
        try:
            return ticket.wait(self._look_timeout)
        finally:
            self._leave(ticket)

    async def _ask_async(self, task_id: str, order: str) -> Any:
        ticket = AsyncTicket(task_id, order)
        self._enter(ticket)
        try:
            return await ticket.wait(self._look_timeout)
        finally:
            self._leave(ticket)

    # -- outcomes

    def _ended(self, outcome: Any, task_id: str, timeout: float) -> dict[str, Any]:
        if outcome is NOTHING:
            reason = self._reason()
            if reason is not None:
                raise ResultsUnavailable(
                    f"No result of task {task_id} after {timeout:g} s: {reason}",
                    "The task may have ended all the same. Ask again once the result backend answers.",
                )
            raise ResultTimeout(
                f"No result of task {task_id} after {timeout:g} s",
                "It may still be queued or running: wait longer, or see whether a worker consumes its queue.",
                task_id,
            )
        return self._read(outcome, task_id)

    def _looked(self, outcome: Any, task_id: str) -> dict[str, Any]:
        if outcome is NOTHING:
            reason = self._reason() or f"no answer from the result backend within {self._look_timeout:g} s"
            raise ResultsUnavailable(f"The state of task {task_id} cannot be read: {reason}", "Ask again later.")
        if outcome is None:
            return {"task_id": task_id, "status": "PENDING", "result": None, "result_json": None}
        return self._read(outcome, task_id)

    def _deleted(self, outcome: Any, task_id: str) -> None:
        if outcome is NOTHING:
            reason = self._reason() or f"no answer from the result backend within {self._look_timeout:g} s"
            raise ResultsUnavailable(f"The result of task {task_id} was not deleted: {reason}", "Ask again later.")
        if outcome is not None:
            self._read(outcome, task_id)

    def _read(self, outcome: Any, task_id: str) -> dict[str, Any]:
        if not isinstance(outcome, BaseException):
            if outcome.get("task_id", task_id) != task_id:
                raise PayloadError(f"The result of task {task_id} is that of another task, put in its place")
            return dict(outcome)
        if isinstance(outcome, QBridgeError):
            # One object may answer several callers; each raises its own.
            raise type(outcome)(*outcome.args) from outcome.__cause__
        raise PayloadError(
            f"The stored result of task {task_id} cannot be read ({type(outcome).__name__})",
            "It was written by another program, or with another result_serializer.",
        ) from outcome

    def _reason(self) -> str | None:
        inbox = self._inbox()
        if inbox is not None:
            return inbox.trouble()
        since = [moment for moment in (self._busy_since, getattr(self._watcher, "owing_since", None)) if moment]
        waited = time.monotonic() - min(since) if since else 0.0
        if waited > _SLOW:
            return self._trouble or f"the result backend has not answered for {waited:.1f} s"
        return self._trouble

    def _refuse_forgotten(self, task_id: str) -> NoReturn:
        raise ResultUnknown(f"The result of task {task_id} was forgotten", "Send the task again.", task_id)

    def _remember_forgotten(self, task_id: str) -> None:
        with self._lock:
            self._forgotten[task_id] = None
            while len(self._forgotten) > _FORGOTTEN:
                self._forgotten.popitem(last=False)
            tickets = self._waiting.pop(task_id, [])
            self._new.pop(task_id, None)
            self._gone[task_id] = None
        for ticket in tickets:
            ticket.answer(ResultUnknown(f"The result of task {task_id} was forgotten", "Send it again.", task_id))

    def _resolve(self, outcomes: Mapping[str, Any]) -> None:
        answers: list[tuple[Ticket, Any]] = []
        with self._lock:
            for task_id, outcome in outcomes.items():
                if outcome is not None:
                    answers.extend((ticket, outcome) for ticket in self._waiting.pop(task_id, ()))
                    self._new.pop(task_id, None)
                    continue
                for ticket in self._waiting.get(task_id, ()):
                    ticket.looked = True
                    if ticket.hurried:
                        answers.append((ticket, NOTHING))
        for ticket, outcome in answers:
            ticket.answer(outcome)

    # -- results that come by themselves

    def _answer_from(self, inbox: Inbox, ticket: Ticket) -> None:
        task_id = ticket.task_id
        if ticket.order in ("forget", "clear"):
            self._app.backend.forget(task_id)
            if ticket.order == "forget":
                self._remember_forgotten(task_id)
            ticket.answer(None)
            return
        if inbox.forgotten(task_id):
            raise ResultUnknown(
                f"The result of task {task_id} is no longer here: it was read, forgotten, or dropped to make room",
                "rpc results are kept by the sending process only, and not for ever; Redis and databases keep them.",
                task_id,
            )
        if not inbox.knows(task_id):
            raise ResultsUnavailable(
                f"The result of task {task_id} cannot be read in this process: rpc results come back to the process "
                "that sent the task, and this one did not",
                "Use results that any process can read: redis://… or a database (db+postgresql://…, db+sqlite:///…).",
            )
        if ticket.order == "look":
            ticket.answer(inbox.outcome(task_id, take=False))
            return
        ticket.looked = True
        with self._lock:
            first = task_id not in self._waiting
            self._waiting.setdefault(task_id, []).append(ticket)
        if first:
            inbox.watch(task_id, self._arrived)
        elif (outcome := inbox.outcome(task_id, take=False)) is not None and is_ready(outcome):
            self._arrived(task_id)

    def _arrived(self, task_id: str) -> None:
        inbox = self._inbox()
        outcome = None if inbox is None else inbox.outcome(task_id, take=True)
        if inbox is not None:
            inbox.unwatch(task_id, self._arrived)
        self._resolve({task_id: NOTHING if outcome is None else outcome})

    # -- the thread

    def _run(self, alarm: Alarm) -> None:
        idle_since = time.monotonic()
        pause = 0.05
        try:
            while True:
                with self._lock:
                    orders, self._orders = self._orders, []
                    new, self._new = self._new, {}
                    gone, self._gone = self._gone, {}
                    if self._waiting or orders:
                        idle_since = time.monotonic()
                    elif self._closed or time.monotonic() - idle_since > _IDLE:
                        self._thread = self._alarm = None
                        return
                try:
                    if not self._turn(alarm, orders, new, gone):
                        return
                except Exception as exc:  # noqa: BLE001
                    # Whatever the driver raises: the thread lives as long as somebody waits.
                    self._failed(exc, orders)
                    alarm.wait(pause)
                    alarm.hush()
                    pause = min(pause * 2, 1.0)
                else:
                    pause = 0.05
        finally:
            self._drop_watcher()
            alarm.close()

    def _turn(self, alarm: Alarm, orders: list[Ticket], new: Iterable[str], gone: Iterable[str]) -> bool:
        """Do what is to be done and wait a while; False if there is nothing to do for a thread any more."""
        self._busy_since = time.monotonic()
        watcher = self._find_watcher(alarm)
        if watcher is None:
            self._hand_over(orders)
            return False
        watcher.drop(gone)
        watcher.add(new)
        self._do(watcher, orders)
        self._busy_since = None
        self._resolve(watcher.step(_IDLE / 2))
        if watcher.owing_since is None:
            self._trouble = None
        return True

    def _find_watcher(self, alarm: Alarm) -> Watcher | None:
        backend = self._app.backend
        if backend is self._backend and self._watcher is not None:
            return self._watcher
        self._drop_watcher()
        if isinstance(backend, DisabledBackend):
            raise ConfigurationError("no result backend is configured", "Set results, such as results='redis://…'.")
        if hasattr(backend, "result_inbox"):
            return None
        maker = getattr(backend, "result_watcher", None)
        watcher: Watcher = PollingWatcher(backend, alarm, *self._poll) if maker is None else maker(alarm)
        with self._lock:
            watcher.add(self._waiting)
            self._backend, self._watcher = backend, watcher
        return watcher

    def _hand_over(self, orders: list[Ticket]) -> None:
        """The backend turned out to be one whose results come by themselves."""
        inbox = self._app.backend.result_inbox
        with self._lock:
            # Whoever enters from now on finds the inbox by himself.
            self._thread = self._alarm = self._busy_since = self._trouble = None
            tickets = orders + self._orders + [ticket for each in self._waiting.values() for ticket in each]
            self._orders, self._waiting, self._new = [], {}, {}
        for ticket in tickets:
            try:
                self._answer_from(inbox, ticket)
            except QBridgeError as exc:
                ticket.answer(exc)

    def _do(self, watcher: Watcher, orders: list[Ticket]) -> None:
        looks = [ticket for ticket in orders if ticket.order == "look"]
        if looks:
            found = watcher.look({ticket.task_id for ticket in looks})
            for ticket in looks:
                ticket.answer(found.get(ticket.task_id))
        for ticket in orders:
            if ticket.left and ticket.order == "clear":
                continue  # the task may have run again since, and its outcome is not what was meant
            if ticket.order in ("forget", "clear"):
                with suppress(FileNotFoundError):  # Celery's file backend, if nothing was stored
                    self._backend.forget(ticket.task_id)
                if ticket.order == "forget":
                    self._remember_forgotten(ticket.task_id)
                ticket.answer(None)
            elif ticket.order == "restore":
                if watcher.look([ticket.task_id]).get(ticket.task_id) is None:
                    meta = ticket.meta
                    stored = meta.get("result_json") or meta["result"]  # as it was, sooner than made anew of the error
                    self._backend.store_result(ticket.task_id, stored, meta["status"], traceback=meta.get("traceback"))
                ticket.answer(None)

    def _failed(self, exc: Exception, orders: list[Ticket]) -> None:
        self._busy_since = None
        self._trouble = _one_line(exc)
        final = isinstance(exc, QBridgeError) or not _may_pass(exc)
        error: QBridgeError
        if isinstance(exc, ConfigurationError):
            error = ResultsUnavailable(f"Results cannot be read: {exc.what}", exc.todo)
        elif isinstance(exc, QBridgeError):
            error = exc
        else:
            error = ResultsUnavailable(f"Results cannot be read: {self._trouble}", "See whether the server is well.")
        error.__cause__ = exc
        for ticket in orders:
            ticket.answer(error)
        if final:
            with self._lock:
                waiting = list(self._waiting)
            self._resolve(dict.fromkeys(waiting, error))
        if self._watcher is not None:
            with suppress(Exception):
                self._watcher.reset()

    def _drop_watcher(self) -> None:
        watcher, self._watcher, self._backend = self._watcher, None, None
        if watcher is not None:
            with suppress(Exception):
                watcher.close()


def _may_pass(exc: Exception) -> bool:
    # A missing driver, an unknown setting, a wrong URL stay as they are.
    return not isinstance(exc, (ImportError, AttributeError, TypeError, NameError, KeyError, ImproperlyConfigured))


def _one_line(exc: Exception) -> str:
    # SQLAlchemy appends the statement and a link; the driver's own words come first.
    cause = getattr(exc, "orig", None) or exc
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0][:300]}" if text else type(cause).__name__
