"""Row 31: not to acknowledge what failed or took too long looks like keeping it; where does the message go?"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from celery.exceptions import TimeLimitExceeded
from tests.hazards.kit import Place

from qbridge import BridgeConfig, ConfigurationError
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.waiting import wait_until

OURS = """
import os, time
from pathlib import Path
from celery.signals import worker_ready
from qbridge import Bridge, Retry
bridge = Bridge()

@bridge.task(name="limited", time_limit=1, retry=Retry(on=OSError))
def limited(path: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {time.time()} \\n")
    time.sleep(60)

@worker_ready.connect(weak=False)
def say_ready(sender=None, **_):
    Path(os.environ["QBRIDGE_TEST_WORKER_READY"]).write_text(str(sender.hostname))
"""


@pytest.fixture(params=["rabbitmq", "redis"])
def place(request: pytest.FixtureRequest) -> Place:
    """An empty broker of each kind."""
    place: Place = request.getfixturevalue(f"on_{request.param}")
    return place


def ran(path: Path, times: int) -> bool:
    """Whether there have been so many runs."""
    return len(runs(path)) >= times


def test_plain_celery_runs_what_takes_too_long_for_ever(place: Place) -> None:
    """With ``task_acks_on_timeout=False`` it goes back to the queue each time its limit has ended it."""
    plain, path = place.plain(task_acks_late=True, task_acks_on_timeout=False), place.path()
    with plain.worker("prefork"):
        plain.send("limited", path, 60)
        wait_until(partial(ran, path, 4), 60, what="the fourth run")


def test_plain_celery_deletes_what_failed(place: Place) -> None:
    """With ``task_acks_on_failure=False`` it is rejected, and where no policy keeps such messages it is gone."""
    plain, after = place.plain(task_acks_late=True, task_acks_on_failure=False), place.path()
    with plain.worker("prefork") as worker:
        plain.send("add", 1, "no number")
        plain.send("note", after)
        wait_until(partial(ran, after, 1), 20, what="the next task")
        assert "raised unexpected: TypeError" in worker.log.read_text()
    with plain.worker("prefork") as worker:  # what was only not acknowledged would come again
        plain.send("note", after)
        wait_until(partial(ran, after, 2), 20, what="the next task")
        assert "TypeError" not in worker.log.read_text()


def test_ours_keeps_it_after_one_run(place: Place) -> None:
    """A failure and a dead letter; the settings that promise what they do not keep are refused."""
    ours, path = place.ours(), place.path()
    (place.folder / "limits.py").write_text(OURS)
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "limits:bridge"]
    environment = {**ours.process_environment(), "PYTHONPATH": str(place.folder), "QBRIDGE_WORKER__CONCURRENCY": "1"}
    worker = WorkerProcess(command, environment, place.folder)
    try:
        result = ours.bridge.send("limited", (str(path),))
        _ = worker.name
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=30)
        letter = ours.dead_letter_of(result.id)
    finally:
        worker.kill()
    assert (letter.reason, len(runs(path))) == ("timed_out", 1)
    for name in ("task_acks_on_timeout", "task_acks_on_failure"):
        with pytest.raises(ConfigurationError, match=name):
            BridgeConfig(celery={name: False})
