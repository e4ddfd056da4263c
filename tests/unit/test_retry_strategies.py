"""Retry.from_tenacity: tenacity's strategies, asked about a task whose attempts may run anywhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tenacity import (
    retry_if_exception,
    retry_if_exception_type,
    retry_if_not_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    stop_before_delay,
    wait_chain,
    wait_exception,
    wait_exponential,
    wait_fixed,
    wait_incrementing,
    wait_random_exponential,
)

from qbridge import BridgeConfig, Retry
from qbridge.exceptions import ConfigurationError
from qbridge.retry.policy import UNBOUNDED


def story(policy: Retry, error: BaseException, took: float = 0.0) -> list[float]:
    """The waits of a task whose every attempt takes so long and ends with this error."""
    waits: list[float] = []
    elapsed = 0.0
    while len(waits) < 50:
        elapsed += took
        wait = policy.next_wait(error, len(waits) + 1, elapsed, sum(waits))
        if wait is None:
            break
        waits.append(wait)
        elapsed += wait
    return waits


def in_tenacity(stop: Any, wait: Any) -> list[float]:
    """The waits that tenacity itself makes in one process, where nothing takes time."""
    waits: list[float] = []

    def fail() -> None:
        raise ValueError

    retrying = tenacity.Retrying(stop=stop, wait=wait, sleep=waits.append)
    with pytest.raises(tenacity.RetryError):
        retrying(fail)
    return waits


@pytest.mark.parametrize(
    ("stop", "wait"),
    [
        (stop_after_attempt(5), wait_exponential(multiplier=0.5, max=3)),
        (stop_after_attempt(4), wait_chain(wait_fixed(1), wait_fixed(5), wait_fixed(7))),
        (stop_after_attempt(6) | stop_after_attempt(3), wait_fixed(2) + wait_incrementing(1, 2)),
        (stop_all(stop_after_attempt(2), stop_after_attempt(4)), wait_fixed(1)),
        (stop_after_attempt(1), wait_fixed(1)),
        (lambda state: state.idle_for > 6, wait_fixed(2)),
    ],
)
def test_a_task_waits_as_long_as_a_call_in_one_process_would(stop: Any, wait: Any) -> None:
    """The state that strategies look at is built from the message, and they cannot tell."""
    policy = Retry.from_tenacity(stop=stop, wait=wait)
    expected = in_tenacity(stop, wait)
    assert story(policy, ValueError()) == expected


def test_stops_that_count_time_see_the_time_since_the_first_attempt() -> None:
    """``stop_after_delay`` after it has passed, ``stop_before_delay`` if the next attempt would begin too late."""
    after = Retry.from_tenacity(stop=stop_after_delay(10), wait=wait_fixed(4))
    assert story(after, ValueError(), took=1) == [4, 4]
    before = Retry.from_tenacity(
        stop=stop_after_attempt(9) | stop_before_delay(timedelta(seconds=10)), wait=wait_fixed(4)
    )
    assert story(before, ValueError(), took=1) == [4]


def test_errors_are_chosen_by_tenacitys_own_predicates() -> None:
    """Types, not types, functions, and their combinations."""
    stop, error = stop_after_attempt(3), ConnectionResetError()
    for retry, expected in (
        (retry_if_exception_type(ConnectionError), True),
        (retry_if_not_exception_type(ConnectionError), False),
        (retry_if_exception(lambda error: "busy" in str(error)), False),
        (retry_if_exception_type(KeyError) | retry_if_exception_type(OSError), True),
        (retry_if_exception_type(OSError) & retry_if_not_exception_type(ConnectionError), False),
        (None, True),
    ):
        assert (Retry.from_tenacity(retry=retry, stop=stop).next_wait(error, 1) is not None) is expected


def test_a_wait_may_read_the_error() -> None:
    """A server's Retry-After."""
    policy = Retry.from_tenacity(
        stop=stop_after_attempt(3), wait=wait_exception(lambda error: float(getattr(error, "after", 1)))
    )
    error = ValueError()
    error.after = 12  # type: ignore[attr-defined]
    assert policy.next_wait(error, 1) == 12


@pytest.mark.parametrize(
    ("strategies", "match"),
    [
        ({"retry": retry_if_exception_type() | retry_if_result(bool)}, "retry_if_result"),
        ({"stop": "5"}, "no strategy"),
        ({"stop": stop_after_attempt}, "no strategy"),
        ({"wait": 3}, "no strategy"),
    ],
)
def test_what_cannot_be_asked_in_a_worker_is_refused_at_once(strategies: dict[str, Any], match: str) -> None:
    """With the reason, at definition."""
    with pytest.raises(ConfigurationError, match=match):
        Retry.from_tenacity(**{"stop": stop_after_attempt(2), **strategies})


def test_an_asynchronous_predicate_is_refused() -> None:
    """Nobody would await its answer, and a coroutine is always true."""

    async def busy(error: BaseException) -> bool:
        return True

    with pytest.raises(ConfigurationError, match="asynchronous"):
        Retry.from_tenacity(retry=retry_if_exception(busy), stop=stop_after_attempt(2))  # type: ignore[arg-type]


def test_the_number_of_attempts_is_known_where_the_stop_counts_them() -> None:
    """``ctx.is_last_attempt`` needs it; a stop that looks at the time only has none."""
    counted = Retry.from_tenacity(stop=stop_after_attempt(4) | stop_after_delay(9))
    assert counted.attempts == 4
    assert counted.bounded
    timed = Retry.from_tenacity(stop=stop_after_delay(9), wait=wait_fixed(1))
    assert timed.attempts == UNBOUNDED
    assert not timed.bounded
    assert stop_after_attempt(4)
    assert Retry.from_tenacity(stop=stop_all(stop_after_attempt(4), stop_after_delay(9))).attempts == UNBOUNDED


def test_a_preview_has_an_end() -> None:
    """As many waits as there would be, and not more than anybody reads."""
    policy = Retry.from_tenacity(stop=stop_after_attempt(4), wait=wait_exponential(multiplier=1))
    assert policy.preview() == [1, 2, 4]
    assert policy.longest() == 7
    endless = Retry.from_tenacity(stop=tenacity.stop_never, wait=wait_fixed(1))
    assert len(endless.preview()) == 100
    assert endless.longest() is None


def test_results_that_expire_before_the_last_retry_are_refused_where_that_can_be_told() -> None:
    """For tenacity's strategies too, if they have an end."""
    long = Retry.from_tenacity(stop=stop_after_attempt(3), wait=wait_fixed(50_000))
    with pytest.raises(ValueError, match="before the last retry"):
        BridgeConfig(broker="redis://h", results="redis://h", retry=long)
    BridgeConfig(broker="redis://h", results="redis://h", retry=Retry.from_tenacity(stop=tenacity.stop_never))


@given(
    initial=st.floats(0, 100), most=st.floats(0, 500), base=st.floats(1, 4), jitter=st.floats(0, 50),
    attempt=st.integers(1, 60),
)  # fmt: skip
def test_a_wait_lies_between_its_floor_and_its_maximum(
    initial: float, most: float, base: float, jitter: float, attempt: int
) -> None:
    """Whatever is drawn: not below the exponential wait, not above it plus the jitter, never above ``wait_max``."""
    policy = Retry(
        on=ValueError, attempts=99, wait_initial=initial, wait_max=most, wait_exp_base=base, wait_jitter=jitter
    )
    floor = min(most, initial * base ** (attempt - 1))
    wait = policy.wait(attempt)
    assert floor - 1e-6 <= wait <= min(most, floor + jitter) + 1e-6


@given(attempt=st.integers(1, 500), elapsed=st.floats(0, 1e6))
def test_a_random_wait_of_tenacitys_stays_in_its_bounds(attempt: int, elapsed: float) -> None:
    """``wait_random_exponential`` is asked anew at each attempt."""
    policy = Retry.from_tenacity(stop=tenacity.stop_never, wait=wait_random_exponential(multiplier=1, max=60))
    wait = policy.next_wait(ValueError(), attempt, elapsed)
    assert wait is not None
    assert 0 <= wait <= 60
