"""Who runs the tasks? Workers under a supervisor that starts another whenever one has ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bench.faults.cells import CONCURRENCY, Cell
from bench.faults.work import READY
from qbridge.testing.servers import guardian
from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until

__all__ = ["Fleet"]

_ROOT = Path(__file__).parents[2]
_POOLS = {"process": "prefork", "thread": "threads", "solo": "solo"}


class Fleet:
    """The workers of a cell.

    Args:
        cell: which.
        environment: of each worker.
        folder: for their logs.
    """

    def __init__(self, cell: Cell, environment: Mapping[str, str], folder: Path) -> None:
        self._cell = cell
        self._environment = environment
        self._folder = folder
        self._started = 0
        self._workers: list[ChildProcess] = []
        self._ready: list[Path] = []
        self._ending: set[int] = set()
        self._left_behind: set[int] = set()
        self.fell: int = 0
        """Workers that ended without being told to."""

    def start(self, number: int) -> None:
        """Start all, and wait until they consume.

        Args:
            number: how many.
        """
        for _ in range(number):
            worker, ready = self._another()
            self._workers.append(worker)
            self._ready.append(ready)
        for worker, ready in zip(self._workers, self._ready, strict=True):
            wait_until(lambda r=ready: r.exists(), 90, what=f"a worker to consume; see {worker.log}")  # type: ignore[misc]

    def _another(self) -> tuple[ChildProcess, Path]:
        number = self._started
        self._started += 1
        ready = self._folder / f"worker-{number}.ready"
        name, concurrency = f"w{number}@%h", str(CONCURRENCY[self._cell.pool])
        if self._cell.system == "qbridge":
            words = ["qbridge", "worker", "-A", "bench.faults.ours:bridge", "-n", name]
        else:
            pool = _POOLS[self._cell.pool]
            words = ["celery", "-A", "bench.faults.theirs:app", "worker", "-l", "INFO", "-n", name]
            words += ["-P", pool, "-c", concurrency]
        process = ChildProcess(
            [sys.executable, "-m", *words],
            log=self._folder / f"worker-{number}.txt",
            env={**self._environment, READY: str(ready), "FAULTS_CONCURRENCY": concurrency},
            cwd=_ROOT,
        )
        return process, ready

    def supervise(self) -> None:
        """Start another worker in the place of each that has ended."""
        for place, worker in enumerate(self._workers):
            if worker.exit_code() is not None:
                self.fell += worker.pid not in self._ending
                self._workers[place], self._ready[place] = self._another()

    def trees(self) -> list[set[int]]:
        """The processes of each worker."""
        return [set(guardian.tree(worker.pid)) for worker in self._workers]

    def consumes_for(self, place: int) -> float:
        """Seconds since the worker at a place began to consume; 0 if it has not."""
        ready = self._ready[place]
        return time.time() - ready.stat().st_mtime if ready.exists() else 0.0

    @property
    def is_well(self) -> bool:
        """All workers but one consume, at least: a moment to kill one, and to see what the others do."""
        return sum(map(self._is_there, range(len(self._ready)))) >= len(self._ready) - 1

    @property
    def all_consume(self) -> bool:
        """All workers do."""
        return all(map(self._is_there, range(len(self._ready))))

    def _is_there(self, place: int) -> bool:
        """Whether the worker at a place consumes: one that was killed has said so too, before."""
        return self._ready[place].exists() and self._workers[place].exit_code() is None

    def _one_that_consumes(self, place: int) -> int:
        """The worker at a place, or the next one that consumes."""
        places = [*range(place, len(self._ready)), *range(place)]
        return next((place for place in places if self._is_there(place)), place)

    # What happens to them, by the names of the acts

    def kill_worker(self, place: int) -> frozenset[int]:
        """SIGKILL to a worker and its pool's processes; returns them."""
        worker = self._workers[self._one_that_consumes(place)]
        pids = frozenset(guardian.tree(worker.pid))
        self._ending.add(worker.pid)
        worker.kill()
        return pids

    def kill_parent(self, place: int) -> frozenset[int]:
        """SIGKILL to a worker alone; returns it, and what it leaves behind."""
        worker = self._workers[self._one_that_consumes(place)]
        pids = frozenset(guardian.tree(worker.pid))
        self._ending.add(worker.pid)
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        worker.kill()  # waits for it
        self._left_behind |= pids - {worker.pid}
        return pids

    def kill_child(self, place: int, busy: set[int]) -> frozenset[int]:
        """SIGKILL to one of a pool's processes, of this worker or the next that has one at work; returns it."""
        trees = [guardian.tree(worker.pid)[1:] for worker in self._workers[place:] + self._workers[:place]]
        at_work = [pid for tree in trees for pid in tree if pid in busy]
        chosen = (at_work or [pid for tree in trees for pid in tree])[:1]
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return frozenset(chosen)

    def roll(self, place: int) -> frozenset[int]:
        """SIGTERM to a worker; another takes its place when it has ended."""
        worker = self._workers[place]
        if worker.exit_code() is None:
            self._ending.add(worker.pid)
            os.kill(worker.pid, signal.SIGTERM)
        return frozenset()

    def end(self) -> None:
        """SIGKILL to all."""
        for worker in self._workers:
            worker.kill()
        for pid in self._left_behind:
            with suppress(OSError):  # gone, as it should be
                if b"bench.faults" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
