"""Do the fixtures that other projects' tests use give them a bridge and a worker?"""

from __future__ import annotations

import os
import threading

import pytest

from qbridge import Bridge


def test_a_task_declared_in_a_test_runs_in_its_worker(qbridge_bridge: Bridge, qbridge_worker: object) -> None:
    """The worker runs in threads of the test's process, and knows tasks that were declared after its start."""
    caller = threading.get_ident()

    @qbridge_bridge.task
    def where(number: int) -> tuple[int, bool, int]:
        return os.getpid(), threading.get_ident() == caller, number + 1

    assert where.delay(1).get(timeout=20) == (os.getpid(), False, 2)


def test_a_bridge_without_further_fixtures_is_embedded(qbridge_bridge: Bridge) -> None:
    """No server is started for a test that asks for a bridge only."""
    assert qbridge_bridge.config.broker.kind == "embedded"
    assert qbridge_bridge.config.results.kind == "database"


@pytest.mark.usefixtures("broker_url", "results_url")
def test_a_bridge_runs_on_the_pair_that_the_test_asks_for(
    qbridge_bridge: Bridge, qbridge_worker: object, qbridge_broker: str
) -> None:
    """With ``broker_url`` and ``results_url`` the same test runs on every pair."""

    @qbridge_bridge.task
    def double(number: int) -> int:
        return 2 * number

    assert qbridge_bridge.config.broker.kind == qbridge_broker
    assert double.delay(21).get(timeout=20) == 42
