"""Is what was sent twice done once, and is what was revoked left alone, wherever the results can remember it?"""

from __future__ import annotations

from uuid import uuid4

import pytest

from qbridge import ArgumentsError, TaskRevoked, UnsupportedFeature
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until


def _claims(contract: Contract) -> bool:
    return contract.bridge.config.results.capabilities.claims


def test_an_idempotency_key_is_sent_once(qbridge_contract: Contract) -> None:
    """A second send returns the first one's handle and result, and other arguments under the key are refused.

    Where results keep no claims the key is refused, naming those that do, and nothing is sent.
    """
    contract = qbridge_contract
    path = contract.path()
    note = contract.tasks.note.using(idempotency_key=f"order {uuid4()}")
    if not _claims(contract):
        with pytest.raises(UnsupportedFeature, match=r"rpc.*database"):
            note.delay(str(path), "once")
        contract.tasks.note.delay(str(contract.path())).get(timeout=20)
        assert runs(path) == []
        return
    _ = contract.worker
    first = note.delay(str(path), "once")
    second = note.delay(str(path), word="once")
    assert (first.get(timeout=20), second.get(timeout=20)) == ("once", "once")
    third = note.delay(str(path), "once")  # after the end too
    assert {first.id} == {second.id, third.id}
    assert third.get(timeout=20) == "once"
    with pytest.raises(ArgumentsError, match="other arguments"):
        note.delay(str(path), "twice")
    assert [word for _, _, word in runs(path)] == ["once"]


def test_a_unique_task_waits_or_runs_once_at_a_time(qbridge_contract: Contract) -> None:
    """While it is queued or runs, whoever sends it is given the first handle; after its end it is sent again.

    Where results keep no claims such a task is refused when it is declared.
    """
    contract = qbridge_contract
    if not _claims(contract):

        def alone(path: str) -> None: ...

        with pytest.raises(UnsupportedFeature, match=r"alone is unique, and rpc"):
            contract.bridge.task(name="contracts.alone", unique=True)(alone)
        return
    _ = contract.worker
    path, release = contract.path(), contract.path("release")
    alone_ = contract.tasks.alone
    first = alone_.delay(str(path), str(release))
    assert alone_.delay(str(path), str(release)).id == first.id
    wait_until(lambda: runs(path), 20, what="the task to run")
    assert alone_.delay(str(path), release=str(release)).id == first.id
    release.touch()
    assert first.get(timeout=20) == 1
    again = alone_.delay(str(path), str(release))
    assert again.id != first.id
    assert again.get(timeout=20) == 2


def test_a_task_that_no_worker_saw_revoked_is_not_run(qbridge_contract: Contract) -> None:
    """It is revoked while no worker consumes its queue: the next one that does learns of it from the results.

    Where these remember nothing it runs, as in plain Celery.
    """
    contract = qbridge_contract
    contract.purge("idle")
    path = contract.path()
    unwanted = contract.tasks.note.using(queue="idle").delay(str(path), "unwanted")
    unwanted.revoke()
    wanted = contract.tasks.note.using(queue="idle").delay(str(path), "wanted")
    with contract.bridge.worker(pool="solo", queues=["idle"]):
        assert wanted.get(timeout=20) == "wanted"
        if _claims(contract):
            with pytest.raises(TaskRevoked):
                unwanted.get(timeout=20)
    if _claims(contract):
        assert [word for _, _, word in runs(path)] == ["wanted"]
        assert unwanted.state == "REVOKED"
    else:
        assert [word for _, _, word in runs(path)] == ["unwanted", "wanted"]


def test_a_running_task_ends_at_its_next_check_when_it_is_revoked(qbridge_contract: Contract) -> None:
    """``ctx.check()`` raises in a process of the pool, which hears no broadcast; the task is REVOKED.

    Where results remember nothing, it does so on the thread pool.
    """
    contract = qbridge_contract
    path = contract.path()
    if _claims(contract):
        _ = contract.worker
        result = contract.tasks.patient.delay(str(path))
        wait_until(lambda: runs(path), 20, what="the task to run")
        result.revoke()
        with pytest.raises(TaskRevoked, match="revoked while it ran"):
            result.get(timeout=20)
    else:
        with contract.bridge.worker(pool="thread", concurrency=1, queues=["inside"]):
            result = contract.tasks.patient.using(queue="inside").delay(str(path))
            wait_until(lambda: runs(path), 20, what="the task to run")
            result.revoke()
            with pytest.raises(TaskRevoked):
                result.get(timeout=20)
    assert len(runs(path)) == 1
