"""Which tasks do the contracts send? The same functions, declared on the tests' bridge and on a worker's."""

# long because: each behaviour needs tasks of its own, and workers import one module.

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from uuid import UUID

from annotated_types import Ge
from pydantic import BaseModel, Field

from qbridge import Bridge, Retry, TaskContext
from qbridge.testing.contract_app.values import ANNOTATIONS, Ticket

__all__ = ["OutOfStock", "Refused", "Seen", "declare", "runs"]

_bridges: weakref.WeakSet[Bridge] = weakref.WeakSet()
_DECLARED: list[tuple[Callable[..., Any], dict[str, Any]]] = []
_MODULE = __name__

#: Seconds after which a task that waits for a file gives up.
_PATIENCE = 60.0


def task(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Remember a function and its options for ``declare``."""

    def remember(function: Callable[..., Any]) -> Callable[..., Any]:
        _DECLARED.append((function, options))
        return function

    return remember


def declare(bridge: Bridge) -> SimpleNamespace:
    """Declare every task on a bridge.

    Returns:
        The tasks by the names of their functions; those that echo a value are called ``echo_`` and a name of
        ``ANNOTATIONS``.
    """
    _bridges.add(bridge)
    made: dict[str, Any] = {}
    claims = bridge.config.results.capabilities.claims
    for function, options in _DECLARED:
        if "unique" in options and not claims:
            continue  # refused there
        made[function.__name__] = bridge.task(**options)(function)
    for name, (annotation, _) in ANNOTATIONS.items():
        made[f"echo_{name}"] = bridge.task(_echo(f"echo_{name}", annotation))
    return SimpleNamespace(**made)


def _echo(name: str, annotation: Any) -> Callable[..., Any]:
    def echo(value: Any) -> Any:
        return value

    echo.__name__ = echo.__qualname__ = name
    echo.__module__ = _MODULE
    echo.__annotations__ = {"value": annotation, "return": annotation}
    return echo


def _note(path: str, what: object = "") -> None:
    """Add a line to a file that every process may write to: how tests count runs."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {time.time()} {what}\n")


def runs(path: Path) -> list[tuple[int, float, str]]:
    """Return pid, time and word of each run that was noted in a file."""
    if not path.exists():
        return []
    lines = [line.split(" ", 2) for line in path.read_text().splitlines()]
    return [(int(pid), float(when), word.strip()) for pid, when, word in lines]


def _wait_for(*paths: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not any(Path(path).exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {paths[0]}")
        time.sleep(0.01)


# -- signatures


@task()
def add(a: int, b: int = 10) -> int:
    """Add two numbers."""
    return a + b


@task()
def everything(
    first: int, /, second: str, *rest: float, flag: bool = False, limit: Annotated[int, Ge(1)] = 5, **others: UUID
) -> dict[str, Any]:
    """Take parameters of every kind and say how they arrived."""
    return {
        "first": first,
        "second": second,
        "rest": [type(one).__name__ for one in rest],
        "flag": flag,
        "limit": limit,
        "others": {name: f"{type(value).__name__} {value}" for name, value in others.items()},
    }


@task()
def total(tickets: list[Ticket], *, extra: dict[str, Ticket] | None = None) -> str:
    """Prove that models arrive as models."""
    every = [*tickets, *(extra or {}).values()]
    return str(sum(ticket.price for ticket in every))


@task()
def typed_values(value: dict[str, Any]) -> dict[str, Any]:
    """Return a dict that looks like one of kombu's typed values."""
    return {"__type__": "uuid", "__value__": "not one", "got": value}


@task(strict=False)
def lenient(number: int) -> int:
    """Take what pydantic can make a number of."""
    return number


@task(name="contracts.renamed")
def renamed(value: int) -> int:
    """Have a name of its own."""
    return -value


# -- results that are wrong


@task()
def wrong_result(how: str) -> int:
    """Return what is not declared."""
    return how  # type: ignore[return-value]  # pyright: ignore[reportReturnType]  # what it is for


@task()
def long_text(size: int) -> str:
    """Return a text of a given size."""
    return "x" * size


@task()
def size_of(text: str) -> int:
    """Take a long text."""
    return len(text)


# -- failures


class OutOfStock(Exception):
    """An error of the user's, made from positional arguments."""

    def __init__(self, item: str, left: int) -> None:
        super().__init__(item, left)
        self.item = item
        self.left = left


class Refused(Exception):
    """An error that cannot be rebuilt from its ``args``."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"refused with {code}")
        self.code = code


class Misfit(ValueError):
    """The same, of a builtin type that could be."""

    def __init__(self, *, size: int) -> None:
        super().__init__(f"does not fit {size}")


class Seen(BaseModel):
    """What a model says of a wrong value."""

    width: Annotated[int, Field(gt=0)]


@task()
def fail(how: str) -> int:
    """End in an error."""
    if how == "builtin":
        raise KeyError("no such thing")
    if how == "arguments":
        raise ValueError("two", 2)
    if how == "os":
        raise FileNotFoundError(2, "No such file or directory", "/nowhere")
    if how == "own":
        raise OutOfStock("lamp", 3)
    if how == "keyword":
        raise Refused(code=42)
    if how == "keyword_of_builtin":
        raise Misfit(size=7)
    if how == "validation":
        Seen(width=-1)
    raise AssertionError(how)


@task(retry=Retry(on=OutOfStock, attempts=3, wait_initial=0.1, wait_exp_base=1.0, wait_jitter=0.0))
def try_again(path: str, succeed_at: int) -> int:
    """Fail until the given run."""
    _note(path)
    number = len(runs(Path(path)))
    if number < succeed_at:
        raise OutOfStock("lamp", number)
    return number


@task(retry=Retry(on=OutOfStock, attempts=2, wait_initial=2, wait_jitter=0.0))
def try_again_later(path: str) -> int:
    """Fail in the first run, and take a while to try again."""
    _note(path)
    number = len(runs(Path(path)))
    if number == 1:
        raise OutOfStock("lamp", number)
    return number


@task(context=True, retry=Retry(on=OutOfStock, attempts=3, wait_initial=0.1, wait_exp_base=1.0, wait_jitter=0.0))
def attempts(ctx: TaskContext, path: str) -> list[str]:
    """Note the number of each attempt, and fail until the last."""
    _note(path, f"{ctx.attempt} {ctx.is_last_attempt}")
    if not ctx.is_last_attempt:
        raise OutOfStock("lamp", ctx.attempt)
    return [word for _, _, word in runs(Path(path))]


# -- context


@task(context=True)
def who(ctx: TaskContext) -> dict[str, Any]:
    """Say what the context says."""
    return {"id": ctx.task_id, "attempt": ctx.attempt, "queue": ctx.queue, "headers": dict(ctx.headers)}


@task(context=True)
def report(ctx: TaskContext, release: str) -> int:
    """Report progress and wait to be released."""
    ctx.progress(3, 10, "a third")
    _wait_for(release)
    return 10


@task()
def wait_inside() -> int:
    """Wait for another task, which is refused."""
    if not _bridges:
        raise LookupError("no bridge declared this task")
    result: int = next(iter(_bridges)).send(f"{_MODULE}.add", (1, 2)).get(timeout=5)
    return result


# -- where and when


@task()
def note(path: str, word: str = "") -> str:
    """Leave a trace of the run."""
    _note(path, word)
    return word


@task(results=False)
def jot(path: str) -> None:
    """Leave a trace of the run, and no result: how fast a worker is without a result backend."""
    _note(path)


@task(queue="slow")
def on_slow(path: str) -> str:
    """Run from the queue ``slow``."""
    _note(path, "slow")
    return "slow"


@task(queue="reports.slow")
def on_reports_slow(path: str) -> str:
    """Run from the queue ``reports.slow``."""
    _note(path, "reports.slow")
    return "reports.slow"


@task(results=False)
def silent(path: str) -> int:
    """Store no result."""
    _note(path)
    return 1


@task()
def hold(path: str, release: str) -> int:
    """Note the run, wait to be released, and say how many runs there were."""
    _note(path)
    _wait_for(release)
    return len(runs(Path(path)))


@task(context=True)
def fenced(ctx: TaskContext, path: str, release: str) -> list[int]:
    """Note the fencing token, wait to be released (all runs, or this process's), and return the tokens so far."""
    _note(path, str(ctx.fencing_token))
    _wait_for(release, f"{release}-{os.getpid()}")
    return [int(word) for _, _, word in runs(Path(path))]


@task(context=True)
def patient(ctx: TaskContext, path: str) -> None:
    """Go on until it is revoked."""
    _note(path)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        ctx.check()
        time.sleep(0.01)


@task(unique=True)
def alone(path: str, release: str) -> int:
    """Be queued or running once at a time."""
    _note(path)
    _wait_for(release)
    return len(runs(Path(path)))


@task(unique=lambda arguments: str(arguments["path"]))
def one_per_path(path: str, word: str) -> str:
    """Be queued or running once at a time for each path."""
    _note(path, word)
    return word


@task()
def nap(path: str, seconds: float) -> float:
    """Note the run, sleep, and note the end."""
    _note(path, "begin")
    time.sleep(seconds)
    _note(path, "end")
    return seconds


@task()
def kill_child(path: str, times: int) -> int:
    """Kill the process that runs it, as the kernel does when memory runs out."""
    _note(path)
    number = len(runs(Path(path)))
    if number <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@task(delivery="at_most_once", results=False)
def kill_once(path: str) -> None:
    """Kill the process that runs it; nobody is to run it again."""
    _note(path)
    os.kill(os.getpid(), signal.SIGKILL)


@task(context=True, retry=Retry(on=OutOfStock, attempts=2, wait_initial=1.5, wait_jitter=0.0))
def kill_child_then_fail(ctx: TaskContext, path: str) -> int:
    """Kill the process in the first run, fail in the second, and say which attempt the third is."""
    _note(path, str(ctx.attempt))
    number = len(runs(Path(path)))
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise OutOfStock("lamp", number)
    return ctx.attempt


# -- async


@task()
async def shout(text: str, pause: float = 0.01) -> str:
    """Be a coroutine."""
    await asyncio.sleep(pause)
    return text.upper()


@task()
async def async_fail() -> None:
    """Fail in a coroutine."""
    await asyncio.sleep(0)
    raise OutOfStock("lamp", 0)


@task(context=True)
async def loop_of(ctx: TaskContext) -> tuple[int, int, int]:
    """Say which process, thread and event loop it runs in."""
    return os.getpid(), threading.get_ident(), id(asyncio.get_running_loop())
