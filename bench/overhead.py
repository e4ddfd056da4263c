"""What does qbridge cost over raw Celery on the same path? Send, receive and round trip, per pair, interleaved.

Raw Celery here is a plain ``celery.Celery`` with the same settings: the same queue, acknowledgement, prefetch,
timeouts and, on RabbitMQ, publisher confirms. Each repetition runs raw and typed one after the other (in alternating
order), in the same process and on the same server; the figures are the ratios of the repetitions: min, median, max of
the elapsed time, and the median of the process's CPU time, which other load on the machine disturbs less.

::

    python bench/overhead.py --broker redis --results redis
    python bench/overhead.py --all --csv bench/results/overhead-0.1.0.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import WorkerShutdown
from celery.utils.nodenames import default_nodename
from celery.worker import WorkController, state

import qbridge
from qbridge import Bridge, BridgeConfig, WorkerConfig
from qbridge.celery_settings import app_settings, kombu_queue
from qbridge.testing.servers import MariaDBServer, PostgreSQLServer, RabbitMQServer, RedisServer, obtain

PAIRS = [
    (broker, results)
    for broker in ("rabbitmq", "redis", "embedded")
    for results in ("rpc", "redis", "postgresql", "sqlite")
] + [("rabbitmq", "mariadb")]


@dataclass
class Row:
    """One measured ratio: time of qbridge over time of raw Celery."""

    broker: str
    results: str
    what: str
    ratios: list[float]
    cpu_ratios: list[float]
    raw_us: float
    typed_us: float

    def cells(self) -> list[str]:
        """Return the row for the CSV file and the table."""
        low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
        return [
            qbridge.__version__, self.broker, self.results, self.what, str(len(self.ratios)),
            f"{low:.3f}", f"{middle:.3f}", f"{high:.3f}", f"{statistics.median(self.cpu_ratios):.3f}",
            f"{self.raw_us:.0f}", f"{self.typed_us:.0f}",
        ]  # fmt: skip


HEADER = ["version", "broker", "results", "what", "runs", "min", "median", "max", "cpu_median", "raw_us", "qbridge_us"]


class Side:
    """One of the two competitors: how it sends, waits, and which app its worker runs."""

    def __init__(
        self,
        kind: str,
        queue: str,
        app: Any,
        send: Callable[[int], Any],
        get: Callable[[Any], Any],
        worker_options: Any,
    ) -> None:
        self.kind = kind
        self.queue = queue
        self.app = app
        self.send = send
        self.get = get
        self.worker_options = worker_options
        self.done = 0


def raw_side(config: BridgeConfig, queue: str) -> Side:
    """Return plain Celery with the settings that the bridge would make."""
    settings = {
        name: value
        for name, value in app_settings(config).items()
        if name not in ("worker_consumer", "task_create_missing_queues", "task_default_queue")
    }
    if config.broker.kind == "rabbitmq":
        options = {**settings["broker_transport_options"], "confirm_publish": True}
        settings["broker_transport_options"] = options
    app = Celery("raw", changes=settings, set_as_current=False)
    app.conf.task_default_queue = queue
    app.conf.task_queues = [kombu_queue(config, qbridge.QueueConfig(queue))]
    quick = {"without_mingle": True, "without_gossip": True}
    side = Side("raw", queue, app, lambda n: add.apply_async((n, n)), lambda r: r.get(timeout=60), quick)

    @app.task(name="raw.add", acks_late=True, reject_on_worker_lost=True, shared=False)
    def add(a: int, b: int) -> int:
        side.done += 1
        return a + b

    return side


def typed_side(config: BridgeConfig, queue: str) -> Side:
    """Return a bridge with one typed task."""
    bridge = Bridge(config)

    # names as long as raw's: they are in every message, and in the pages of a file
    @bridge.task(name="our.add", queue=queue)
    def add(a: int, b: int) -> int:
        side.done += 1
        return a + b

    side = Side(
        "typed", queue, bridge.celery, lambda n: add.delay(n, n), lambda r: r.get(timeout=60), {"queues": [queue]}
    )
    return side


class _Controller(WorkController):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ready = threading.Event()
        super().__init__(*args, **kwargs)

    def on_consumer_ready(self, consumer: Any) -> None:
        self.ready.set()


def _stop() -> None:
    raise WorkerShutdown(0)


@contextmanager
def worker(side: Side) -> Iterator[None]:
    """Run a solo worker for one side in a thread."""
    from qbridge.worker.pools import SoloPool

    side.app.finalize()
    controller = _Controller(
        app=side.app, hostname=default_nodename(f"bench{id(side):x}"), pool_cls=SoloPool, concurrency=1,
        loglevel="ERROR", **side.worker_options,
    )  # fmt: skip
    state.should_stop = state.should_terminate = None
    thread = threading.Thread(target=controller.start, daemon=True)
    thread.start()
    if not controller.ready.wait(30):
        raise TimeoutError("the worker did not start")
    try:
        yield
    finally:
        controller.__dict__["consumer"].call_soon(_stop)
        thread.join(10)


Spent = tuple[float, float]
"""Seconds elapsed, and seconds of this process's CPU time."""


def timed(action: Callable[[], Any]) -> Spent:
    """Return what an action took."""
    begin, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begin, time.process_time() - cpu


def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the queue was not drained in time")
        time.sleep(0.001)


def compare(
    row: tuple[str, str, str], repetitions: int, n: int, raw: Callable[[], Spent], typed: Callable[[], Spent]
) -> Row:
    """Run both sides in alternating order and keep the ratio of each repetition."""
    ratios, cpu_ratios, raws, typeds = [], [], [], []
    for repetition in range(repetitions):
        first = repetition % 2 == 0
        if first:
            a, b = raw(), typed()
        else:
            b, a = typed(), raw()
        ratios.append(b[0] / a[0])
        cpu_ratios.append(b[1] / a[1])
        raws.append(a[0] / n * 1e6)
        typeds.append(b[0] / n * 1e6)
    return Row(*row, ratios, cpu_ratios, statistics.median(raws), statistics.median(typeds))


def measure(
    broker: str, results: str, config: BridgeConfig, *, repetitions: int, messages: int, trips: int
) -> list[Row]:
    """Measure one pair: submit, receive, round trip."""
    pair = (broker, results)
    tag = f"{time.time_ns():x}"
    raw, typed = raw_side(config, f"raw-{tag}"), typed_side(config, f"our-{tag}")
    rows = []
    try:
        for side in (raw, typed):
            side.send(0)

        def submit(side: Side) -> Spent:
            return timed(lambda: [side.send(n) for n in range(messages)])

        both = (lambda: submit(raw), lambda: submit(typed))
        rows.append(compare((*pair, "submit"), repetitions, messages, *both))

        def drained(side: Side) -> Spent:
            # what submit has left is drained first; then a known number, timed from the first to the last
            with worker(side):
                _until(lambda: _quiet(side))
            if results == "rpc":
                send_elsewhere(side, config, messages)
            else:
                for n in range(messages):
                    side.send(n)
            side.done = 0
            with worker(side):
                _until(lambda: side.done >= messages // 10)
                already = side.done
                elapsed, cpu = timed(lambda: _until(lambda: side.done >= messages * 98 // 100))
                share = messages / (side.done - already)
                return elapsed * share, cpu * share

        both = (lambda: drained(raw), lambda: drained(typed))
        rows.append(compare((*pair, "receive"), max(3, repetitions // 2), messages, *both))

        def trip(side: Side) -> Spent:
            with worker(side):
                for _ in range(3):
                    side.get(side.send(1))
                return timed(lambda: [side.get(side.send(n)) for n in range(trips)])

        database = results in ("postgresql", "sqlite", "mariadb")
        both = (lambda: trip(raw), lambda: trip(typed))
        rows.append(compare((*pair, "round trip"), 3 if database else repetitions, trips, *both))
    finally:
        raw.app.close()
        typed.app.close()
    return rows


def send_elsewhere(side: Side, config: BridgeConfig, messages: int) -> None:
    """Send from a process of its own, whose replies nobody reads.

    A bridge takes its replies from the queue as they come, in a thread; Celery leaves them there until somebody asks.
    In the process of the worker that would be measured as a cost of receiving tasks.
    """
    settings = {"broker": config.broker.celery_url(), "results": config.results.celery_url()}
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import overhead; overhead.send_and_go()"
    subprocess.run(
        [sys.executable, "-c", program], input=json.dumps([side.kind, side.queue, messages, settings]), text=True,
        check=True, timeout=120,
    )  # fmt: skip


def send_and_go() -> None:
    """The other process: send, and leave the reply queue behind."""
    kind, queue, messages, settings = json.loads(sys.stdin.read())
    config = BridgeConfig(**settings, worker=WorkerConfig(prefetch=4))
    side = {"raw": raw_side, "typed": typed_side}[kind](config, queue)
    for n in range(messages):
        side.send(n)
    os._exit(0)


def _quiet(side: Side) -> bool:
    before = side.done
    time.sleep(0.3)
    return side.done == before


def urls(stack: ExitStack, names: set[str]) -> dict[str, str]:
    """Start the servers that are needed and return their URLs."""
    found: dict[str, str] = {"rpc": "rpc://"}
    kinds = {"rabbitmq": RabbitMQServer, "redis": RedisServer, "postgresql": PostgreSQLServer, "mariadb": MariaDBServer}
    for name, kind in kinds.items():
        if name in names:
            server = stack.enter_context(obtain(kind))  # type: ignore[type-var]  # a mapping of server classes
            found[name] = stack.enter_context(server.fresh())
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    found["embedded"] = f"embedded://{folder}/bridge.db"
    found["sqlite"] = f"sqlite:///{folder}/results.db"
    return found


def main() -> int:
    """Measure and print; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=["rabbitmq", "redis", "embedded"])
    parser.add_argument("--results", choices=["rpc", "redis", "postgresql", "sqlite", "mariadb"])
    parser.add_argument("--all", action="store_true", help="every pair")
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("--trips", type=int, default=50)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pairs = PAIRS if options.all else [(options.broker or "redis", options.results or "redis")]
    table = []
    with ExitStack() as stack:
        found = urls(stack, {name for pair in pairs for name in pair})
        print(" ".join(f"{cell:>10}" for cell in HEADER))
        for broker, results in pairs:
            # prefetch 4 on both sides: with 1, raw Celery's solo worker stands still on RabbitMQ most of the time
            config = BridgeConfig(broker=found[broker], results=found[results], worker=WorkerConfig(prefetch=4))
            database = results in ("postgresql", "sqlite", "mariadb")
            trips = min(options.trips, 8) if database else options.trips
            # raw Celery opens an engine for each result: 500 of them on MariaDB take longer than anybody waits
            messages = min(options.messages, 200) if database else options.messages
            for row in measure(
                broker, results, config, repetitions=options.repetitions, messages=messages, trips=trips
            ):
                table.append(row.cells())
                print(" ".join(f"{cell:>10}" for cell in row.cells()), flush=True)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *table])
    return 0


if __name__ == "__main__":
    sys.exit(main())
