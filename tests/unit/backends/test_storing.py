"""Who waits for a result backend that is away, who gives the message back, and who gets the error?"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import _state
from kombu.exceptions import EncodeError

from qbridge import WorkerConfig
from qbridge.backends import storing
from qbridge.backends.storing import KeepsOutcomes, OutcomeNotStored
from qbridge.testing.waiting import wait_until


class Store:
    """A backend that takes nothing while ``error`` is set."""

    def __init__(self) -> None:
        self.error: Exception | None = ConnectionError("refused")
        self.stored: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self.tries = 0

    def store_result(self, task_id: str, result: Any, state: str, *rest: Any, **kwargs: Any) -> Any:
        self.tries += 1
        if self.error is not None:
            raise self.error
        self.stored.append((task_id, state))
        return result

    def mark_as_failure(self, task_id: str, exc: BaseException, **kwargs: Any) -> None:
        self.failures.append(task_id)


class Backend(KeepsOutcomes, Store):
    """The same, as ours are made."""

    def __init__(self, *, loop: bool, patience: float = 30.0, safe: bool = True) -> None:
        super().__init__()
        here = (os.getpid(), threading.get_ident())
        self.app: Any = SimpleNamespace(
            safe=safe, worker_loop=here if loop else None, worker_config=WorkerConfig(store_timeout=patience)
        )


RUN = SimpleNamespace(is_eager=False, called_directly=False)


@pytest.fixture
def running() -> Iterator[None]:
    """As in a task that a worker runs."""
    _state._task_stack.push(SimpleNamespace(name="a"))
    yield
    _state._task_stack.pop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storing, "_LONGEST_PAUSE", 0.01)


@pytest.mark.usefixtures("running")
def test_a_run_waits_until_its_outcome_is_taken() -> None:
    """It keeps its slot meanwhile."""
    backend = Backend(loop=False)
    threading.Timer(0.1, setattr, (backend, "error", None)).start()
    assert backend.store_result("t", 42, "SUCCESS", request=RUN) == 42
    assert backend.stored == [("t", "SUCCESS")]
    assert backend.tries > 2


@pytest.mark.usefixtures("running")
def test_a_run_whose_patience_ends_gives_its_message_back() -> None:
    """And the task did not fail: nothing of that is stored when it can be again."""
    backend = Backend(loop=False, patience=0.05)
    with pytest.raises(OutcomeNotStored, match="task t is not stored: ConnectionError") as caught:
        backend.store_result("t", 42, "SUCCESS", request=RUN)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    backend.error = None
    backend.mark_as_failure("t", again, request=RUN)
    backend.mark_as_failure("u", ValueError(), request=RUN)
    assert (backend.stored, backend.failures) == ([], ["u"])


@pytest.mark.usefixtures("running")
def test_a_run_in_the_loop_does_not_wait() -> None:
    """The connection to the broker would starve."""
    backend = Backend(loop=True)
    with pytest.raises(OutcomeNotStored):
        backend.store_result("t", 42, "FAILURE", request=RUN)
    assert backend.tries == 1


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("state", ["STARTED", "PROGRESS", "RETRY"])
def test_a_state_on_the_way_is_not_worth_waiting(state: str) -> None:
    """The run goes on without."""
    backend = Backend(loop=False)
    assert backend.store_result("t", {"pid": 1}, state, request=RUN) == {"pid": 1}
    assert backend.tries == 1


@pytest.mark.usefixtures("running")
def test_a_value_that_cannot_be_stored_is_the_tasks_failure() -> None:
    """Waiting would not mend it."""
    backend = Backend(loop=False)
    backend.error = EncodeError("set is not JSON serializable")
    with pytest.raises(EncodeError):
        backend.store_result("t", {1}, "SUCCESS", request=RUN)


def test_the_loop_has_a_failure_stored_later() -> None:
    """Of a task whose process died: nobody waits, and nothing is lost."""
    backend = Backend(loop=True)
    backend.store_result("t", ValueError(), "FAILURE", request=RUN)
    backend.store_result("u", ValueError(), "FAILURE", request=RUN)
    assert backend.stored == []
    backend.error = None
    wait_until(lambda: len(backend.stored) == 2, what="both to be stored")
    assert backend.stored == [("t", "FAILURE"), ("u", "FAILURE")]


def test_who_is_no_worker_gets_the_error() -> None:
    """A web process must not wait for minutes."""
    backend = Backend(loop=False)
    with pytest.raises(ConnectionError):
        backend.store_result("t", 42, "SUCCESS", request=RUN)


@pytest.mark.usefixtures("running")
def test_under_celerys_defaults_it_is_celerys_way() -> None:
    """One try, and the error."""
    backend = Backend(loop=False, safe=False)
    with pytest.raises(ConnectionError):
        backend.store_result("t", 42, "SUCCESS", request=RUN)
    assert backend.tries == 1
