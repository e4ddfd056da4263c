"""What workers of plain Celery run beside ours: the tasks of the contracts by other names, nothing of qbridge imported.

``PLAIN_SETTINGS`` in the environment holds Celery's settings as JSON. A run leaves the same line as a contract's task.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from celery import Celery
from celery.signals import worker_ready

app = Celery("plain")
app.conf.update(json.loads(os.environ["PLAIN_SETTINGS"]))


def _note(path, word=""):
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {time.time()} {word}\n")


def _wait_for(path):
    deadline = time.monotonic() + 120
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {path}")
        time.sleep(0.01)


@app.task(name="plain.add")
def add(a, b=10):
    return a + b


@app.task(name="plain.note")
def note(path, word=""):
    """Leave a trace of the run."""
    _note(path, word)
    return word


@app.task(name="plain.nap")
def nap(path, seconds):
    """Note the run, sleep, and note the end."""
    _note(path, "begin")
    time.sleep(seconds)
    _note(path, "end")


@app.task(name="plain.hold")
def hold(path, release):
    """Note the run, and wait for a file."""
    _note(path)
    _wait_for(release)


@app.task(name="plain.limited", time_limit=1)
def limited(path, seconds):
    """Sleep for longer than the limit."""
    _note(path, "begin")
    time.sleep(seconds)
    _note(path, "end")


@app.task(name="plain.fragile", bind=True, max_retries=3, default_retry_delay=1)
def fragile(self, path, release):
    """Fail in the first run, once a file is there, and ask for another one."""
    _note(path, str(self.request.retries))
    if self.request.retries == 0:
        _wait_for(release)
        raise self.retry(exc=OSError("no route"))


@worker_ready.connect
def say_ready(sender=None, **_):
    Path(os.environ["QBRIDGE_TEST_WORKER_READY"]).write_text(str(sender.hostname))
