"""What becomes of a task that its hard time limit ends, on each broker?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from celery.exceptions import TimeLimitExceeded

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.waiting import wait_until

HERE = Path(__file__).parent


def test_a_task_that_takes_too_long_is_kept_if_it_was_to_be_tried_again(contract: Contract) -> None:
    """One run, a failure that says so, and a dead letter with its arguments; without a ``Retry`` the failure only.

    Replayed, it is run again.
    """
    bridge, path, other = contract.bridge, contract.path(), contract.path()
    environment = {**contract.process_environment(), "PYTHONPATH": str(HERE), "QBRIDGE_WORKER__CONCURRENCY": "2"}
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "limits_app:bridge"]
    worker = WorkerProcess(command, environment, contract.folder)
    try:
        _ = worker.name
        kept = bridge.send("limits.tried", (str(path), 60.0))
        failed = bridge.send("limits.plain", (str(other), 60.0))
        for result in (kept, failed):
            with pytest.raises(TimeLimitExceeded):
                result.get(timeout=30)
        letter = contract.dead_letter_of(kept.id)
        assert [letter.id] == [each.id for each in bridge.dead_letters.list()]
        told = letter.reason, letter.task, letter.attempts, letter.crashes, letter.error_type
        assert told == ("timed_out", "limits.tried", 1, 0, "TimeLimitExceeded")
        assert letter.body.startswith(b'[["%s"' % str(path).encode())
        assert (len(runs(path)), len(runs(other))) == (1, 1)
        bridge.dead_letters.replay(letter.id)
        wait_until(lambda: len(runs(path)) == 2, 20, what="the replayed task to run")
    finally:
        worker.kill()
