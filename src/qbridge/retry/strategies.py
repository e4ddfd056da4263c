"""What do tenacity's strategies say of a call whose attempts ran in several processes?

They were written for one call in one process and read a ``tenacity.RetryCallState``. Everything in it that they look at
(the number of the attempt, the time since the first, the time slept, the error) travels with our message, so the state
is built anew wherever the next decision falls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tenacity

from qbridge.exceptions import ConfigurationError

__all__ = ["Strategies", "call_state"]

Strategy = Callable[[tenacity.RetryCallState], Any]

# These answer for calls that return, too: a task that has returned is done, and its result is stored.
_ASK_FOR_RESULTS = (
    tenacity.retry_if_result,
    tenacity.retry_if_not_result,
    tenacity.retry_unless_exception_type,
    tenacity.retry_if_not_exception_message,
)
# No wait that anybody means is longer; an infinite one could not be written into a message.
_LONGEST = 366 * 86_400.0


def call_state(error: BaseException, attempt: int, elapsed: float, idle: float) -> tenacity.RetryCallState:
    """Return the state that tenacity would have after this attempt.

    Args:
        error: what the attempt ended with.
        attempt: its number; the first run is 1.
        elapsed: seconds since the first run began.
        idle: seconds waited between attempts so far.
    """
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = attempt
    state.idle_for = idle
    state.set_exception((type(error), error, error.__traceback__))
    if state.outcome_timestamp is not None:
        state.start_time = state.outcome_timestamp - elapsed
    return state


@dataclass(frozen=True)
class Strategies:
    """One of each of tenacity's three kinds of strategies.

    Args:
        retry: whether this error is tried again.
        stop: whether there have been enough attempts.
        wait: how long to wait.

    Raises:
        ConfigurationError: if one cannot be asked about a task: it is no function of a call state, is asynchronous, or
            looks at returned values.
    """

    retry: Strategy
    stop: Strategy
    wait: Strategy

    def __post_init__(self) -> None:
        for name in ("retry", "stop", "wait"):
            for part in _parts(getattr(self, name)):
                if isinstance(part, type) or not callable(part):
                    raise ConfigurationError(
                        f"Retry.from_tenacity({name}={part!r}) is no strategy of tenacity's",
                        "Give an object such as tenacity.stop_after_attempt(5), or a function of a RetryCallState.",
                    )
                if _is_async(part):
                    raise ConfigurationError(
                        f"Retry.from_tenacity({name}=...) is asynchronous: {_named(part)}",
                        "Give a plain function: it is asked in the worker, where no event loop waits for it.",
                    )
                if isinstance(part, _ASK_FOR_RESULTS):
                    raise ConfigurationError(
                        f"Retry.from_tenacity({name}=...) holds {_named(part)}, which tries again after a call that "
                        "returned: a task that has returned is done",
                        "Raise an exception where the value is not good enough, and name that, or use ctx.retry().",
                    )

    def next_wait(self, error: BaseException, attempt: int, elapsed: float, idle: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None if there is none; in tenacity's order."""
        state = call_state(error, attempt, elapsed, idle)
        if not self.retry(state):
            return None
        state.upcoming_sleep = self._wait(state)
        return None if self.stop(state) else state.upcoming_sleep

    def judge(self, error: BaseException) -> bool:
        """Return what ``retry`` says of a first attempt that ended so."""
        return bool(self.retry(call_state(error, 1, 0.0, 0.0)))

    def goes_on(self, error: BaseException, attempt: int, elapsed: float, idle: float) -> float | None:
        """Return the same for a task that asks for another attempt itself, whatever ``retry`` says."""
        state = call_state(error, attempt, elapsed, idle)
        state.upcoming_sleep = self._wait(state)
        return None if self.stop(state) else state.upcoming_sleep

    def most_attempts(self) -> int | None:
        """Return after how many attempts ``stop`` ends in any case, or None if it does not count them."""
        return _most(self.stop)

    def are_tenacitys(self) -> bool:
        """Tell whether asking how long to wait, and when to stop, runs no code but tenacity's own."""
        return all(
            type(part).__module__.split(".")[0] == "tenacity" and not hasattr(part, "predicate")
            for strategy in (self.stop, self.wait)
            for part in _parts(strategy)
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        return min(max(0.0, float(self.wait(state))), _LONGEST)


def _most(stop: Any) -> int | None:
    if isinstance(stop, tenacity.stop_after_attempt):
        return max(1, int(stop.max_attempt_number))
    if isinstance(stop, tenacity.stop_any):
        known = [most for most in map(_most, stop.stops) if most is not None]
        return min(known, default=None)
    if isinstance(stop, tenacity.stop_all):
        each = [_most(part) for part in stop.stops]
        counted = [most for most in each if most is not None]
        return max(counted) if counted and len(counted) == len(each) else None
    return None


def _parts(strategy: Any) -> Iterator[Any]:
    """Yield a strategy and all that it is made of."""
    yield strategy
    if isinstance(strategy, tenacity.wait_combine):
        inner: Any = strategy.wait_funcs
    elif isinstance(strategy, tenacity.wait_chain):
        inner = strategy.strategies
    elif isinstance(strategy, tenacity.stop_any | tenacity.stop_all):
        inner = strategy.stops
    elif isinstance(strategy, tenacity.retry_any | tenacity.retry_all):
        inner = strategy.retries
    else:
        inner = ()
    for part in inner:
        yield from _parts(part)


def _is_async(strategy: Any) -> bool:
    if inspect.iscoroutinefunction(strategy) or inspect.iscoroutinefunction(type(strategy).__call__):
        return True
    if isinstance(strategy, tenacity.retry_if_exception) and inspect.iscoroutinefunction(strategy.predicate):
        return True
    return type(strategy).__module__.startswith("tenacity.asyncio")


def _named(strategy: Any) -> str:
    return str(getattr(strategy, "__qualname__", type(strategy).__qualname__))
