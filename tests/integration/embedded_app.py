"""What the worker and producer processes of test_embedded_processes.py run: a plain Celery app, and a log of runs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery

from qbridge.backends.embedded import register

assert register.SCHEME == "embedded"

FOLDER = Path(os.environ["EMBEDDED_TEST_FOLDER"])
LOG = FOLDER / "runs.log"

app = Celery("embedded", broker=f"embedded://{FOLDER}/bridge.db", backend=f"db+sqlite:///{FOLDER}/results.db")
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_create_missing_queues=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)


def note(*words: object) -> None:
    """Append one line, in one write, so that lines of several processes never mix."""
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


@app.task(name="embedded_app.record")
def record(number: str) -> None:
    """Say that it ran."""
    note("ran", number)


@app.task(bind=True)
def slow(self: Any, number: str, seconds: float) -> None:
    """Say when it begins, in which process, and when it ends."""
    note("began", number, os.getpid(), self.request.delivery_info.get("redelivered"))
    time.sleep(seconds)
    note("ended", number, os.getpid())


@app.task(ignore_result=False)
def add(a: int, b: int) -> int:
    """Give a result."""
    return a + b


@app.task(name="embedded_app.spawn")
def spawn(number: str, count: int) -> None:
    """Send tasks from within the worker, from a forked child with the prefork pool."""
    for child in range(count):
        record.delay(f"{number}.{child}")
    note("ran", number)


def produce(name: str, count: int, batch: int) -> None:
    """Send numbered tasks, and note each as sent when the broker has it."""
    with app.producer_pool.acquire(block=True) as producer:
        for number in range(count):
            if batch and number % batch == 0:
                with producer.batch():
                    for offset in range(min(batch, count - number)):
                        record.apply_async((f"{name}-{number + offset}",), producer=producer)
                for offset in range(min(batch, count - number)):
                    note("sent", f"{name}-{number + offset}")
            elif not batch:
                record.apply_async((f"{name}-{number}",), producer=producer)
                note("sent", f"{name}-{number}")


if __name__ == "__main__":
    produce(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
