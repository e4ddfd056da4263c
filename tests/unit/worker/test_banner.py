"""What a worker says about its tasks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from qbridge import TaskContext
from qbridge.task import TaskSet
from qbridge.worker.banner import signature_text


class Order(BaseModel):
    item: str


def plain(a: int, *rest: str, when: dt.date | None = None) -> list[Order]: ...


def quoted(kind: Literal["a.b"] = "a.b", long: str = "x" * 50) -> None: ...


def bare(a, b=1): ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (plain, "(a: int, *rest: str, when: date | None = None) -> list[Order]"),
        (quoted, "(kind: Literal['a.b'] = 'a.b', long: str = …) -> None"),
        (bare, "(a, b=1)"),
    ],
)
def test_signatures_are_short(function: Callable[..., Any], text: str) -> None:
    """No modules, no quotes around annotations, no long defaults."""
    assert signature_text(TaskSet().task(function).definition) == text


def test_the_context_is_left_out() -> None:
    """Callers do not pass it."""
    tasks = TaskSet()

    @tasks.task(context=True)
    def crunch(run: TaskContext, rows: list[int]) -> int: ...

    assert signature_text(crunch.definition) == "(rows: list[int]) -> int"
