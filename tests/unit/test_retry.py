"""Retry: when is it tried again, and after how long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from qbridge import Retry
from qbridge.exceptions import ConfigurationError


def waits(policy: Retry, error: Exception, runs: int = 10) -> list[float | None]:
    return [policy.next_wait(error, attempt) for attempt in range(1, runs + 1)]


def test_waits_double_up_to_their_maximum_and_attempts_count_the_first_run() -> None:
    """Five attempts have four waits."""
    policy = Retry(on=ValueError, attempts=5, wait_initial=1, wait_max=5, wait_jitter=0)
    assert waits(policy, ValueError(), 6) == [1, 2, 4, 5, None, None]


def test_jitter_never_draws_above_the_maximum_nor_below_the_computed_wait() -> None:
    """A bound is a bound."""
    policy = Retry(on=ValueError, attempts=4, wait_initial=1, wait_max=2.5, wait_jitter=10)
    for _ in range(200):
        first, second, third = policy.preview()
        assert 1 <= first <= 2.5
        assert 2 <= second <= 2.5
        assert third == 2.5


def test_only_named_errors_are_retried() -> None:
    """A type, a tuple, subclasses."""
    policy = Retry(on=(ConnectionError, KeyError), wait_jitter=0)
    assert policy.next_wait(ConnectionResetError(), 1) == 1
    assert policy.next_wait(KeyError(), 1) == 1
    assert policy.next_wait(ValueError(), 1) is None


def test_a_function_may_decide_and_may_name_the_wait() -> None:
    """A server's Retry-After, bounded by wait_max."""

    def busy(error: BaseException) -> Any:
        return {"no": False, "yes": True, "10": 10, "td": timedelta(seconds=20), "long": 1e6}[str(error)]

    policy = Retry(on=busy, wait_initial=3, wait_jitter=0)
    assert [policy.next_wait(Exception(word), 1) for word in ("no", "yes", "10", "td", "long")] == [
        None,
        3,
        10,
        20,
        300,
    ]


def test_a_wait_of_zero_named_by_the_function_is_a_wait() -> None:
    """Zero is a value: at once, not never."""
    policy = Retry(on=lambda _: 0.0)
    assert policy.next_wait(Exception(), 1) == 0


def test_timeout_bounds_the_whole_story() -> None:
    """No attempt begins after it."""
    policy = Retry(on=ValueError, timeout=timedelta(seconds=10), wait_initial=4, wait_jitter=0)
    assert policy.next_wait(ValueError(), 1, elapsed=5) == 4
    assert policy.next_wait(ValueError(), 1, elapsed=7) is None


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"wait_initial": -1}, {"wait_exp_base": 0}, {"on": ()}, {"wait_max": timedelta(-1)}]
)
def test_numbers_without_sense_are_refused(options: dict[str, Any]) -> None:
    """At definition, by name."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retry(**{"on": ValueError, **options})


@pytest.mark.parametrize(
    "wrong",
    [
        {"on": int},
        {"on": (ValueError, lambda error: True)},
        {"on": ()},
        {"on": "ValueError"},
        {"attempts": 2.5},
        {"attempts": True},
        {"timeout": -1},
        {"timeout": "10"},
        {"wait_initial": float("nan")},
        {"wait_max": float("inf")},
        {"wait_max": 1e14},
        {"wait_initial": timedelta.max},
        {"timeout": 1e14},
        {"wait_exp_base": 0},
        {"wait_exp_base": "2"},
    ],
)
def test_what_could_only_fail_in_a_worker_is_refused_at_once(wrong: dict[str, Any]) -> None:
    """A wait that is no number would replace the task's own error, the first time that it fails."""
    with pytest.raises(ConfigurationError, match="Retry"):
        Retry(**{"on": ValueError, **wrong})


def test_a_function_that_ends_without_a_word_says_no() -> None:
    """Python's functions return None where nobody thought of the case."""
    assert Retry(on=lambda error: None).next_wait(ValueError(), 1) is None  # type: ignore[arg-type, return-value]


def test_a_place_to_wait_that_does_not_exist_is_refused() -> None:
    """There are two."""
    with pytest.raises(ConfigurationError, match="where"):
        Retry(on=ValueError, where="moon")  # type: ignore[arg-type]
