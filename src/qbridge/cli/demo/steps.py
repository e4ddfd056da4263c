"""What does the demo show? Each step sends real tasks and compares what came back with what it expected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

from celery.signals import before_task_publish

from qbridge.cli.demo.telling import Teller
from qbridge.cli.demo.worker_process import WorkerDied
from qbridge.exceptions import ArgumentsError, ResultTimeout, TaskFailed
from qbridge.result import TaskResult

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["STEPS", "Row", "Scene", "Step"]

T = TypeVar("T")

BULK = 500
BOXES = 20


@dataclass(frozen=True)
class Row:
    """A line of the final table.

    Args:
        shown: what was shown.
        expected: what had to come.
        seen: what came.
        seconds: that it took.
    """

    shown: str
    expected: str
    seen: str
    seconds: float
    truth: bool | None = None

    @property
    def true(self) -> bool:
        """Whether it came as expected."""
        return self.expected == self.seen if self.truth is None else self.truth


class Scene:
    """What a step has at hand.

    Args:
        tasks: the module with the bridge and its tasks; imported only after the environment was prepared.
        teller: prints.
        deadline: ``time.monotonic()`` at which everything must be over.
        refuse_dead: raises if the worker is gone.
    """

    def __init__(
        self, tasks: ModuleType, teller: Teller, deadline: float, refuse_dead: Callable[[], None] = lambda: None
    ) -> None:
        self.tasks: Any = tasks
        self.teller = teller
        self.refuse_dead = refuse_dead
        self._deadline = deadline
        self.sent: list[TaskResult[Any]] = []

    @property
    def left(self) -> float:
        """Seconds that are left, at least a few hundredths."""
        return max(0.05, self._deadline - time.monotonic())

    def keep(self, result: TaskResult[T]) -> TaskResult[T]:
        """Remember a result, to be deleted at the end."""
        self.sent.append(result)
        return result

    def wait(self, result: TaskResult[T]) -> T:
        """Return the value once it is there, looking after the worker meanwhile.

        Raises:
            WorkerDied: if there is no worker any more.
            ResultTimeout: if time is up.
        """
        while True:
            left = self.left
            try:
                return result.get(timeout=min(1.0, left))
            except ResultTimeout:
                self.refuse_dead()
                if left <= 1.0:
                    raise


Step = Callable[[Scene], Row]
"""Its docstring is its heading."""


@contextmanager
def _clock() -> Iterator[Callable[[], float]]:
    start = time.monotonic()
    yield lambda: time.monotonic() - start


def _fault(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _listed(lengths: dict[str, int]) -> str:
    return ", ".join(f"{page} {length}" for page, length in lengths.items())


def typed(scene: Scene) -> Row:
    """A typed task."""
    tasks, tell = scene.tasks, scene.teller
    order = tasks.Order(item="tea", quantity=3, price=Decimal("2.40"))
    tell.code("quote.delay(Order(item='tea', quantity=3, price=Decimal('2.40'))).get()")
    with _clock() as passed:
        answer = scene.wait(scene.keep(tasks.quote.delay(order)))
    tell.result(repr(answer))
    expected = tasks.Quote(item="tea", total=Decimal("7.20"))
    seen = f"{type(answer).__name__}, total {answer.total}"
    return Row("model in, model out", f"Quote, total {expected.total}", seen, passed(), answer == expected)


def refused(scene: Scene) -> Row:
    """A wrong argument, refused where it was written."""
    tell = scene.teller
    published: list[str] = []

    def count(sender: str = "", **_: Any) -> None:
        published.append(sender)

    before_task_publish.connect(count, weak=False)
    tell.code("add.delay('one', 2)")
    seen = "no error"
    with _clock() as passed:
        try:
            scene.keep(scene.tasks.add.delay("one", 2))
        except ArgumentsError as error:
            seen = f"refused, {len(published)} sent"
            tell.error(_fault(error))
        finally:
            before_task_publish.disconnect(count)
    return Row("wrong argument", "refused, 0 sent", seen, passed())


def failing(scene: Scene) -> Row:
    """A failure that arrives as itself."""
    tasks, tell = scene.tasks, scene.teller
    expected = tasks.OutOfStock("tea", 2)
    tell.code("reserve.delay('tea', 3).get()")
    seen: str = "no error"
    true = False
    with _clock() as passed:
        try:
            scene.wait(scene.keep(tasks.reserve.delay("tea", 3)))
        except tasks.OutOfStock as error:
            remote = error.__cause__
            trace = remote.remote_traceback if isinstance(remote, TaskFailed) else ""
            seen, true = repr(error), (error.item, error.left) == (expected.item, expected.left) and bool(trace)
            tell.error(_fault(error))
            tell.traceback(trace)
    return Row("own exception type", repr(expected), seen, passed(), true)


def retried(scene: Scene) -> Row:
    """A task that is tried again."""
    tell = scene.teller
    tell.code("@bridge.task(retry=Retry(on=ConnectionError, attempts=5, wait_initial=0.2))")
    tell.code("call_carrier.delay().get()")
    with _clock() as passed:
        attempt = scene.wait(scene.keep(scene.tasks.call_carrier.delay()))
    tell.result(f"attempt {attempt} got through")
    return Row("retries", "attempt 3", f"attempt {attempt}", passed())


def asynchronous(scene: Scene) -> Row:
    """An async task, awaited."""
    tell = scene.teller
    pages = ["tea", "coffee"]
    tell.code(f"await (await fetch.adelay({pages!r}))")

    async def ask() -> dict[str, int]:
        handle = scene.keep(await scene.tasks.fetch.adelay(pages))
        answer: dict[str, int] = await handle.aget(timeout=min(10.0, scene.left))
        return answer

    with _clock() as passed:
        answer = asyncio.run(ask())
    tell.result(repr(answer))
    return Row("async def, await", _listed({page: len(page) for page in pages}), _listed(answer), passed())


def followed(scene: Scene) -> Row:
    """Progress, followed live."""
    tell = scene.teller
    tell.code(f"r = count_shelf.delay({BOXES}); r.progress()")
    steps: list[float] = []
    with _clock() as passed:
        handle = scene.keep(scene.tasks.count_shelf.delay(BOXES))
        with tell.bars() as bars:
            bar = bars.add_task("counting boxes", total=BOXES)
            while not handle.ready() and scene.left > 0.1:
                now = handle.progress()
                if now is not None and (not steps or now.done != steps[-1]):
                    steps.append(now.done)
                    bars.update(bar, completed=now.done)
                time.sleep(0.02)
                scene.refuse_dead()
            counted = scene.wait(handle)
            bars.update(bar, completed=counted)
    rising = len(steps) > 1 and steps == sorted(steps)
    tell.result(f"{counted} boxes; {len(steps)} different reports on the way")
    seen = f"{'rising' if rising else f'{len(steps)} reports'}, {counted}"
    return Row("progress", f"rising, {BOXES}", seen, passed())


def bulk(scene: Scene) -> Row:
    """Five hundred tasks."""
    tell = scene.teller
    tell.code(f"add.send_many((n, n) for n in range({BULK}))")
    total = 0
    handles: list[TaskResult[int]] = []
    with _clock() as passed, tell.bars() as bars:
        sent, finished = bars.add_task("sent", total=BULK), bars.add_task("finished", total=BULK)
        for start in range(0, BULK, 100):
            handles += scene.tasks.add.send_many((n, n) for n in range(start, start + 100))
            bars.update(sent, completed=len(handles))
        scene.sent += handles
        for handle in handles:
            total += scene.wait(handle)
            bars.advance(finished)
    took = passed()
    tell.result(f"{len(handles)} results, sum {total}, {len(handles) / took:,.0f} per second, there and back")
    return Row(f"{BULK} tasks", f"sum {sum(2 * n for n in range(BULK))}", f"sum {total}", took)


STEPS: tuple[Step, ...] = (typed, refused, failing, retried, asynchronous, followed, bulk)


def told(step: Step, scene: Scene) -> Row:
    """Run one step; what it raises becomes a row that is not true.

    Args:
        step: one of ``STEPS``.
        scene: what it has at hand.
    """
    title = (step.__doc__ or "").rstrip(".")
    scene.teller.chapter(title)
    start = time.monotonic()
    try:
        row = step(scene)
    except WorkerDied:
        raise
    except Exception as error:  # noqa: BLE001 - shown as what was seen
        seen = "nothing in time" if isinstance(error, ResultTimeout) else _fault(error)
        row = Row(title, "no error", seen, time.monotonic() - start, truth=False)
        scene.teller.error(_fault(error))
    return row
