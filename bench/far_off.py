"""50,000 tasks of an hour from now and 100 of now: how long do these wait, and what does a worker hold in its memory?

::

    python bench/far_off.py --csv bench/results/far-off-0.1.0.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.servers import RabbitMQServer, RedisServer, obtain
from qbridge.testing.waiting import wait_until

BROKERS = ("rabbitmq", "redis", "embedded")
QUEUE = "fragile"


@contextmanager
def place(broker: str, folder: Path) -> Iterator[Contract]:
    """An empty broker, and the contract's tasks."""
    if broker == "embedded":
        contract = Contract(f"embedded://{folder}/bridge.db", f"sqlite:///{folder}/results.db", folder)
        yield contract
        contract.close()
        return
    with obtain(RabbitMQServer if broker == "rabbitmq" else RedisServer) as server, server.fresh() as url:
        contract = Contract(url, f"sqlite:///{folder}/results.db", folder)
        yield contract
        contract.close()


def resident(worker: WorkerProcess) -> float:
    """Memory of a worker in MB."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(broker: str, far: int, now: int, folder: Path) -> list[str]:
    """Send all, and return a row: sending, waiting, memory before and after."""
    with place(broker, folder) as contract, contract.worker_of(QUEUE, pool="solo") as worker:
        note, jot, path = contract.tasks.note, contract.tasks.jot, contract.path()
        note.using(queue=QUEUE).delay(str(contract.path())).get(timeout=60)
        before = resident(worker)
        began = time.monotonic()
        for _ in range(far // 1000):
            jot.using(queue=QUEUE, countdown=3600).send_many([(str(path),)] * 1000)
        sent = time.monotonic() - began
        began = time.time()
        jot.using(queue=QUEUE).send_many([(str(path),)] * now)
        wait_until(lambda: len(runs(path)) == now, 120, what="the tasks of now")
        times = [when - began for _, when, _ in runs(path)]
        time.sleep(5)
        row = [broker, str(far), f"{sent:.1f}", f"{min(times):.2f}", f"{max(times):.2f}"]
        return [*row, f"{before:.0f}", f"{resident(worker):.0f}"]


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", choices=BROKERS, action="append")
    parser.add_argument("--far", type=int, default=50_000)
    parser.add_argument("--now", type=int, default=100)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows = [["broker", "far_off", "sent_in_s", "first_after_s", "last_after_s", "worker_mb_before", "worker_mb_after"]]
    for broker in given.broker or BROKERS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(broker, given.far, given.now, Path(folder)))
        print(*(f"{name}={value}" for name, value in zip(rows[0], rows[-1], strict=True)), flush=True)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
