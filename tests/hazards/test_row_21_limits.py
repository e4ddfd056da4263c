"""Row 21: what is a time limit worth on a pool that cannot enforce it?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until

OURS = """
from qbridge import Bridge
bridge = Bridge()

@bridge.task(time_limit=1)
def limited() -> None: ...
"""


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_plain_celery_ignores_it_in_silence(on_redis: Place, pool: str) -> None:
    """The limit is one second, the task takes three, and comes to its end."""
    plain, path = on_redis.plain(), on_redis.path()
    with plain.worker(pool) as worker:
        plain.send("limited", path, 3)
        wait_until(lambda: [word for _, _, word in runs(path)] == ["begin", "end"], 30, what="the end of the task")
        assert "limit" not in worker.log.read_text().replace("plain.limited", "")


@pytest.mark.parametrize("pool", ["thread", "solo"])
def test_ours_refuses_to_start(on_redis: Place, pool: str) -> None:
    """The worker names the task, and what to do."""
    (on_redis.folder / "limits.py").write_text(OURS)
    done = subprocess.run(
        [sys.executable, "-m", "qbridge", "worker", "-A", "limits:bridge", "--pool", pool],
        env={**os.environ, "QBRIDGE_BROKER": on_redis.url, "QBRIDGE_RESULTS": "disabled://"},
        cwd=on_redis.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot enforce the time limits of limits.limited" in done.stdout + done.stderr
