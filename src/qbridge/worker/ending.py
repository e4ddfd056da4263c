"""How does a worker end within the seconds that it is given? Running tasks go on, the others' messages go back at once.

Celery has two ways, and neither fits a platform that kills after a grace period. Its warm shutdown waits for ever. Its
soft one sleeps in the signal handler: nobody looks at what ends meanwhile, so a task that has ended is run again
elsewhere, and it cannot end threads or the task that it interrupts itself.

Here the loop goes on: results are stored, messages are acknowledged, heartbeats are sent. A thread watches the clock.
When the seconds are over it lets the loop give back what still runs, and the process ends without waiting for threads.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from celery import signals
from celery.apps.worker import safe_say
from celery.concurrency import solo
from celery.utils.log import get_logger
from celery.worker import state

from qbridge.backends.deadline import deadline
from qbridge.dead_letters.letter import HEADER_LOSSES
from qbridge.standing import AGAIN
from qbridge.worker.resending import headers_of, losses_of, queue_of, send_again

__all__ = ["Ending", "end_processes"]

logger = get_logger(__name__)

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
"""The first of any begins the end; the second is the end."""
_LOOK = 0.05
"""Seconds between two looks at what still runs."""
_FOR_CHILDREN = 0.5
"""Seconds that a process of the pool gets to end after SIGTERM, before its task may begin elsewhere."""
_FOR_THE_LOOP = 2.0
"""Seconds in which the worker's loop must come round; it may be waiting for a broker that is away."""
_FOR_THE_REST = 3.0
"""Seconds for the rest of an orderly end, connections to a broker that does not answer included."""


class Ending:
    """The end of one worker program.

    Args:
        worker: a ``celery.apps.worker.Worker``.
        timeout: seconds that running tasks get.
    """

    def __init__(self, worker: Any, timeout: float) -> None:
        self.began: bool = False
        self.exit_code: int = 0
        self._worker = worker
        self._timeout = timeout
        self._pid = os.getpid()
        self._at_once = threading.Event()
        self._given_up = threading.Event()
        self._held: list[Any] = []
        self._cancelled = False

    def install(self) -> None:
        """Take the signals over from Celery."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a process of the pool: its parent decides
            return
        if self.began:
            self._at_once.set()
            return
        safe_say("worker: Warm shutdown (MainProcess)", sys.__stdout__)
        self.begin(signal.Signals(number).name, 0)

    def begin(self, cause: str, exit_code: int) -> None:
        """Begin the end, if it has not begun.

        Args:
            cause: name of the signal, or of what else asks for it.
            exit_code: of the process.
        """
        if self.began:
            return
        self.began = True
        self.exit_code = exit_code
        # All else happens in a thread: a handler may have interrupted whatever holds a lock.
        threading.Thread(target=self._watch, name="qbridge-ending", daemon=True).start()
        signals.worker_shutting_down.send(sender=self._worker.hostname, sig=cause, how="Warm", exitcode=exit_code)

    def _watch(self) -> None:
        deadline = time.monotonic() + self._timeout
        self._in_loop(self._take_no_more)
        while self._running() and time.monotonic() < deadline and not self._at_once.is_set():
            self._at_once.wait(_LOOK)
        if not self._running():
            self._in_loop(self._stop)
            if self._consumes():
                self._at_once.wait(_FOR_THE_LOOP)
            self._stop()  # for a loop that is not there: Celery looks at this while it waits for a broker
            self._at_once.wait(_FOR_THE_REST)
        else:
            if self._runs_in_the_loop():
                threading.Thread(target=self._give_up, name="qbridge-giving-up", daemon=True).start()
            else:
                self._in_loop(self._give_up)
            if self._given_up.wait(_FOR_THE_LOOP):
                time.sleep(_FOR_THE_REST)
        # Only reached by a worker that could not end in good order: its death gives its messages back.
        self._leave_nobody(self._children())

    # What the loop does

    def _in_loop(self, step: Callable[[], None]) -> None:
        hub = getattr(self._worker, "hub", None)
        if hub is not None:
            hub.call_soon(step)  # wakes it up
        elif getattr(self._worker, "consumer", None) is not None:
            self._worker.consumer.call_soon(step)

    def _stop(self) -> None:
        state.should_stop = self.exit_code
        self._in_loop(_nothing)  # else the loop waits for a message before it looks

    def _take_no_more(self) -> None:
        consumer = self._worker.consumer
        if consumer.task_consumer is not None:
            try:
                consumer.task_consumer.cancel()
            except consumer.connection_errors as error:  # what it held is given back by the broker
                logger.debug("could not cancel the consumer: %s", error)
        self._cancelled = True
        held, self._held = self._held, []
        for message in held:
            message.reject_log_error(logger, consumer.connection_errors, requeue=True)
        self._send_back(self._not_started(consumer))

    def hold(self, message: Any) -> None:
        """Keep a message that has come too late until nothing more can come; then it goes back.

        Given back before, a broker would deliver it here again.
        """
        if self._cancelled:
            message.reject_log_error(logger, self._worker.consumer.connection_errors, requeue=True)
        else:
            self._held.append(message)

    def _not_started(self, consumer: Any) -> Iterable[Any]:
        found = []
        for request in tuple(state.scheduled_requests):
            entry = request._eta_timer_entry
            if entry is not None:
                consumer.timer.cancel(entry)
            found.append(request)
        state.scheduled_requests.clear()
        for bucket in consumer.task_buckets.values():
            if bucket:
                found += [request for request, _ in bucket.contents]
                bucket.clear_pending()
        semaphore = getattr(self._worker, "semaphore", None)
        if semaphore is not None:
            waiting = [args[0] for _, args, _ in tuple(semaphore._waiting) if args]
            semaphore._waiting.clear()
            found += waiting
        withdraw = getattr(self._worker.pool, "withdraw", None)
        if withdraw is not None:
            found += withdraw()
        return found

    def _send_anew(self, requests: Iterable[Any]) -> None:
        """Send the messages of tasks that ran again, where a returned one counts as lost with a crashed worker.

        RabbitMQ counts every return to a quorum queue, and a deploy is no crash. A new message counts from 0, with what
        was counted before in its headers; it is the last of its queue.
        """
        consumer = self._worker.consumer
        if consumer.connection.transport.driver_type != "amqp":
            return
        with deadline(_FOR_THE_LOOP):
            if not self._cancelled and consumer.task_consumer is not None:
                # the task was in the loop's way; what is sent now would come here again
                with suppress(*consumer.connection_errors):
                    consumer.task_consumer.cancel()
            for request in requests:
                message = request.message
                if request.acknowledged or getattr(request.task, "max_redeliveries", None) is None:
                    continue
                headers = {**headers_of(message), HEADER_LOSSES: losses_of(message), AGAIN: True}
                try:
                    send_again(consumer.app, message, headers, "", queue_of(consumer, message))
                except Exception as error:  # noqa: BLE001 - then it goes back as it is, and is counted
                    logger.warning("Cannot send what ran again: %s", error)
                    return
                request.acknowledged = True
                message.ack_log_error(logger, consumer.connection_errors)

    def _send_back(self, requests: Iterable[Any]) -> int:
        errors = self._worker.consumer.connection_errors
        number = 0
        for request in requests:
            state.task_ready(request)
            if not request.acknowledged:
                request.acknowledged = True
                request.message.reject_log_error(logger, errors, requeue=True)
                number += 1
        return number

    # The end of those who did not end

    def _running(self) -> bool:
        return bool(len(state.reserved_requests) or getattr(self._worker.pool, "at_work", 0))

    def _consumes(self) -> bool:
        return getattr(getattr(self._worker, "consumer", None), "connection", None) is not None

    def _runs_in_the_loop(self) -> bool:
        return isinstance(self._worker.pool, solo.TaskPool)

    def _children(self) -> list[Any]:
        processes = getattr(getattr(self._worker.pool, "_pool", None), "_pool", None)
        return list(processes or ())

    def _give_up(self) -> None:
        self._given_up.set()
        children = self._children()
        end_processes(child.pid for child in children)
        requests = tuple(state.reserved_requests)
        ran = [f"{request.name}[{request.id}]" for request in requests]
        consumer = self._worker.consumer
        number = 0
        try:
            back = [request for request in requests if not request.acknowledged]
            self._send_anew(back)
            self._send_back(requests)
            number = len(back)
            connection, consumer.connection = consumer.connection, None
            if connection is not None:
                connection.close()
        except Exception as error:  # noqa: BLE001 - whatever a broker does: the process ends, and gives its messages back
            logger.warning("The worker ends without the broker's good-bye: %s", error)
        logger.warning(
            "After %g s of shutdown_timeout %d task(s) were still running; %d of their messages went back: %s",
            self._timeout, len(ran), number, ", ".join(ran),
        )  # fmt: skip
        with suppress(Exception):
            self._worker._send_worker_shutdown()
        if self._worker.pidlock:
            self._worker.pidlock.release()
        self._leave_nobody(())

    def _leave_nobody(self, children: Iterable[Any]) -> None:
        for child in children:
            with suppress(OSError):
                os.kill(child.pid, signal.SIGKILL)
        streams: tuple[Any, ...] = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        for stream in streams:
            with suppress(Exception):  # None where there is no console
                stream.flush()
        os._exit(self.exit_code)


def _nothing() -> None: ...


def end_processes(pids: Iterable[int]) -> None:
    """End processes of the pool, and wait until they have ended: within half a second they are killed.

    Args:
        pids: of children of this process.
    """
    pids = tuple(pids)
    deadline = time.monotonic() + _FOR_CHILDREN
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            if _is_alive(pid):
                with suppress(OSError):
                    os.kill(pid, number)
        while time.monotonic() < deadline and any(map(_is_alive, pids)):
            time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not (``kill`` cannot tell)."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except OSError:
        return False
