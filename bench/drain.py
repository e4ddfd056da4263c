"""How fast does one solo worker empty a queue, qbridge beside plain Celery? Interleaved; ratios of each round.

Both get the same messages (sent by the same bridge) of a task that does nothing and keeps no result, both acknowledge
late, both prefetch 64. The rate is taken between 10 % and 98 % of the queue, by its length; once by the clock and once
by the worker's own processor time, which other programs on the machine change less.

::

    python bench/drain.py --rounds 5 --csv bench/results/drain-0.1.0.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from kombu import Exchange, Queue

from qbridge import Bridge, BridgeConfig, WorkerConfig
from qbridge.testing.servers import RabbitMQServer, RedisServer, obtain

BROKERS = {"redis": RedisServer, "rabbitmq": RabbitMQServer}
URL = os.environ.get("DRAIN_URL", "redis://localhost")
PREFETCH = 64

bridge = Bridge(BridgeConfig(broker=URL, results="disabled://", worker=WorkerConfig(pool="solo", prefetch=PREFETCH)))
ours = bridge.celery

theirs = Celery("plain", broker=URL, set_as_current=False)
theirs.conf.update(task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=PREFETCH)
theirs.conf.task_queues = [
    Queue("default", Exchange(""), "default", no_declare=True, queue_arguments={"x-queue-type": "quorum"})
    if URL.startswith("amqp")
    else Queue("default")
]


@bridge.task(name="drain.nothing", results=False)
def nothing(number: int) -> None:
    """Do nothing."""


@theirs.task(name="drain.nothing")
def _nothing(number: int) -> None:
    """Do nothing."""


@contextmanager
def queue_length() -> Iterator[Callable[[], int]]:
    """Empty the queue, and give a function that tells how long it is."""
    if not URL.startswith("amqp"):
        with redis.Redis.from_url(URL) as client:
            client.flushdb()
            yield lambda: int(client.llen("default"))
        return
    with ours.connection_for_read() as connection:
        queue = ours.amqp.queues["default"].bind(connection.default_channel)
        queue.declare()
        queue.purge()
        yield lambda: int(queue.queue_declare(passive=True).message_count)


def drain(app: str, count: int) -> tuple[float, float]:
    """Fill the queue, start one worker, and return its tasks per second, and per second of its processor time."""
    words = ["-A", f"drain:{app}", "worker", "-P", "solo", "-Q", "default", "--without-mingle", "--without-gossip"]
    with queue_length() as length, tempfile.TemporaryFile("w+") as log:
        nothing.send_many([(number,) for number in range(count)])
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", *words], cwd=Path(__file__).parent, stdout=log, stderr=log
        )
        try:
            began = _reached(worker, length, int(count * 0.9))
            ended = _reached(worker, length, int(count * 0.02))
        except BaseException:
            log.seek(0)
            print(log.read())
            raise
        finally:
            worker.kill()
            worker.wait()
    return count * 0.88 / (ended[0] - began[0]), count * 0.88 / (ended[1] - began[1])


def _reached(worker: Any, length: Callable[[], int], wanted: int) -> tuple[float, float]:
    """When the queue was no longer than that, and the processor time of the worker by then."""
    until = time.monotonic() + 120
    while time.monotonic() < until and worker.poll() is None:
        if length() <= wanted:
            ticks = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            return time.monotonic(), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.005)
    raise TimeoutError(f"the queue has not come down to {wanted}: the worker ended, or is too slow")


def measure(broker: str, rounds: int, tasks: int) -> list[list[str]]:
    """Measure on one broker, print each round, and return it as a row."""
    rows = []
    ratios: list[tuple[float, float]] = []
    for number in range(rounds):
        order = ("theirs", "ours") if number % 2 else ("ours", "theirs")
        rates = {app: drain(app, tasks) for app in order}
        (fast, frugal), (slow, hungry) = rates["ours"], rates["theirs"]
        ratios.append((fast / slow, frugal / hungry))
        rows.append([broker, f"{fast:.0f}", f"{slow:.0f}", *(f"{ratio:.2f}" for ratio in ratios[-1])])
        print("{}: qbridge {}/s, plain Celery {}/s, ratio {}, by processor time {}".format(*rows[-1]), flush=True)
    for what, found in zip(("the clock", "processor time"), zip(*ratios, strict=True), strict=True):
        print(
            f"{broker}: ratio by {what}: min {min(found):.2f}, "
            f"median {statistics.median(found):.2f}, max {max(found):.2f}"
        )
    return rows


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=list(BROKERS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    if "DRAIN_URL" not in os.environ:  # again for each broker, with the apps on a server of our own
        if given.csv:
            given.csv.write_text("broker,qbridge_per_s,celery_per_s,ratio,ratio_of_cpu\n")
        for broker in given.broker or BROKERS:
            with obtain(BROKERS[broker]) as server, server.fresh() as url:
                environment = {**os.environ, "DRAIN_URL": url}
                subprocess.run([sys.executable, *sys.argv, "--broker", broker], env=environment, check=True)
        return
    broker = given.broker[-1]
    rows = measure(broker, given.rounds, given.tasks)
    if given.csv:
        with given.csv.open("a", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
