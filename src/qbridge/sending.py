"""How one message gets to the broker, or an error to the caller, within ``publish_timeout``."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kombu.exceptions import OperationalError

from qbridge.backends.base import Broker
from qbridge.backends.deadline import deadline, remaining
from qbridge.exceptions import BrokerUnavailable, QBridgeError

__all__ = ["Attempts", "SendingThreads", "attempt_takes", "is_broker_error", "is_connection_error"]

T = TypeVar("T")

_THREADS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
# A blocked attempt that begins in time may end this much (seconds) after publish_timeout; a second is the promise.
_GRACE = 0.8


def attempt_takes(broker: Broker) -> float:
    """Return the seconds that must be left for an attempt to begin.

    redis-py's waits are fixed per connection; RabbitMQ's and SQLite's end with the call's deadline.
    """
    return max(0.0, float(getattr(broker, "socket_timeout", 0.0)) - _GRACE)


class Attempts:
    """Tries a publish again while the broker is away and time is left.

    Args:
        app: the bridge's app.
        broker: its broker: gives the bound, and the time that one attempt may take.
    """

    def __init__(self, app: Any, broker: Broker) -> None:
        self._app = app
        self._broker = broker
        self._attempt_takes = attempt_takes(broker)

    def run(self, publish: Callable[[], T]) -> T:
        """Call ``publish`` until it returns.

        The same message may be published twice if a connection breaks between the broker's taking it and its saying
        so: delivery is at least once, and the id is the same.

        Raises:
            BrokerUnavailable: if it did not succeed in time; says whether the message may have arrived.
        """
        bound = self._broker.publish_timeout
        began = time.monotonic()
        pause, sent = _FIRST_PAUSE, False
        with deadline(bound):
            while True:
                try:
                    return publish()
                except QBridgeError:
                    raise
                except Exception as error:
                    if not self._is_broker_error(error):
                        raise
                    sent = sent or _may_have_arrived(error)
                    left = remaining() or 0.0
                    wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, no secret
                    if left - wait < max(self._attempt_takes, 0.05):
                        raise self.unavailable(error, time.monotonic() - began, sent) from error
                time.sleep(wait)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def once(self, publish: Callable[[], T]) -> T:
        """Call ``publish`` under Celery's own bounds and retries, and raise our error where Celery gives up.

        Raises:
            BrokerUnavailable: if the broker did not take the message.
        """
        began = time.monotonic()
        try:
            return publish()
        except QBridgeError:
            raise
        except Exception as error:
            if not self._is_broker_error(error):
                raise
            # without confirmations nobody can say that the broker has nothing of it
            raise self.unavailable(error, time.monotonic() - began, True) from error

    def unavailable(self, error: Exception, waited: float, sent: bool) -> BrokerUnavailable:
        """Return the error that says which broker, how long, and whether the message may be there."""
        where = self._broker.safe_url()
        fate = "The message may have arrived all the same" if sent else "The message was not taken"
        reason = " ".join(str(error).split()) or type(error).__name__
        return BrokerUnavailable(
            f"the broker at {where} did not take the message within {waited:.1f} s: {reason}",
            f"{fate}. Look at `qbridge check`; send again with the same task_id once it is back.",
            sent,
        )

    def _is_broker_error(self, error: Exception) -> bool:
        return is_broker_error(self._app, error)


def is_broker_error(app: Any, error: object) -> bool:
    """Return whether an error of a publish is the broker's, and not the message's."""
    return isinstance(error, (OperationalError, OSError, *_kinds(app)))


def is_connection_error(app: Any, error: object) -> bool:
    """Return whether the connection broke, or none could be had; False where the broker answered, or was silent."""
    transport = app.connection_for_write().transport
    kinds = (OSError, *(kind for kind in transport.connection_errors if kind in _kinds(app)))
    while isinstance(error, BaseException):
        if isinstance(error, kinds) and not isinstance(error, TimeoutError):
            return True
        error = error.__cause__
    return False


def _may_have_arrived(error: BaseException | None) -> bool:
    """Return whether the transport has said so of this error, or of one that kombu has wrapped in it."""
    while error is not None:
        if getattr(error, "may_have_arrived", False):
            return True
        error = error.__cause__
    return False


def _kinds(app: Any) -> tuple[type[Exception], ...]:
    """Return the error types that the transport's library raises for connections and channels."""
    transport = app.connection_for_write().transport
    found = (*transport.connection_errors, *transport.channel_errors)
    return tuple(kind for kind in found if not issubclass(kind, LookupError | TypeError | ValueError | AttributeError))


class SendingThreads:
    """A few threads in which the async client sends, so that no event loop ever waits for a broker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a thread, with the caller's context variables."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="qbridge-send")
            executor = self._executor
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(executor, partial(context.run, function, *args))

    def close(self) -> None:
        """Let go of the threads; what was not begun is cancelled."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
