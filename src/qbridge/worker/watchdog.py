"""Which worker is up and does no work, and what is done about it? Its connection is broken on purpose, then it ends.

Such a worker is connected and consumes, for all that the broker knows, so nobody takes its place. Three faults are
looked for, each for as long as ``worker.watchdog`` says before it counts:

- *The loop stands still*: it has not come round to a timer that it fires twice a second. A solo worker's loop runs the
  task itself, so it does not count there while one runs.
- *Messages wait and none comes*: nothing runs here, the broker has messages in a queue that is consumed here, and
  delivers none.
- *A task waits for a slot that is free*: the pool does not begin it.

A fault is answered with a new connection where that can help. If it lasts, the worker ends with exit code 70
(``EX_SOFTWARE`` of sysexits.h) and the reason: whoever supervises it starts another, and its messages go back.
Time is counted in looks: a process that was stopped as a whole, or a machine that slept, has not stood still.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from celery.concurrency import solo
from celery.utils.log import get_logger
from celery.utils.threads import _open_broker_sockets
from celery.worker import state

from qbridge.worker.pulse import Pulse
from qbridge.worker.waiting import queues_with_messages

__all__ = ["EXIT_CODE", "Condition", "Watchdog"]

logger = get_logger(__name__)

EXIT_CODE = 70
"""With which a worker ends that cannot be helped."""
_LOOKS = 10
"""Looks at the worker while a fault comes to count."""
_LONGEST_PAUSE = 2.0
"""Seconds between two looks at most: health is told anew at each."""
_DEPTHS = 3
"""Questions to the broker while an idle worker comes to count as one that gets nothing."""
_ANSWER = 5.0
"""Seconds that the broker gets for an answer."""

Fault = Literal["loop", "delivery", "pool"]


@dataclass(frozen=True)
class Condition:
    """How a worker is.

    Args:
        live: False if only its end can help.
        ready: True if it takes messages and runs them.
        reason: why it is not ready, for people; empty if it is.
    """

    live: bool
    ready: bool
    reason: str = ""


class Watchdog:
    """Looks at one worker program from a thread of its own.

    Args:
        worker: a ``BridgeWorker`` with its consumer.
        patience: seconds until a fault counts.
        acts: False to tell only.
        tell: called with the worker's condition after each look.
    """

    def __init__(self, worker: Any, patience: float, *, acts: bool, tell: Callable[[Condition], None]) -> None:
        self._worker = worker
        self._patience = patience
        self._acts = acts
        self._tell = tell
        self._pause = min(patience / _LOOKS, _LONGEST_PAUSE)
        self._faults: tuple[_Watched, ...] = (
            _Loop(worker, patience),
            _Delivery(worker, patience),
            _Pool(worker, patience),
        )
        self._treated: dict[Fault, float] = {}
        self._gone = False

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, name="qbridge-watchdog", daemon=True).start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._gone:
            time.sleep(self._pause)
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._pause), now
            try:
                self._tell(self.look(passed))
            except Exception:
                logger.exception("The watchdog could not look at this worker")

    def look(self, passed: float) -> Condition:
        """Look once.

        Args:
            passed: seconds since the last look.
        """
        if self._worker.ending is not None and self._worker.ending.began:
            return Condition(live=not self._gone, ready=False, reason="it is ending")
        pulse = _pulse(self._worker)
        if pulse is None or not pulse.consuming:
            for fault in self._faults:
                fault.begin_anew()
            return Condition(live=True, ready=False, reason="it is not connected to its broker")
        reasons = []
        for fault in self._faults:
            reason = fault.look(pulse, passed)
            if reason:
                reasons.append(reason)
                self._treat(fault, reason, passed)
            elif fault.name in self._treated and not fault.suspected:
                del self._treated[fault.name]
                logger.warning("This worker works again")
        return Condition(live=not self._gone, ready=not reasons, reason="; ".join(reasons))

    def _treat(self, fault: _Watched, reason: str, passed: float) -> None:
        if not self._acts:
            return
        if fault.name not in self._treated:
            self._treated[fault.name] = 0.0
            if fault.reconnect():
                logger.error("This worker connects anew: %s", reason)
                return
        self._treated[fault.name] += passed
        if fault.may_end and (not fault.reconnects or self._treated[fault.name] >= self._patience / 2):
            self._end(fault, reason)

    def _end(self, fault: _Watched, reason: str) -> None:
        if self._gone:
            return
        self._gone = True
        logger.critical("This worker ends with exit code %d, for another to take its place: %s", EXIT_CODE, reason)
        if fault.name == "loop":
            with suppress(Exception):  # standard error may be anything
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        self._worker.ending.begin("watchdog", EXIT_CODE)


class _Watched:
    """One fault that is looked for."""

    name: Fault
    reconnects = True
    may_end = True

    def __init__(self, worker: Any, patience: float) -> None:
        self._worker = worker
        self._patience = patience
        self._lasted = 0.0

    @property
    def suspected(self) -> bool:
        """True while it may be there, and has not lasted long enough to say so."""
        return self._lasted > 0

    def begin_anew(self) -> None:
        """Forget what was seen."""
        self._lasted = 0.0

    def look(self, pulse: Pulse, passed: float) -> str:
        """Return the reason once it has lasted, else an empty text.

        Args:
            pulse: the worker's.
            passed: seconds since the last look.
        """
        raise NotImplementedError  # every sickness below says its own

    def reconnect(self) -> bool:
        """Break the worker's connection; False where that would not help."""
        return False


class _Loop(_Watched):
    name: Fault = "loop"

    def __init__(self, worker: Any, patience: float) -> None:
        super().__init__(worker, patience)
        self._beats = -1

    def look(self, pulse: Pulse, passed: float) -> str:
        beats, self._beats = self._beats, pulse.beats
        runs_it_here = isinstance(self._worker.pool, solo.TaskPool) and bool(state.active_requests)
        if self._worker.hub is None or beats != pulse.beats or runs_it_here:
            self._lasted = 0.0
            return ""
        self._lasted += passed
        return f"its loop has stood still for {self._lasted:.0f} s" if self._lasted >= self._patience else ""

    def reconnect(self) -> bool:
        # What it waits for may be an answer on a socket: that wait ends here, in an error.
        return _shut_down_socket(self._worker.consumer.connection)


class _Delivery(_Watched):
    name: Fault = "delivery"

    def __init__(self, worker: Any, patience: float) -> None:
        super().__init__(worker, patience)
        self._idle_for = 0.0
        self._seen = 0
        self._received = -1
        self._found: list[Any] = []

    def begin_anew(self) -> None:
        super().begin_anew()
        self._idle_for, self._seen, self._found = 0.0, 0, []

    @property
    def suspected(self) -> bool:
        return self._seen > 0

    @property
    def may_end(self) -> bool:  # type: ignore[override]
        # Behind a single active consumer the others wait, and rightly: AMQP does not tell which queue has one.
        return any(depth.consumers is None or depth.consumers <= 1 for depth in self._found)

    def look(self, pulse: Pulse, passed: float) -> str:
        received, self._received = self._received, pulse.received
        consumer = self._worker.consumer
        tags: dict[str, str] = getattr(consumer.task_consumer, "_active_tags", None) or {}
        names = sorted(tags)
        if received != pulse.received or not names or _busy(consumer):
            self.begin_anew()
            return ""
        self._idle_for += passed
        if self._idle_for >= self._patience / _DEPTHS:
            self._idle_for = 0.0
            self._found = self._ask(names)
            self._seen = self._seen + 1 if self._found and pulse.received == received else 0
        if self._seen < _DEPTHS:
            return ""
        queues = ", ".join(f"{depth.name} ({depth.waiting})" for depth in self._found)
        return f"messages wait in {queues}, nothing runs here, and none has come for {self._patience:.0f} s"

    def _ask(self, names: list[str]) -> list[Any]:
        try:
            return queues_with_messages(self._worker.app, names, timeout=_ANSWER)
        except Exception as error:  # noqa: BLE001 - a broker that does not answer is its connection's affair
            logger.debug("The watchdog could not ask the broker: %s", error)
            return []

    def reconnect(self) -> bool:
        hub = self._worker.hub
        if hub is None:
            return _shut_down_socket(self._worker.consumer.connection)
        hub.call_soon(_break)
        return True


class _Pool(_Watched):
    name: Fault = "pool"
    reconnects = False

    def __init__(self, worker: Any, patience: float) -> None:
        super().__init__(worker, patience)
        self._waiting: frozenset[Any] = frozenset()

    def begin_anew(self) -> None:
        super().begin_anew()
        self._waiting = frozenset()

    def look(self, pulse: Pulse, passed: float) -> str:
        active = frozenset(tuple(state.active_requests))
        waiting = frozenset(tuple(state.reserved_requests)) - active
        slots = getattr(self._worker.pool, "num_processes", 1) or 1
        same, self._waiting = waiting & self._waiting, waiting
        if not same or len(active) >= slots:
            self._lasted = 0.0
            return ""
        self._waiting = same  # those that were there at every look
        self._lasted += passed
        if self._lasted < self._patience:
            return ""
        return f"{len(same)} task(s) wait for a slot, and {slots - len(active)} of {slots} are free"


def _pulse(worker: Any) -> Pulse | None:
    pulse = getattr(getattr(worker, "consumer", None), "pulse", None)
    return pulse if isinstance(pulse, Pulse) else None


def _busy(consumer: Any) -> bool:
    if state.reserved_requests or state.scheduled_requests:
        return True
    return any(bucket is not None and bucket.contents for bucket in tuple(consumer.task_buckets.values()))


def _break() -> None:
    raise ConnectionResetError("qbridge's watchdog has broken the connection")


def _shut_down_socket(connection: Any) -> bool:
    """End every wait on a connection's sockets, from another thread; False if it has none."""
    found = False
    for sock in _open_broker_sockets(connection) if connection is not None else ():
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
            found = True
    return found
