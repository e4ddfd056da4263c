"""Is a revoked task ever run: by workers that were not there when it was revoked, and by those that run it?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge import ResultsUnavailable, TaskRevoked
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"


@pytest.fixture(params=["redis", "sqlite"])
def contract(request: pytest.FixtureRequest, qbridge_redis: RedisServer, tmp_path: Path) -> Iterator[Contract]:
    """The embedded broker, with results that keep claims."""
    with qbridge_redis.heal().fresh() as redis:
        results = redis if request.param == "redis" else f"sqlite:///{tmp_path}/results.db"
        contract = Contract(f"embedded://{tmp_path}/bridge.db", results, tmp_path)
        try:
            yield contract
        finally:
            contract.close()


def test_a_revoke_survives_that_no_worker_heard_it(contract: Contract) -> None:
    """All workers are away when it is revoked: the next one does not run it, and its state is REVOKED."""
    path = contract.path()
    unwanted = contract.tasks.note.using(queue=QUEUE).delay(str(path), "unwanted")
    unwanted.revoke()
    wanted = contract.tasks.note.using(queue=QUEUE).delay(str(path), "wanted")
    with contract.worker_of(QUEUE, pool="solo"):
        assert "wanted" == wanted.get(timeout=20)
        with pytest.raises(TaskRevoked):
            unwanted.get(timeout=20)
    assert ["wanted"] == [word for _, _, word in runs(path)]
    assert "REVOKED" == unwanted.state


@pytest.mark.parametrize("contract", ["sqlite"], indirect=True)
@pytest.mark.parametrize("pool", ["process", "solo"])
def test_no_revoke_is_forgotten_because_there_are_many(pool: str, contract: Contract) -> None:
    """Celery's set is full at 50,000, at two here: a worker that starts knows all that the results remember."""
    path = contract.path()
    note = contract.tasks.note.using(queue=QUEUE)
    unwanted = [note.delay(str(path), f"unwanted {number}") for number in range(5)]
    for result in unwanted:
        result.revoke()
    wanted = note.delay(str(path), "wanted")
    with contract.worker_of(QUEUE, pool=pool, settings={"CELERY_WORKER_REVOKES_MAX": "2"}):
        assert "wanted" == wanted.get(timeout=20)
        wait_until(lambda: all(result.ready() for result in unwanted), 20, what="the others to end")
    assert ["REVOKED"] * 5 == [result.state for result in unwanted]
    assert ["wanted"] == [word for _, _, word in runs(path)]


@pytest.mark.parametrize("contract", ["sqlite"], indirect=True)
@pytest.mark.parametrize("pool", ["process", "solo"])
def test_a_running_task_learns_that_it_is_revoked(pool: str, contract: Contract) -> None:
    """Where no broadcast reaches it, ``ctx.check()`` asks; the task ends as REVOKED, and another goes on."""
    path = contract.path()
    with contract.worker_of(QUEUE, pool=pool):
        result = contract.tasks.patient.using(queue=QUEUE).delay(str(path))
        wait_until(lambda: runs(path), 20, what="the task to run")
        result.revoke()
        with pytest.raises(TaskRevoked, match="revoked while it ran"):
            result.get(timeout=20)
        assert "REVOKED" == result.state
        assert 12 == contract.tasks.add.using(queue=QUEUE).delay(2).get(timeout=20)
    assert 1 == len(runs(path))


def test_a_revoke_that_cannot_be_remembered_says_so(tmp_path: Path) -> None:
    """The workers that run were told, and whoever revokes has to know that others will not be."""
    contract = Contract(f"embedded://{tmp_path}/bridge.db", "redis://127.0.0.1:1/0", tmp_path)
    try:
        result = contract.tasks.add.using(queue=QUEUE).delay(1)
        with pytest.raises(ResultsUnavailable, match="cannot remember"):
            result.revoke()
    finally:
        contract.close()
