"""How fast does one solo worker empty a Redis queue, qbridge beside plain Celery? Interleaved; ratios of each round.

Both get the same messages (sent by the same bridge) of a task that does nothing and keeps no result, both acknowledge
late, both prefetch 64. The rate is taken between 10 % and 98 % of the queue, by its length.

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
import time
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from qbridge import Bridge, BridgeConfig, WorkerConfig
from qbridge.testing.servers import RedisServer, obtain

URL = os.environ.get("DRAIN_URL", "redis://localhost")
PREFETCH = 64

bridge = Bridge(BridgeConfig(broker=URL, results="disabled://", worker=WorkerConfig(pool="solo", prefetch=PREFETCH)))

plain = Celery("plain", broker=URL, set_as_current=False)
plain.conf.update(
    task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=PREFETCH, task_default_queue="default"
)


@bridge.task(name="drain.nothing", results=False)
def nothing(number: int) -> None:
    """Do nothing."""


@plain.task(name="drain.nothing")
def _nothing(number: int) -> None:
    """Do nothing."""


def drain(client: Any, which: str, count: int) -> float:
    """Fill the queue, start one worker, and return its tasks per second."""
    client.flushdb()
    nothing.send_many([(number,) for number in range(count)])
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        f"drain:{which.partition('.')[0]}",
        "worker",
        "-P",
        "solo",
        "-Q",
        "default",
    ]
    command += ["--without-mingle", "--without-gossip"]
    worker = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = _reached(client, int(count * 0.9))
        ended = _reached(client, int(count * 0.02))
    finally:
        worker.kill()
        worker.wait()
    return count * 0.88 / (ended - began)


def _reached(client: Any, length: int) -> float:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if client.llen("default") <= length:
            return time.monotonic()
        time.sleep(0.005)
    raise TimeoutError(f"the queue has not come down to {length}")


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows = []
    if "DRAIN_URL" not in os.environ:  # again, with the apps on a server of our own
        with obtain(RedisServer) as server, server.fresh() as url:
            sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, "DRAIN_URL": url}))
    with redis.Redis.from_url(URL) as client:
        for number in range(given.rounds):
            order = ("plain", "bridge.celery") if number % 2 else ("bridge.celery", "plain")
            rates = {which: drain(client, which, given.tasks) for which in order}
            rows.append((rates["bridge.celery"], rates["plain"], rates["bridge.celery"] / rates["plain"]))
            print(f"qbridge {rows[-1][0]:.0f}/s, plain Celery {rows[-1][1]:.0f}/s, ratio {rows[-1][2]:.2f}", flush=True)
    ratios = [ratio for *_, ratio in rows]
    print(f"ratio min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("qbridge_per_s", "celery_per_s", "ratio"))
            writer.writerows((f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}") for ours, theirs, ratio in rows)


if __name__ == "__main__":
    main()
