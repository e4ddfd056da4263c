"""When do we try again: the policy, its arithmetic; the only importer of tenacity.

A policy is data: it is evaluated in the worker from the number of the attempt and the time since the first one,
which travel with the message, so a retry may run in any process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import tenacity

from qbridge.exceptions import ConfigurationError

__all__ = ["Retry"]

Seconds = float | timedelta
Predicate = Callable[[BaseException], "bool | float | timedelta"]


def _seconds(name: str, value: Any) -> float:  # whatever was given
    seconds: Any = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        raise ConfigurationError(f"Retry({name}={value!r}) is not a time", "Give seconds (0 or more) or a timedelta.")
    return float(seconds)


def _is_error_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


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

    def __post_init__(self) -> None:
        attempts: Any = self.attempts
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(
                f"Retry(attempts={self.attempts}) would never run the task", "attempts counts the first run: 1 or more."
            )
        for name in ("wait_initial", "wait_max", "wait_jitter"):
            _seconds(name, getattr(self, name))
        if self.timeout is not None:
            _seconds("timeout", self.timeout)
        base: Any = self.wait_exp_base
        if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
            raise ConfigurationError(f"Retry(wait_exp_base={base!r}) is not a positive number", "2 doubles each wait.")
        on = self.on
        if isinstance(on, type):
            on = (on,)
        names_errors = bool(on) and all(map(_is_error_type, on)) if isinstance(on, tuple) else callable(on)
        if not names_errors:
            raise ConfigurationError("Retry(on=...) names no errors", "Give an exception type, a tuple, or a function.")

    def next_wait(self, error: BaseException, attempt: int, elapsed: float = 0.0) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there is none.

        Args:
            error: what the attempt ended with.
            attempt: its number; the first run is 1.
            elapsed: seconds since the first run began.
        """
        verdict = self._verdict(error)
        if verdict is False or attempt >= self.attempts:
            return None
        wait = self.wait(attempt) if verdict is True else min(_seconds("on", verdict), self._bound)
        if self.timeout is not None and elapsed + wait > _seconds("timeout", self.timeout):
            return None
        return wait

    def preview(self) -> list[float]:
        """Return one possible list of waits in seconds: as many as there are retries, with jitter drawn."""
        return [self.wait(attempt) for attempt in range(1, self.attempts)]

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
