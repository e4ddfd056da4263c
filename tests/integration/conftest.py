"""What the tests of single services share: a bridge on each broker in turn, and which files are run first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge.testing.contracts.kit import Contract

#: Files that take longest, because they wait: restarts, kills, leases. A file stays in one process, so one of these
#: that began last would be waited for alone.
LONGEST = (
    "test_dead_letters_failed",
    "test_kit_servers",
    "test_faults_basic",
    "test_delays",
    "test_retry_broker_away",
    "test_locked_wire",
    "test_worker_ending",
    "test_interop_celery",
    "test_redis_leases",
    "test_faults_short",
    "test_results_database",
    "test_retry_restarts",
    "test_celery_app_ways",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; within a file, and among the others, the order stays."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(params=["rabbitmq", "redis", "embedded"])
def contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a broker that nobody has used before, and no worker yet; results in a file."""
    results = f"sqlite:///{tmp_path / 'results.db'}"
    if request.param == "embedded":
        contract = Contract(f"embedded://{tmp_path / 'bridge.db'}", results, tmp_path)
        yield contract
        contract.close()
        return
    server = request.getfixturevalue(f"qbridge_{request.param}")
    with server.heal().fresh() as url:
        contract = Contract(url, results, tmp_path)
        yield contract
        contract.close()


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'results.db'}"
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as fresh:
        yield fresh
