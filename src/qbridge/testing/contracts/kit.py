"""What does a contract need: a bridge with its tasks, worker processes on the same servers, a look at the queues."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery.worker.state import revoked

from qbridge import Bridge, BridgeConfig, DeadLetter, QueueConfig
from qbridge.testing.contract_app import READY
from qbridge.testing.contract_app.tasks import declare
from qbridge.testing.servers import ServerFailed
from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until

__all__ = ["QUEUES", "SHARED", "Blocked", "Contract", "WorkerProcess", "longest_pause", "unblocked"]

#: Queues that the shared worker consumes.
SHARED = ("default", "slow", "reports.slow", "own")
#: Queues that no worker consumes until a contract starts one; ``ranked`` has priorities.
QUEUES = (*SHARED, "idle", "inside", "fragile", "ranked")

#: Crashes that one message survives: few, so that their end is seen soon.
MAX_REDELIVERIES = 2

_START = 60.0
_PROGRAM = "qbridge.testing.contract_app.app"


class WorkerProcess:
    """A worker in a process of its own.

    Args:
        command: program and arguments.
        environment: its whole environment.
        folder: its working directory, with its output in ``worker-*.log``.
    """

    _numbers = count()

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        number = next(self._numbers)
        self.log: Path = folder / f"worker-{number}.log"
        self._ready = folder / f"worker-{number}.ready"
        self.process: ChildProcess = ChildProcess(
            command, log=self.log, env={**environment, READY: str(self._ready)}, cwd=folder
        )

    @property
    def pid(self) -> int:
        """Its process id; a pool's processes are its children."""
        return self.process.pid

    @property
    def name(self) -> str:
        """Its node name; waits until it consumes.

        Raises:
            ServerFailed: if it ends, or does not consume in time; shows its output.
        """

        def ready() -> bool:
            if self.process.exit_code() is not None:
                raise ServerFailed(f"the worker ended with code {self.process.exit_code()}:\n{self.process.tail()}")
            return self._ready.exists() and bool(self._ready.read_text())

        try:
            wait_until(ready, _START, what="the worker to consume")
        except TimeoutError as error:
            raise ServerFailed(f"the worker does not consume after {_START:g} s:\n{self.process.tail()}") from error
        return self._ready.read_text()

    def ask_to_stop(self) -> None:
        """SIGTERM: it takes nothing more, ends what runs, and exits."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """Wait for its end, and return its exit code."""
        wait_until(lambda: self.process.exit_code() is not None, timeout, what="the worker to end")
        code = self.process.exit_code()
        assert code is not None  # waited for
        return code

    def kill(self) -> None:
        """SIGKILL it with its pool's processes."""
        self.process.kill()


class Contract:
    """One broker × result pair: a bridge that sends, and workers.

    Args:
        broker: URL of the broker; nobody else uses this place on it.
        results: URL of the result backend, likewise.
        folder: for files of tests and workers.
    """

    def __init__(self, broker: str, results: str, folder: Path) -> None:
        self._urls = {"broker": broker, "results": results}
        self.folder = folder
        self._paths = count()
        self._bridges: list[Bridge] = []
        self.bridge: Bridge = self.another_bridge()
        self.tasks: SimpleNamespace = declare(self.bridge)
        self._shared: WorkerProcess | None = None

    # -- what it is

    @property
    def broker(self) -> str:
        """Kind of the broker: ``rabbitmq``, ``redis``, ``embedded``."""
        return str(self.bridge.config.broker.kind)

    @property
    def results(self) -> str:
        """Kind of the result backend: ``rpc``, ``redis``, ``database``."""
        return str(self.bridge.config.results.kind)

    @property
    def readable_elsewhere(self) -> bool:
        """Results can be read by id from another process."""
        return self.bridge.config.results.capabilities.readable_elsewhere

    @cached_property
    def server_version(self) -> tuple[int, ...]:
        """Version of a RabbitMQ server; empty elsewhere."""
        if self.broker != "rabbitmq":
            return ()
        with self.bridge.celery.connection_for_read() as connection:
            text = str(connection.connection.server_properties["version"])
        return tuple(int(part) for part in text.partition("-")[0].split(".") if part.isdigit())

    def config(self, **changes: Any) -> BridgeConfig:
        """The configuration of this pair, with changes.

        Args:
            changes: fields of ``BridgeConfig``; a mapping for ``broker`` or ``results`` adds to the URL's.
        """
        values: dict[str, Any] = {
            **self._urls,
            "queues": self._queues(),
            "worker": {"max_redeliveries": MAX_REDELIVERIES, "unknown_task_grace": 0},
            **changes,
        }
        for side, url in self._urls.items():
            if isinstance(changes.get(side), Mapping):
                room: Any = type(getattr(self.bridge.config, side)).from_url(url)
                values[side] = room.model_copy(update=changes[side])
        return BridgeConfig(**values)

    def _queues(self) -> list[QueueConfig]:
        rabbitmq = self._urls["broker"].startswith(("amqp", "pyamqp"))
        # Only classic queues have priorities on RabbitMQ before 4.0, and three levels on any.
        ranked = QueueConfig("ranked", max_priority=9) if rabbitmq else QueueConfig("ranked")
        return [*(QueueConfig(name) for name in QUEUES if name != "ranked"), ranked]

    def another_bridge(self, **changes: Any) -> Bridge:
        """A second bridge on the same servers, without tasks; closed at the end.

        Args:
            changes: as of ``config``.
        """
        bridge = Bridge(self.config(**changes))
        self._bridges.append(bridge)
        return bridge

    def declare_on(self, bridge: Bridge) -> SimpleNamespace:
        """Declare every task on another bridge too."""
        return declare(bridge)

    def path(self, name: str = "runs") -> Path:
        """A path in the folder that nothing has used yet."""
        return self.folder / f"{name}-{next(self._paths)}"

    # -- workers

    def process_environment(self) -> dict[str, str]:
        """The environment of another process whose bridge is configured like this one."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("QBRIDGE_", "CELERY_")) or name.startswith("QBRIDGE_TEST_")
        }
        queues = [queue.model_dump_json(exclude_unset=True) for queue in self._queues()]
        return {
            **kept,
            "QBRIDGE_BROKER": self._urls["broker"],
            "QBRIDGE_RESULTS": self._urls["results"],
            "QBRIDGE_QUEUES": f"[{', '.join(queues)}]",
            "QBRIDGE_WORKER__MAX_REDELIVERIES": str(MAX_REDELIVERIES),
            "QBRIDGE_WORKER__UNKNOWN_TASK_GRACE": "0",
        }

    @property
    def worker(self) -> WorkerProcess:
        """The worker of the ``SHARED`` queues: two processes; started when first asked for."""
        if self._shared is None or self._shared.process.exit_code() is not None:
            self._shared = self._start(SHARED, "process", 2)
            _ = self._shared.name
        return self._shared

    @contextmanager
    def worker_of(
        self,
        *queues: str,
        pool: str = "process",
        concurrency: int = 1,
        celery: Sequence[str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[WorkerProcess]:
        """Another worker process, for the length of a ``with`` block; it consumes when the block begins.

        Args:
            queues: names of the queues that it consumes.
            pool: as in ``WorkerConfig``.
            concurrency: tasks at a time.
            celery: further words for ``celery worker``, which runs it then instead of ``qbridge worker``.
            settings: further variables of its environment.
        """
        worker = self._start(queues, pool, concurrency, celery, settings)
        try:
            _ = worker.name
            yield worker
        finally:
            worker.kill()

    def _start(
        self,
        queues: Sequence[str],
        pool: str,
        concurrency: int,
        celery: Sequence[str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> WorkerProcess:
        environment = {
            **self.process_environment(),
            **(settings or {}),
            "QBRIDGE_WORKER__POOL": pool,
            "QBRIDGE_WORKER__CONCURRENCY": str(concurrency),
        }
        # Two workers of one name on one broker would be one to remote control.
        name = f"{'-'.join(queues[:2])}-{next(self._paths)}@%h"
        if celery is None:
            words = ["qbridge", "worker", "-A", f"{_PROGRAM}:bridge"]
        else:
            words = ["celery", "-A", f"{_PROGRAM}:app", "worker", "-l", "INFO", *celery]
        command = [sys.executable, "-m", *words, "-Q", ",".join(queues), "-n", name]
        return WorkerProcess(command, environment, self.folder)

    # -- looking at queues

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue that is declared."""
        app = self.bridge.celery
        with app.connection_for_read() as connection:
            bound = app.amqp.queues[queue].bind(connection.default_channel)
            return int(bound.queue_declare(passive=True).message_count)

    def depth_or_none(self, queue: str) -> int | None:
        """The same, or None for a queue that nobody has declared on the broker yet."""
        try:
            return self.depth(queue)
        except Exception:  # noqa: BLE001 - each transport has its own error for this
            return None

    def dead_letter_of(self, task_id: str) -> DeadLetter:
        """Wait for the dead letter of a task: a result is stored before it is written."""
        found: list[DeadLetter] = []

        def there() -> bool:
            found[:] = [letter for letter in self.bridge.dead_letters.list(limit=None) if letter.task_id == task_id]
            return bool(found)

        wait_until(there, 20, what="the dead letter")
        return found[0]

    def purge(self, queue: str) -> None:
        """Throw away what waits in a queue."""
        app = self.bridge.celery
        with app.connection_for_write() as connection:
            bound = app.amqp.queues[queue].bind(connection.default_channel)
            bound.declare()
            bound.purge()

    @staticmethod
    def wait_for_revoke(task_id: str) -> None:
        """Wait until the workers of this process know that a task is revoked."""
        wait_until(lambda: task_id in revoked, 20, what="the revoke to arrive")

    # -- the end

    def close(self) -> None:
        """Stop the shared worker and close every bridge."""
        if self._shared is not None:
            self._shared.kill()
        for bridge in self._bridges:
            bridge.close()


class Blocked:
    """How long an event loop stood still; ``longest`` is in seconds."""

    def __init__(self) -> None:
        self.longest: float = 0.0


@asynccontextmanager
async def unblocked(tick: float = 0.005) -> AsyncIterator[Blocked]:
    """Watch the running event loop for the length of an ``async with`` block.

    A machine that is busy stops the loop too; so a thread ticks beside it, and a pause of the loop counts only as far
    as the thread went on.
    """
    blocked = Blocked()
    ending = threading.Event()
    thread_ticks: list[float] = []
    loop_ticks: list[float] = []

    def tick_in_thread() -> None:
        while not ending.is_set():
            thread_ticks.append(time.monotonic())
            time.sleep(tick)

    async def tick_in_loop() -> None:
        while True:
            loop_ticks.append(time.monotonic())
            await asyncio.sleep(tick)

    thread = threading.Thread(target=tick_in_thread, daemon=True)
    thread.start()
    beat = asyncio.ensure_future(tick_in_loop())
    await asyncio.sleep(2 * tick)
    try:
        yield blocked
        await asyncio.sleep(2 * tick)
    finally:
        beat.cancel()
        ending.set()
        await asyncio.to_thread(thread.join)
        for before, after in pairwise(loop_ticks):
            beside = [before, *(when for when in thread_ticks if before < when < after), after]
            gaps = [other - one for one, other in pairwise(beside)]
            stalls = sum(gap if gap > 4 * tick else max(0.0, gap - 2 * tick) for gap in gaps)
            blocked.longest = max(blocked.longest, after - before - stalls)


def longest_pause(measure: Callable[[], float], bound: float = 0.05) -> float:
    """Return the shortest of up to three measured pauses: what blocks does so each time, a busy machine does not.

    Args:
        measure: makes the calls, and returns the longest pause of the loop meanwhile, in seconds.
        bound: a pause below it is enough.
    """
    longest = measure()
    for _ in range(2):
        if longest < bound:
            break
        longest = min(longest, measure())
    return longest
