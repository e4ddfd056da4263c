"""Is nothing lost and nothing stuck in the short fault story: workers and a child killed, the broker killed?

The whole story, on all pools and beside plain Celery, is ``nox -s faults``.
"""

from __future__ import annotations

import pytest

from bench.faults.cells import Cell
from bench.faults.run import Load, run
from bench.faults.story import story
from qbridge.testing.servers import RabbitMQServer

SEED = 7


@pytest.mark.timeout(400)  # a busy machine takes its time to start ten programs
@pytest.mark.parametrize(
    "cell",
    [
        Cell("qbridge", "rabbitmq", "redis", "thread"),
        Cell("qbridge", "redis", "redis", "solo"),
        Cell("qbridge", "embedded", "sqlite", "process"),
    ],
    ids=str,
)
def test_nothing_is_lost_and_nothing_is_stuck(
    cell: Cell, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every confirmed task has run to its end or is a dead letter, and its result is there."""
    rabbitmq: RabbitMQServer | None = None
    if cell.broker == "rabbitmq":
        rabbitmq = request.getfixturevalue("qbridge_rabbitmq")
    folder = tmp_path_factory.mktemp("faults")
    verdict = run(cell, story(cell, SEED, short=True), Load(300, 50.0, SEED), folder, rabbitmq)
    assert 300 <= verdict.submitted <= 900
    assert frozenset() == verdict.lost
    assert frozenset() == verdict.stuck
    assert frozenset() == verdict.refused_and_ran
    assert frozenset() == verdict.no_result
    assert len(verdict.confirmed) > 200
