"""What does a second worker of the same name do, as in two terminals of one machine?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until


def test_a_name_that_is_taken_is_said_in_words_and_asked_for_calmly(qbridge_rabbitmq: Any, tmp_path: Path) -> None:
    """RabbitMQ locks the control queue of the first; the second says so, and starts once the first is gone.

    Celery 5.7 tries several times a second, with tracebacks, and never says why.
    """
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        with contract.worker_of("default") as first:
            command = [sys.executable, "-m", "qbridge", "worker", "-A", "qbridge.testing.contract_app.app:bridge"]
            command += ["-Q", "default", "-n", first.name]
            second = ChildProcess(
                command, log=tmp_path / "second.log", env=contract.process_environment(), cwd=tmp_path
            )
            try:
                wait_until(lambda: f"is called {first.name}" in second.tail(40), 30, what="the second to say it")
                assert "Traceback" not in second.tail(1000)
                first.ask_to_stop()
                first.wait(20)
                wait_until(lambda: "ready." in second.tail(40), 20, what="the second to start")
                assert contract.tasks.add.delay(20, 22).get(timeout=20) == 42
            finally:
                second.kill()
                contract.close()
