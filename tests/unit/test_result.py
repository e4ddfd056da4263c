"""Handles on results: values, errors, and what cannot be rebuilt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from qbridge import ConfigurationError, Progress, ResultUnknown, TaskFailed, TaskResult, TaskRevoked


class Stored:
    """A reader with one stored outcome."""

    default_timeout = 1.0

    def __init__(self, **meta: Any) -> None:
        self.meta = {"status": "SUCCESS", **meta}
        self.looks = 0

    def look(self, task_id: str) -> Mapping[str, Any]:
        self.looks += 1
        return self.meta

    def wait(self, task_id: str, timeout: float) -> Mapping[str, Any]:
        return self.look(task_id)

    async def wait_async(self, task_id: str, timeout: float) -> Mapping[str, Any]:
        return self.look(task_id)

    async def look_async(self, task_id: str) -> Mapping[str, Any]:
        return self.look(task_id)

    def forget(self, task_id: str) -> None: ...

    def revoke(self, task_id: str, *, terminate: bool) -> None: ...


class KeywordOnly(Exception):
    """An error that its arguments cannot rebuild."""

    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


class Changing(Exception):
    """An error whose text depends on more than its arguments."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = "local"

    def __str__(self) -> str:
        return f"{self.args} {self.extra}"


def handle(**meta: Any) -> TaskResult[Any]:
    return TaskResult("id-1", Stored(**meta), lambda value: value, "shop.add")


def failed(module: str, name: str, args: list[Any], text: str | None = None) -> TaskResult[Any]:
    error = {"exc_module": module, "exc_type": name, "exc_message": args}
    if text is not None:
        error["exc_text"] = text
    return handle(status="FAILURE", result=None, error_json=error, traceback="Traceback …")


def test_value_is_decoded_from_the_stored_json() -> None:
    """Not from Celery's reading of it."""
    assert handle(result_json=3, result="revived").get() == 3


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e300, timedelta.max])
def test_a_wait_without_an_end_is_refused(timeout: Any) -> None:
    """Not by an OverflowError from within it; by name, with and without an event loop."""
    with pytest.raises(ConfigurationError, match="timeout="):
        handle(result_json=3).get(timeout=timeout)
    with pytest.raises(ConfigurationError, match="timeout="):
        asyncio.run(handle(result_json=3).aget(timeout=timeout))


def test_outcome_is_read_once() -> None:
    """A handle remembers."""
    reader = Stored(result_json=3)
    result = TaskResult("id-1", reader, lambda value: value)
    assert (result.get(), result.get(), result.state, result.ready()) == (3, 3, "SUCCESS", True)
    assert reader.looks == 1


def test_remote_error_is_raised_as_its_own_type_with_the_remote_traceback() -> None:
    """Builtin and imported types."""
    with pytest.raises(KeyError, match="x") as caught:
        failed("builtins", "KeyError", ["x"], "'x'").get()
    assert isinstance(caught.value.__cause__, TaskFailed)
    assert caught.value.__cause__.remote_traceback == "Traceback …"


@pytest.mark.parametrize(
    ("module", "name", "args", "text"),
    [
        (__name__, "KeywordOnly", [3], "3"),
        (__name__, "Changing", ["x"], "('x',) remote"),
        ("nowhere.at.all", "Gone", ["x"], "x"),
        ("os", "system", ["true"], "true"),
        ("builtins", "SystemExit", [1], "1"),
        ("builtins", "print", ["x"], "x"),
    ],
)
def test_error_that_cannot_be_rebuilt_safely_is_described(module: str, name: str, args: list[Any], text: str) -> None:
    """Nothing degrades to a bare Exception, and stored data never decides what is called."""
    with pytest.raises(TaskFailed) as caught:
        failed(module, name, args, text).get()
    assert caught.value.type_name.endswith(name)
    assert caught.value.message == text
    assert caught.value.task_id == "id-1"


def test_revoked_task_says_so() -> None:
    """Instead of a value."""
    with pytest.raises(TaskRevoked, match="id-1"):
        handle(status="REVOKED").get()


def test_progress_is_what_the_task_said() -> None:
    """And None for everything else."""
    assert handle(status="PROGRESS", result_json={"done": 1, "total": 4}).progress() == Progress(1, 4)
    assert handle(status="PROGRESS", result_json="other").progress() is None
    assert handle(status="STARTED").progress() is None
    assert Progress(1, 4).fraction == 0.25


def test_forgotten_result_is_unknown() -> None:
    """Not pending for ever."""
    result = handle(result_json=3)
    result.forget()
    with pytest.raises(ResultUnknown):
        result.get()


def test_result_gives_value_error_or_none() -> None:
    """A look that never raises the task's error."""
    assert handle(result_json=3).result == 3
    assert isinstance(failed("builtins", "ValueError", ["x"], "x").result, ValueError)
    assert handle(status="PENDING").result is None


def test_states_are_celerys() -> None:
    """Tools expect them."""
    result = failed("builtins", "ValueError", ["x"])
    assert (result.state, result.ready(), result.successful(), result.failed()) == ("FAILURE", True, False, True)
    assert result.traceback == "Traceback …"
