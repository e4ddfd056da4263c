"""What does a policy say: is this error tried again, and after how long?

A policy is data: it is evaluated in the worker from the number of the attempt, the time since the first one and the
time waited, which travel with the message, so a retry may run in any process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args

import tenacity

from qbridge.exceptions import ConfigurationError
from qbridge.retry.strategies import Strategies, Strategy

__all__ = ["UNBOUNDED", "Retry", "Where"]

UNBOUNDED = 2**31 - 1
"""``attempts`` of a policy whose end is a time or a condition, not a number."""

Seconds = float | timedelta
Where = Literal["broker", "worker"]
Predicate = Callable[[BaseException], "bool | float | timedelta"]


def _seconds(name: str, value: Any) -> float:  # whatever was given
    seconds: Any = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        raise ConfigurationError(f"Retry({name}={value!r}) is not a time", "Give seconds (0 or more) or a timedelta.")
    return float(seconds)


def _is_error_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


_LONGEST = 366 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Try a failed task again, each time after a longer wait.

    The wait after attempt ``n`` is ``min(wait_max, wait_initial * wait_exp_base ** (n - 1) + random(0, wait_jitter))``
    (the exponential part is tenacity's ``wait_exponential``).

    Args:
        on: which errors: an exception type, a tuple of them, or a function of the exception that returns False,
            True, or the time to wait (a server's Retry-After).
        attempts: how many runs in all, the first one included.
        timeout: seconds or timedelta after the first run's start; no attempt begins later. None: no bound.
        wait_initial: seconds or timedelta before the second attempt.
        wait_max: no wait is longer than this.
        wait_exp_base: factor from one wait to the next.
        wait_jitter: upper bound of the random time added to each wait.
        where: who keeps the task while it waits. ``"broker"``: a message of its own, which any worker takes when it is
            due. ``"worker"``: the slot that ran it, for waits that are shorter than the way through the broker; an
            attempt there is lost with its worker, and the task begins again with the count that the message has.

    Raises:
        ConfigurationError: if a number makes no sense.
    """

    on: type[BaseException] | tuple[type[BaseException], ...] | Predicate
    attempts: int = 5
    timeout: Seconds | None = None
    wait_initial: Seconds = 1.0
    wait_max: Seconds = 300.0
    wait_exp_base: float = 2.0
    wait_jitter: Seconds = 1.0
    where: Where = "broker"

    def __post_init__(self) -> None:
        attempts: Any = self.attempts
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(
                f"Retry(attempts={self.attempts}) would never run the task", "attempts counts the first run: 1 or more."
            )
        for name in ("wait_initial", "wait_max", "wait_jitter"):
            _check_bounded(name, getattr(self, name))
        if self.timeout is not None:
            _check_bounded("timeout", self.timeout)
        base: Any = self.wait_exp_base
        if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
            raise ConfigurationError(f"Retry(wait_exp_base={base!r}) is not a positive number", "2 doubles each wait.")
        if self.where not in get_args(Where):
            raise ConfigurationError(f"Retry(where={self.where!r}) is no place", "Give 'broker' or 'worker'.")
        on = self.on
        if isinstance(on, type):
            on = (on,)
        names_errors = bool(on) and all(map(_is_error_type, on)) if isinstance(on, tuple) else callable(on)
        if not names_errors:
            raise ConfigurationError("Retry(on=...) names no errors", "Give an exception type, a tuple, or a function.")

    @staticmethod
    def from_tenacity(
        *, stop: Strategy, retry: Strategy | None = None, wait: Strategy | None = None, where: Where = "broker"
    ) -> Retry:
        """Return a policy made of tenacity's strategies, combined as tenacity combines them.

        They are evaluated across processes: the number of the attempt, ``seconds_since_start``, ``idle_for`` and
        ``upcoming_sleep`` are those of the task, wherever its attempts ran. ``fn``, ``args`` and ``kwargs`` are empty.

        Args:
            stop: when it ends, such as ``stop_after_attempt(5) | stop_before_delay(60)``; tenacity's own default is
                never, and so there is none here.
            retry: which errors; None: tenacity's default, every ``Exception``.
            wait: how long; None: tenacity's default, not at all.
            where: as in ``Retry``.

        Raises:
            ConfigurationError: if a strategy looks at returned values, is asynchronous, or is none.
        """
        strategies = Strategies(
            retry=tenacity.retry_if_exception_type() if retry is None else retry,
            stop=stop,
            wait=tenacity.wait_none() if wait is None else wait,
        )
        return _TenacityRetry(
            on=strategies.judge, attempts=strategies.most_attempts() or UNBOUNDED, where=where, strategies=strategies
        )

    def next_wait(self, error: BaseException, attempt: int, elapsed: float = 0.0, idle: float = 0.0) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there is none.

        Args:
            error: what the attempt ended with.
            attempt: its number; the first run is 1.
            elapsed: seconds since the first run began.
            idle: seconds waited between attempts so far; tenacity's strategies may look at it.
        """
        verdict = self._verdict(error)
        if verdict is False or attempt >= self.attempts:
            return None
        wait = self.wait(attempt) if verdict is True else min(_seconds("on", verdict), self._bound)
        if self.timeout is not None and elapsed + wait > _seconds("timeout", self.timeout):
            return None
        return wait

    def covers(self, error: BaseException) -> bool:
        """Return whether the policy names this error, whatever is left of its attempts."""
        return self._verdict(error) is not False

    def asked_wait(self, attempt: int, elapsed: float = 0.0, idle: float = 0.0) -> float | None:
        """Return the seconds to wait for a task that asks for another attempt itself, or None if it was the last.

        Args:
            attempt: the number of the attempt that asks.
            elapsed: seconds since the first run began.
            idle: seconds waited between attempts so far.
        """
        return None if attempt >= self.attempts else self.wait(attempt)

    def preview(self) -> list[float]:
        """Return one possible list of waits in seconds: as many as there are retries, with jitter drawn."""
        return [self.wait(attempt) for attempt in range(1, self.attempts)]

    def longest(self) -> float | None:
        """Return the seconds that all waits take at least, if every attempt fails; None if that cannot be told."""
        return sum(replace(self, wait_jitter=0).preview())

    @property
    def bounded(self) -> bool:
        """Whether the number of attempts is known beforehand."""
        return self.attempts != UNBOUNDED

    @property
    def _bound(self) -> float:
        return _seconds("wait_max", self.wait_max)

    def _verdict(self, error: BaseException) -> bool | Seconds:
        on = self.on
        if isinstance(on, type | tuple):
            return isinstance(error, on)
        verdict: Any = on(error)
        return False if verdict is None else verdict  # a function that ends without a word means no

    def wait(self, attempt: int) -> float:
        """Return the seconds to wait after an attempt, with jitter drawn.

        Args:
            attempt: its number; the first run is 1.
        """
        strategy = tenacity.wait_exponential(
            multiplier=_seconds("wait_initial", self.wait_initial), max=self._bound, exp_base=self.wait_exp_base
        )
        # tenacity's strategies read nothing but the attempt's number from the call state
        wait = strategy(cast(Any, SimpleNamespace(attempt_number=attempt)))
        jitter = random.uniform(0, _seconds("wait_jitter", self.wait_jitter))  # noqa: S311 - spreads load, no secret
        return min(wait + jitter, self._bound)


def _check_bounded(name: str, value: Any) -> None:
    if _seconds(name, value) > _LONGEST:
        raise ConfigurationError(f"Retry({name}={value!r}) is more than a year", "Give fewer seconds.")


# tenacity's strategies may go on for ever; nobody reads a longer list
_PREVIEW = 100
_DRAWS = 8


_LONGEST = 366 * 86400.0


@dataclass(frozen=True, kw_only=True)
class _TenacityRetry(Retry):
    """A policy that asks tenacity's strategies; the fields that it does not use have their defaults."""

    strategies: Strategies

    def next_wait(self, error: BaseException, attempt: int, elapsed: float = 0.0, idle: float = 0.0) -> float | None:
        return self.strategies.next_wait(error, attempt, elapsed, idle)

    def asked_wait(self, attempt: int, elapsed: float = 0.0, idle: float = 0.0) -> float | None:
        return self.strategies.goes_on(_Asked(), attempt, elapsed, idle)

    def preview(self) -> list[float]:
        """Return one possible list of waits, at most 100, for runs that take no time.

        A ``wait_exception`` is asked about an exception that says nothing.
        """
        found: list[float] = []
        while len(found) < _PREVIEW:
            elapsed = sum(found)
            wait = self.strategies.goes_on(_Asked(), len(found) + 1, elapsed, elapsed)
            if wait is None:
                break
            found.append(wait)
        return found

    def longest(self) -> float | None:
        if not self.strategies.are_tenacitys():
            return None  # somebody's own may count its calls, or ask a server
        try:
            draws = [self.preview() for _ in range(_DRAWS)]
        except Exception:  # noqa: BLE001 - what is wrong with it shows when it is asked for a wait
            return None
        return None if any(len(draw) >= _PREVIEW for draw in draws) else min(map(sum, draws))

    def wait(self, attempt: int) -> float:
        wait = self.strategies.goes_on(_Asked(), attempt, 0.0, 0.0)
        return 0.0 if wait is None else wait


class _Asked(Exception):
    """What a strategy sees where the task itself asked for another attempt."""
