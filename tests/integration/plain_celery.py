"""What is on the other side of the wire: a plain Celery application, which imports nothing of qbridge.

``celery -A plain_celery worker``, or ``python plain_celery.py CALLS``: sends ``[[task, args, kwargs], …]``, prints what
came back as JSON. ``PLAIN_SETTINGS`` in the environment holds Celery's settings as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path

from celery import Celery
from celery.signals import worker_ready
from kombu import Queue

app = Celery("plain")
app.conf.update(json.loads(os.environ["PLAIN_SETTINGS"]))
if os.environ.get("PLAIN_NO_DECLARE"):
    app.conf.task_queues = [Queue("default", exchange="", routing_key="default", no_declare=True)]


@app.task(name="interop.add")
def add(a, b=10):
    return a + b


@app.task(name="interop.describe")
def describe(value):
    return [type(value).__name__, value]


@app.task(name="interop.fail")
def fail(text):
    raise ValueError(text, 1)


@app.task(name="interop.has_qbridge")
def has_qbridge():
    return any(name.partition(".")[0] == "qbridge" for name in sys.modules)


@worker_ready.connect
def say_ready(**_):
    Path(os.environ["PLAIN_READY"]).touch()


def main(calls):
    def revived(value):
        return datetime.fromisoformat(value[9:]) if isinstance(value, str) and value.startswith("datetime ") else value

    told = []
    results = [app.send_task(name, [revived(value) for value in args], kwargs) for name, args, kwargs in calls]
    for result in results:
        try:
            told.append({"value": result.get(timeout=30)})
        except Exception as error:
            told.append({"error": type(error).__name__, "args": list(error.args)})
    assert not any(name.partition(".")[0] == "qbridge" for name in sys.modules)
    print(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
