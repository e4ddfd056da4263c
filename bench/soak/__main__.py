"""Run a soak, keep what was seen, and say whether anything has grown."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.soak.plot import drawn
from bench.soak.watch import Held, held_by
from qbridge.cli.depths import read_depths
from qbridge.exceptions import BatchError, QBridgeError, ResultTimeout
from qbridge.testing.servers import PostgreSQLServer, RabbitMQServer, RedisServer
from qbridge.testing.servers.process import ChildProcess

_ROOT = Path(__file__).parents[2]
_BATCH = 100
_LOOK = 2.0
"""Seconds between two looks."""
_BACKLOG = 2000
"""Waiting messages beyond which nothing is sent."""
_LATEST = 300.0
"""Seconds in which what was sent last must have run."""
_GROWTH = 0.15
"""Part of the memory after the first sixth by which it may have grown at the end."""
FIELDS = [
    "seconds", "sent", "waiting", "dead", "connections",
    "threads_mb", "threads_fds", "threads_threads",
    "processes_mb", "processes_fds", "processes_threads",
    "client_mb", "client_fds", "client_threads",
]  # fmt: skip


@contextmanager
def place(broker: str, folder: Path) -> Iterator[tuple[Any, str, str]]:
    """A broker, and the URLs of broker and results."""
    with ExitStack() as stack:
        if broker == "embedded":
            yield None, f"embedded://{folder / 'bridge.db'}", f"sqlite:///{folder / 'results.db'}"
        elif broker == "redis":
            server = stack.enter_context(RedisServer(appendonly=True))
            yield server, server.url, stack.enter_context(RedisServer()).url
        else:
            rabbitmq = stack.enter_context(RabbitMQServer())
            yield rabbitmq, rabbitmq.url, stack.enter_context(PostgreSQLServer()).url


class Soak:
    """One run.

    Args:
        folder: for files.
        server: that is restarted; None: nobody can be.
        urls: of broker and results.
        tasks: how many are sent.
        every: seconds between two restarts.
        seconds: after which nothing more is sent, however much is left.
    """

    def __init__(
        self, folder: Path, server: Any, urls: tuple[str, str], tasks: int, every: float, seconds: float
    ) -> None:
        os.environ["SOAK_BROKER"], os.environ["SOAK_RESULTS"] = urls
        self._folder, self._server, self._tasks, self._every = folder, server, tasks, every
        self.app: Any = importlib.import_module("bench.soak.app")
        self.samples: list[dict[str, float]] = []
        self.restarts: list[float] = []
        self.seen: Counter[str] = Counter()
        self.sent = 0
        self._began = time.monotonic()
        self._send_until = self._began + seconds
        self._ending = threading.Event()
        self._waiting = 0
        self._workers: dict[str, ChildProcess] = {}
        self.ended: dict[str, str] = {}
        """Pools whose workers have ended by themselves, and what their logs say at the end."""

    def run(self) -> None:
        """Do it all."""
        for pool in ("thread", "process"):
            command = [sys.executable, "-m", "qbridge", "worker", "-A", "bench.soak.app:bridge"]
            self._workers[pool] = ChildProcess(
                [*command, "--pool", pool, "--concurrency", "2"],
                log=self._folder / f"{pool}.txt", env=dict(os.environ), cwd=_ROOT,
            )  # fmt: skip
        beside = [threading.Thread(target=each) for each in (self._watch, self._restart)]
        try:
            for thread in beside:
                thread.start()
            self._send()
            self._wait()
        finally:
            self._ending.set()
            for thread in beside:
                thread.join()
            for pool, worker in self._workers.items():
                if worker.exit_code() is not None:
                    self.ended[pool] = worker.tail()
                worker.kill()
            self.app.bridge.close()

    def _send(self) -> None:
        number, text = 0, "x" * 200
        while number < self._tasks and time.monotonic() < self._send_until:
            while self._waiting > _BACKLOG and not self._ending.wait(0.1):
                pass
            kind = number // _BATCH % 10
            numbers = range(number, number + _BATCH)
            with suppress(BatchError):  # uncertain ones may run: what counts here is what stays behind
                if kind == 0:
                    results = self.app.fails.send_many((each,) for each in numbers)
                elif kind == 1:
                    results = self.app.tried.send_many((each,) for each in numbers)
                else:
                    results = self.app.works.send_many((each, text) for each in numbers)
                self._ask(results)
            number += _BATCH
            self.sent = number

    def _ask(self, results: list[Any]) -> None:
        for result, timeout in ((results[0], 20.0), (results[-1], 0.001)):
            try:
                result.get(timeout=timeout)
                self.seen["value"] += 1
            except ResultTimeout:
                self.seen["timed out"] += 1
            except ValueError:
                self.seen["failure"] += 1
            except QBridgeError as error:
                self.seen[type(error).__name__] += 1

    def _wait(self) -> None:
        end = time.monotonic() + _LATEST
        quiet = 0
        while quiet < 5 and time.monotonic() < end:
            time.sleep(_LOOK)
            quiet = quiet + 1 if self._waiting == 0 else 0

    def _restart(self) -> None:
        while self._server is not None and not self._ending.wait(self._every):
            if self.sent >= self._tasks or time.monotonic() > self._send_until:
                return
            self._server.kill()
            self._server.start()
            self.restarts.append(time.monotonic() - self._began)

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK):
            connections = 0
            with suppress(Exception):
                depths = read_depths(self.app.bridge, 1.5)
                waiting = sum((each.waiting or 0) + (each.running or 0) for each in depths.queues) + (depths.held or 0)
                self._waiting = waiting
                dead = sum(depths.dead.values())
                connections = self._connections()
                held = {pool: held_by(worker.pid) for pool, worker in self._workers.items()}
                held["client"] = Held([os.getpid()])
                row = {"seconds": time.monotonic() - self._began, "sent": self.sent, "waiting": waiting, "dead": dead}
                row["connections"] = connections
                for name, of in (("threads", "thread"), ("processes", "process"), ("client", "client")):
                    row[f"{name}_mb"] = held[of].memory
                    row[f"{name}_fds"] = held[of].descriptors
                    row[f"{name}_threads"] = held[of].threads
                self.samples.append(row)

    def _connections(self) -> int:
        if isinstance(self._server, RedisServer):
            with self._server.client() as client:
                return len(client.client_list()) - 1
        if isinstance(self._server, RabbitMQServer):
            return len(self._server.api("GET", "/api/connections"))
        return 0


def grown(samples: list[dict[str, float]]) -> list[str]:
    """Name what is more at the end than after the first sixth, by more than it may be.

    Some samples lie in the second in which the broker was away and had no connections: a twelfth of them is looked at.
    """
    sixth = len(samples) // 6
    begin = samples[sixth : sixth + max(5, sixth // 2)]
    end = samples[-5:]
    found = []
    for name in FIELDS[4:]:
        before, after = (statistics.median(row[name] for row in rows) for rows in (begin, end))
        allowed = before * (1 + _GROWTH) if name.endswith("_mb") else before + 3
        if after > allowed:
            found.append(f"{name} has grown: {before:.0f} → {after:.0f}")
    if samples[-1]["waiting"]:
        found.append(f"messages that still wait: {samples[-1]['waiting']:.0f}")
    return found


def main() -> int:
    """Soak one broker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=("rabbitmq", "redis", "embedded"), default="redis")
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two restarts of the broker")
    parser.add_argument("--seconds", type=float, default=7200.0, help="send nothing more after that")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qbridge-soak-") as folder, place(given.broker, Path(folder)) as found:
        soak = Soak(Path(folder), found[0], found[1:], given.tasks, given.every, given.seconds)
        soak.run()
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({name: round(row[name], 1) for name in FIELDS} for row in soak.samples)
    if given.plot is not None:
        series = {name: [row[name] for row in soak.samples] for name in FIELDS[2:]}
        title = f"{soak.sent} tasks, {given.broker}"
        given.plot.write_text(drawn(title, [row["seconds"] for row in soak.samples], series, soak.restarts))
    problems = grown(soak.samples)
    for pool, log in soak.ended.items():
        problems.append(f"the worker of the {pool} pool has ended")
        print(log)
    print(
        json.dumps(
            {
                "sent": soak.sent,
                "restarts": len(soak.restarts),
                "asked": dict(soak.seen),
                "seconds": soak.samples[-1]["seconds"],
            }
        )
    )
    print("nothing has grown" if not problems else f"not well: {'; '.join(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
