"""What does a caller see of a task that fails, is tried again, or is never run?"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qbridge import ResultsUnavailable, ResultTimeout, ResultUnknown, TaskFailed, TaskRevoked
from qbridge.testing.contract_app.tasks import OutOfStock, runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until


@pytest.mark.parametrize(
    ("how", "kind", "args"),
    [
        ("builtin", KeyError, ("no such thing",)),
        ("arguments", ValueError, ("two", 2)),
        ("os", FileNotFoundError, (2, "No such file or directory")),
        ("own", OutOfStock, ("lamp", 3)),
    ],
)
def test_an_error_arrives_as_its_own_type(
    qbridge_contract: Contract, how: str, kind: type[Exception], args: tuple[Any, ...]
) -> None:
    """Builtin errors and the user's own are rebuilt at the caller, with the remote traceback beside them."""
    result = qbridge_contract.tasks.fail.delay(how)
    with pytest.raises(kind) as caught:
        result.get(timeout=20)
    assert type(caught.value) is kind
    assert caught.value.args == args
    assert getattr(caught.value, "filename", None) == ("/nowhere" if how == "os" else None)
    assert isinstance(caught.value.__cause__, TaskFailed)
    assert "in fail" in caught.value.__cause__.remote_traceback
    assert result.failed()
    assert not result.successful()


@pytest.mark.parametrize(
    ("how", "type_name", "text"),
    [
        ("keyword", "tasks.Refused", "refused with 42"),
        ("keyword_of_builtin", "tasks.Misfit", "does not fit 7"),
        ("validation", "ValidationError", "width"),
    ],
)
def test_an_error_that_cannot_be_rebuilt_arrives_as_task_failed(
    qbridge_contract: Contract, how: str, type_name: str, text: str
) -> None:
    """Its type, text and traceback are there; nothing degrades to a bare Exception."""
    result = qbridge_contract.tasks.fail.delay(how)
    with pytest.raises(TaskFailed) as caught:
        result.get(timeout=20)
    assert caught.value.type_name.endswith(type_name)
    assert text in caught.value.message
    assert "in fail" in caught.value.remote_traceback
    assert result.id == caught.value.task_id


def test_an_async_task_fails_like_any_other(qbridge_contract: Contract) -> None:
    """An error raised in a coroutine arrives as its own type."""
    with pytest.raises(OutOfStock):
        qbridge_contract.tasks.async_fail.delay().get(timeout=20)


def test_a_retried_task_runs_until_it_succeeds(qbridge_contract: Contract) -> None:
    """A task with a Retry runs again after the errors that it names."""
    path = qbridge_contract.path()
    assert qbridge_contract.tasks.try_again.delay(str(path), 3).get(timeout=30) == 3
    assert len(runs(path)) == 3


def test_a_task_that_waits_for_its_next_attempt_says_so(qbridge_contract: Contract) -> None:
    """State RETRY, with the number of the attempt that failed, the time of the next, and the error; then the result."""
    path = qbridge_contract.path()
    result = qbridge_contract.tasks.try_again_later.delay(str(path))
    if qbridge_contract.bridge.config.results.capabilities.progress:
        wait_until(lambda: result.state == "RETRY", 20, what="the retry")
        told = result.retrying()
        assert told is not None
        assert told.attempt == 1
        assert "OutOfStock" in told.error
        assert abs((told.next_at - datetime.now(UTC)).total_seconds()) < 20
    assert result.get(timeout=30) == 2
    assert result.retrying() is None


def test_the_last_error_arrives_when_the_attempts_are_used_up(qbridge_contract: Contract) -> None:
    """``attempts`` counts the first run; afterwards the caller gets the last error, and the message is kept."""
    path = qbridge_contract.path()
    result = qbridge_contract.tasks.try_again.delay(str(path), 100)
    with pytest.raises(OutOfStock) as caught:
        result.get(timeout=30)
    assert caught.value.left == 3
    assert len(runs(path)) == 3
    assert result.state == "FAILURE"
    letter = qbridge_contract.dead_letter_of(result.id)
    assert (letter.reason, letter.attempts, letter.error_type) == ("exhausted", 3, "OutOfStock")
    assert [gone.id for gone in qbridge_contract.bridge.dead_letters.discard(letter.id)] == [letter.id]


def test_a_task_knows_which_attempt_it_is(qbridge_contract: Contract) -> None:
    """``ctx.attempt`` begins with 1, and ``ctx.is_last_attempt`` is true in the last one only."""
    path = qbridge_contract.path()
    assert qbridge_contract.tasks.attempts.delay(str(path)).get(timeout=30) == ["1 False", "2 False", "3 True"]


def test_an_expired_task_is_not_run(qbridge_contract: Contract) -> None:
    """A task that nobody took before it expired, or before its deadline, raises TaskRevoked at the caller."""
    contract = qbridge_contract
    path = contract.path()
    contract.purge("idle")
    result = contract.tasks.note.using(queue="idle", expires=0.2).delay(str(path))
    late = contract.tasks.note.using(queue="idle", deadline=timedelta(seconds=0.2)).delay(str(path))
    good = contract.tasks.add.using(queue="idle", expires=60, deadline=timedelta(seconds=60)).delay(1)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 0.3, what="the task to expire")
    with contract.bridge.worker(pool="solo", queues=["idle"]):
        assert good.get(timeout=20) == 11
        for unwanted in (result, late):
            with pytest.raises(TaskRevoked):
                unwanted.get(timeout=20)
    assert runs(path) == []


def test_a_revoked_task_is_not_run(qbridge_contract: Contract) -> None:
    """A task revoked while it waits in the queue of a busy worker raises TaskRevoked at the caller."""
    contract = qbridge_contract
    busy, revoked, release = contract.path(), contract.path(), contract.path("release")
    with contract.bridge.worker(pool="thread", concurrency=1, queues=["inside"]):
        first = contract.tasks.hold.using(queue="inside").delay(str(busy), str(release))
        second = contract.tasks.note.using(queue="inside").delay(str(revoked))
        wait_until(lambda: runs(busy), 20, what="the first task to run")
        second.revoke()
        contract.wait_for_revoke(second.id)
        release.touch()
        assert first.get(timeout=20) == 1
        with pytest.raises(TaskRevoked):
            second.get(timeout=20)
    assert runs(revoked) == []


def test_a_forgotten_result_is_unknown(qbridge_contract: Contract) -> None:
    """After ``forget`` the result is gone, and asking for it says so at once."""
    result = qbridge_contract.tasks.add.delay(1, 2)
    assert result.get(timeout=20) == 3
    result.forget()
    began = time.monotonic()
    with pytest.raises(ResultUnknown):
        result.get(timeout=20)
    assert time.monotonic() - began < 5


def test_get_ends_when_its_time_is_up(qbridge_contract: Contract) -> None:
    """``get`` of a task that nobody runs raises ResultTimeout after its timeout, not before and not much later."""
    contract = qbridge_contract
    result = contract.tasks.add.using(queue="fragile").delay(1)
    began = time.monotonic()
    with pytest.raises(ResultTimeout) as caught:
        result.get(timeout=0.4)
    waited = time.monotonic() - began
    contract.purge("fragile")
    assert 0.4 <= waited < 3
    assert caught.value.task_id == result.id
    assert isinstance(caught.value, TimeoutError)
    assert not result.ready()


def test_a_task_without_results_runs_and_says_that_there_are_none(qbridge_contract: Contract) -> None:
    """``results=False``: the task runs, nothing is stored, and ``get`` says so at once."""
    path = qbridge_contract.path()
    result = qbridge_contract.tasks.silent.delay(str(path))
    with pytest.raises(ResultsUnavailable, match="results=False"):
        result.get(timeout=20)
    wait_until(lambda: runs(path), 20, what="the task to run")
