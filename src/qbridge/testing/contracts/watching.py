"""Does what watches Celery see a bridge: signals, events, remote control, results read by id?"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, signals

from qbridge import ResultsUnavailable
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

_OURS = "qbridge.testing.contract_app.tasks."


def _elsewhere(contract: Contract, *words: str) -> Any:
    """Run ``qbridge.testing.contract_app.elsewhere`` and return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "qbridge.testing.contract_app.elsewhere", *words],
        env=contract.process_environment(),
        cwd=contract.folder,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_result_is_read_by_id_from_another_process(qbridge_contract: Contract) -> None:
    """``bridge.result(id, task)`` gives the typed value; over rpc it refuses at once, naming backends that can."""
    contract = qbridge_contract
    result = contract.tasks.echo_uuid.delay(value := uuid4())
    assert result.get(timeout=20) == value
    said = _elsewhere(contract, "read", result.id)
    if contract.readable_elsewhere:
        assert said == {"value": str(value), "type": "UUID"}
    else:
        assert said["error"] == "ResultsUnavailable"
        assert said["seconds"] < 2
        assert "redis" in said["text"].lower() or "database" in said["text"].lower()
    own = contract.bridge.result(result.id, contract.tasks.echo_uuid)
    if contract.readable_elsewhere:
        assert own.get(timeout=20) == value


def test_forked_processes_do_not_mix_their_results(qbridge_contract: Contract) -> None:
    """A parent that has sent forks four children; each sends and gets its own results, and so does the parent."""
    said = _elsewhere(qbridge_contract, "fork", "4", "10")
    assert said == {"children": [0, 0, 0, 0], "parent": True}


def test_signals_fire_in_sender_and_worker(qbridge_contract: Contract) -> None:
    """The signals around a publish and a run fire as with plain Celery."""
    contract = qbridge_contract
    seen: list[tuple[str, str]] = []

    def remember(signal: str) -> Any:
        def receiver(sender: Any = None, **_: Any) -> None:
            seen.append((signal, str(getattr(sender, "name", sender))))

        return receiver

    names = ["before_task_publish", "after_task_publish", "task_prerun", "task_postrun", "task_success", "task_failure"]
    receivers = {name: remember(name) for name in names}
    for name, receiver in receivers.items():
        getattr(signals, name).connect(receiver, weak=False)
    try:
        with contract.bridge.worker(pool="thread", concurrency=1, queues=["inside"]):
            assert contract.tasks.add.using(queue="inside").delay(1).get(timeout=20) == 11
            with pytest.raises(KeyError):
                contract.tasks.fail.using(queue="inside").delay("builtin").get(timeout=20)
            wait_until(lambda: len(seen) >= 10, 10, what="ten signals")
    finally:
        for name, receiver in receivers.items():
            getattr(signals, name).disconnect(receiver)
    add, fail = f"{_OURS}add", f"{_OURS}fail"
    for name in ("before_task_publish", "after_task_publish", "task_prerun", "task_postrun"):
        assert [sender for signal, sender in seen if signal == name] == [add, fail], name
    assert [sender for signal, sender in seen if signal == "task_success"] == [add]
    assert [sender for signal, sender in seen if signal == "task_failure"] == [fail]


def test_a_plain_event_receiver_hears_of_tasks(qbridge_contract: Contract) -> None:
    """A ``celery.Celery`` without qbridge receives the events of a bridge's worker, once they are turned on."""
    contract = qbridge_contract
    plain = Celery(broker=contract.bridge.config.broker.celery_url(), set_as_current=False)
    heard: list[dict[str, Any]] = []
    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        with plain.connection_for_read() as connection:
            receiver = plain.events.Receiver(connection, handlers={"*": heard.append})
            with receiver.consumer_context() as (consuming, _, _):
                listening.set()
                while not done.is_set():
                    with suppress(TimeoutError):
                        consuming.drain_events(timeout=0.2)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    worker = contract.worker.name
    try:
        assert listening.wait(20)
        contract.bridge.celery.control.enable_events(destination=[worker], reply=True, timeout=10)
        result = contract.tasks.add.delay(1)
        assert result.get(timeout=20) == 11
        kinds = {"task-received", "task-started", "task-succeeded"}
        wait_until(
            lambda: kinds <= {event["type"] for event in heard if event.get("uuid") == result.id}, 20, what="events"
        )
    finally:
        contract.bridge.celery.control.disable_events(destination=[worker], reply=True, timeout=10)
        done.set()
        thread.join(10)
        plain.close()
    received = next(event for event in heard if event["type"] == "task-received" and event["uuid"] == result.id)
    assert received["name"] == f"{_OURS}add"


def test_celery_inspect_is_answered(qbridge_contract: Contract) -> None:
    """``ping``, ``registered`` and ``active`` answer with the worker's tasks."""
    contract = qbridge_contract
    worker = contract.worker.name
    assert "%" not in worker  # started with --name …@%h
    inspect = contract.bridge.celery.control.inspect(destination=[worker], timeout=10)
    assert inspect.ping() == {worker: {"ok": "pong"}}
    assert f"{_OURS}add" in inspect.registered()[worker]
    release, path = contract.path("release"), contract.path()
    result = contract.tasks.hold.delay(str(path), str(release))
    try:
        active: Any = wait_until(lambda: (inspect.active() or {}).get(worker), 20, what="the active task")
        assert [task["id"] for task in active] == [result.id]
    finally:
        release.touch()
    assert result.get(timeout=20) == 1


def test_waiting_inside_a_task_is_refused(qbridge_contract: Contract) -> None:
    """``get()`` in a running task raises: a pool full of waiting tasks would stand still."""
    with pytest.raises(RuntimeError, match="inside a task"):
        qbridge_contract.tasks.wait_inside.delay().get(timeout=20)


def test_an_rpc_id_of_another_process_is_refused_at_once(qbridge_contract: Contract) -> None:
    """``bridge.result`` of an id never seen here raises over rpc, and is pending elsewhere."""
    contract = qbridge_contract
    began = time.monotonic()
    if contract.readable_elsewhere:
        assert contract.bridge.result("never-sent").state == "PENDING"
    else:
        with pytest.raises(ResultsUnavailable):
            contract.bridge.result("never-sent")
    assert time.monotonic() - began < 3
