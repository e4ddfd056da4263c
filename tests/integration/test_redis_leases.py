"""Does a task on Redis run once while its worker lives, and elsewhere when it does not; is a delayed one kept?"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from qbridge import Bridge, BridgeConfig
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

LEASE = 1.5
SETTINGS = {"QBRIDGE_BROKER__LEASE": str(LEASE)}
QUEUE = "fragile"


@pytest.fixture
def contract(qbridge_redis: RedisServer, tmp_path: Path) -> Iterator[Contract]:
    """A bridge and workers on an empty Redis."""
    with qbridge_redis.heal().fresh() as url:
        contract = Contract(url, url, tmp_path)
        try:
            yield contract
        finally:
            contract.close()


def rescuer(contract: Contract) -> Any:
    """Another worker, in this process."""
    bridge = contract.another_bridge(broker={"lease": LEASE})
    contract.declare_on(bridge)
    return bridge.worker(pool="thread", concurrency=2, queues=[QUEUE])


@pytest.mark.parametrize("pool", ["solo", "thread", "process"])
def test_a_task_longer_than_the_lease_runs_once(pool: str, contract: Contract) -> None:
    """Whatever keeps the worker's main thread busy, its lease is renewed; nobody takes the task over."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool=pool, settings=SETTINGS), rescuer(contract):
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        time.sleep(3 * LEASE)  # the length of the task
        release.touch()
        assert 1 == result.get(timeout=20)
    assert 1 == len(runs(path))


def test_a_stopped_workers_task_runs_elsewhere_and_its_own_end_changes_nothing(contract: Contract) -> None:
    """A worker that stands still past its lease loses its claim; its late acknowledgement is refused and logged."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="solo", settings=SETTINGS) as worker:
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        os.kill(runs(path)[0][0], signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            with rescuer(contract):
                wait_until(lambda: len(runs(path)) == 2, 20, what="the second run")
                assert time.monotonic() - stopped < 3 * LEASE + 5
                os.kill(runs(path)[0][0], signal.SIGCONT)
                wait_until(lambda: "lease of this worker had ended" in worker.log.read_text(), 20, what="the warning")
                release.touch()
                assert 2 == result.get(timeout=20)
                wait_until(lambda: "had been taken over" in worker.log.read_text(), 20, what="the refused end")
        finally:
            os.kill(runs(path)[0][0], signal.SIGCONT)
    assert 2 == len(runs(path))


def test_a_frozen_redis_costs_nobody_a_claim(contract: Contract, qbridge_redis: RedisServer) -> None:
    """After it everybody has one whole lease to renew before anything is taken over."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="thread", settings=SETTINGS), rescuer(contract):
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        qbridge_redis.freeze()
        try:
            time.sleep(2 * LEASE)  # the length of the fault
        finally:
            qbridge_redis.thaw()
        time.sleep(2 * LEASE)
        assert 1 == len(runs(path))
        release.touch()
        assert result.get(timeout=20) in {1, 2}


def test_workers_that_are_killed_at_random_lose_nothing(contract: Contract) -> None:
    """``kill -9`` in the middle of a drain, again and again: every task has run in the end."""
    path, count = contract.path(), 1000

    calls = [(str(path), str(number)) for number in range(count)]
    contract.tasks.note.using(queue=QUEUE).send_many(calls)
    luck = random.Random(7)
    for _ in range(3):
        before = len(runs(path))
        with contract.worker_of(QUEUE, pool="solo", settings=SETTINGS) as worker:
            wait_until(
                lambda low=before: len(runs(path)) > low + luck.randrange(50), 20, what="some runs", interval=0.001
            )
            worker.kill()
    with rescuer(contract):
        wait_until(lambda: len({word for _, _, word in runs(path)}) == count, 60, what="the rest")
    assert {str(number) for number in range(count)} == {word for _, _, word in runs(path)}
    # each kill may repeat what was run and not yet acknowledged: at most what was claimed at once
    assert count <= len(runs(path)) <= count + 3 * 64


def test_a_run_that_outlives_its_connection_is_acknowledged() -> None:
    """Redis was away when the connection ended, so nothing went back; once it is there, the end of the run counts."""
    with (
        RedisServer(appendonly=True) as server,
        Bridge(BridgeConfig(broker=server.url, results="disabled://")) as bridge,
    ):

        @bridge.task(results=False)
        def work() -> None:
            """Do nothing."""

        work.delay()
        taken: list[Any] = []
        connection = bridge.celery.connection_for_read()
        consumer = connection.Consumer([bridge.celery.amqp.queues["default"]], on_message=taken.append)
        consumer.consume()
        while not taken:
            connection.drain_events(timeout=20)
        server.stop()
        with suppress(Exception):  # as the worker does: the connection is broken, and is let go
            connection.collect()
        server.start()
        with server.client() as client:
            assert client.hlen("qbridge.claims") == 1
            taken[0].ack()
            assert client.hlen("qbridge.claims") == client.hlen("unacked") == client.llen("default") == 0


def test_a_delayed_task_is_kept_by_the_server(contract: Contract, qbridge_redis: RedisServer) -> None:
    """Its worker may be killed meanwhile: it runs once, by another, when its time has come; not before."""
    path = contract.path()
    with contract.worker_of(QUEUE, settings=SETTINGS) as worker:
        sent = time.time()
        result = contract.tasks.note.using(queue=QUEUE, countdown=8).delay(str(path), "late")
        worker.kill()
    with rescuer(contract):
        assert "late" == result.get(timeout=20)
    ((_, when, _),) = runs(path)
    assert 7.9 <= when - sent < 8 + 2


def test_a_short_delay_is_kept(contract: Contract) -> None:
    """Half a second is half a second."""
    path = contract.path()
    with rescuer(contract):
        sent = time.time()
        assert "soon" == contract.tasks.note.using(queue=QUEUE, countdown=0.5).delay(str(path), "soon").get(timeout=10)
    ((_, when, _),) = runs(path)
    assert 0.45 <= when - sent < 1.5


def test_far_off_tasks_wait_on_the_server_and_hold_nobody_up(contract: Contract, qbridge_redis: RedisServer) -> None:
    """None of them is in a worker's hands; those sent after them run at once; a purge takes them too."""
    path = contract.path()
    with rescuer(contract):  # from now on there is somebody who looks at the schedule
        contract.tasks.note.using(queue=QUEUE).delay(str(contract.path())).get(timeout=20)
    contract.tasks.jot.using(queue=QUEUE, countdown=3600).send_many([(str(path),)] * 5000)
    contract.tasks.jot.using(queue=QUEUE).send_many([(str(path),)] * 100)
    with rescuer(contract), qbridge_redis.client(contract.bridge.config.broker.celery_url()) as client:
        began = time.monotonic()
        wait_until(lambda: len(runs(path)) == 100, 20, what="the immediate ones")
        assert time.monotonic() - began < 5
        wait_until(lambda: client.hlen("unacked") == 0, 5, what="the acknowledgements")
        assert 5000 == client.zcard("qbridge.schedule")
    contract.purge(QUEUE)
    with qbridge_redis.client(contract.bridge.config.broker.celery_url()) as client:
        assert 0 == client.zcard("qbridge.schedule") == client.hlen("qbridge.scheduled")


def test_every_key_has_the_prefix_and_nothing_is_left(contract: Contract, qbridge_redis: RedisServer) -> None:
    """Several applications share a database; a claim that ended leaves no trace."""
    bridge = contract.another_bridge(broker={"key_prefix": "shop:"}, results="disabled://")
    tasks, path = contract.declare_on(bridge), contract.path()
    with bridge.worker(pool="thread", queues=[QUEUE]):
        tasks.jot.using(queue=QUEUE).delay(str(path))
        tasks.jot.using(queue=QUEUE, countdown=0.3).delay(str(path))
        wait_until(lambda: len(runs(path)) == 2, 20, what="both runs")
    bridge.close()
    with qbridge_redis.client(contract.bridge.config.broker.celery_url()) as client:
        keys = {key.decode() if isinstance(key, bytes) else str(key) for key in client.keys("*")}
        assert set() == {key for key in keys if not key.startswith("shop:")}
        left = {key for key in keys if key.partition("qbridge.")[2] in {"claims", "again", "schedule", "scheduled"}}
        assert set() == left | (keys & {"shop:unacked", "shop:unacked_index"})


def test_what_waits_behind_a_running_task_was_not_begun(contract: Contract, qbridge_redis: RedisServer) -> None:
    """A solo worker holds a whole batch while its first task runs; ended within it, it gives all back, none as lost."""
    path, release = contract.path(), contract.path("release")
    contract.tasks.hold.using(queue=QUEUE).send_many([(str(path), str(release))] * 10)
    settings = {**SETTINGS, "QBRIDGE_WORKER__PREFETCH": "10", "QBRIDGE_WORKER__SHUTDOWN_TIMEOUT": "0.5"}
    with (
        contract.worker_of(QUEUE, pool="solo", settings=settings) as worker,
        qbridge_redis.client(contract.bridge.config.broker.celery_url()) as client,
    ):
        wait_until(lambda: runs(path), 20, what="the first task to run")
        assert client.hlen("qbridge.claims") == 10
        worker.ask_to_stop()
        assert worker.wait(20) == 0
        assert client.llen(QUEUE) == 10
        assert ["1 0"] * 10 == client.hvals("qbridge.again")
    assert len(runs(path)) == 1


def test_what_was_broadcast_may_be_anything(contract: Contract, qbridge_redis: RedisServer) -> None:
    """Remote control is a channel on which anybody may publish: the worker is still there, for it and for tasks."""
    url = contract.bridge.config.broker.celery_url()
    channel = f"/{url.rpartition('/')[2]}.celery.pidbox"
    with contract.worker_of(QUEUE, pool="solo", settings=SETTINGS) as worker, qbridge_redis.client(url) as client:
        for number, garbage in enumerate(["5", "[]", '"text"', "no JSON", '{"properties": 1}', '{"body": "bm8="}']):
            assert client.publish(channel, garbage) == 1
            assert contract.tasks.add.using(queue=QUEUE).delay(number).get(timeout=20) == number + 10
        assert len(contract.bridge.celery.control.ping(timeout=5, limit=1)) == 1
        assert "Threw away an item of" in worker.log.read_text()
        assert "onnection" not in worker.log.read_text().partition("Threw away")[2], "nothing was set up again"


@pytest.mark.parametrize(
    "headers", ['["task"]', '"xtask"', "5", '{"task": "t", "id": {"__type__": "decimal", "__value__": "x"}}']
)
def test_an_item_that_only_looks_like_a_message_ends_no_worker(
    headers: str, contract: Contract, qbridge_redis: RedisServer
) -> None:
    """It is thrown away, and not handed to the next worker; the task behind it runs, and nothing stays claimed."""
    url = contract.bridge.config.broker.celery_url()
    with contract.bridge.worker(pool="solo", queues=[QUEUE]):
        contract.tasks.add.using(queue=QUEUE).delay(1).get(timeout=20)
        with RedisServer.at(url).client() as client:
            properties = '{"delivery_tag": "odd", "body_encoding": "base64", "delivery_info": {}, "priority": 0}'
            client.lpush(QUEUE, f'{{"body": "bm8=", "headers": {headers}, "properties": {properties}}}')
            assert contract.tasks.add.using(queue=QUEUE).delay(2).get(timeout=20) == 12
            wait_until(lambda: not client.hlen("qbridge.claims"), 10, what="nothing to be claimed")
            assert not client.hlen("unacked")


def test_an_account_that_may_not_write_streams_sends_once(contract: Contract, qbridge_redis: RedisServer) -> None:
    """What wakes a consumer is refused before anything is sent; then the message goes the plain way, one time."""
    config = contract.bridge.config.broker
    with RedisServer.at(config.celery_url()).client() as client:
        client.execute_command("ACL", "SETUSER", "sender", "reset", "on", ">pw", "~*", "&*", "+@all", "-xadd")
        try:
            sender = contract.another_bridge(broker={"username": "sender", "password": SecretStr("pw")})
            tasks = contract.declare_on(sender)
            tasks.add.using(queue=QUEUE).delay(1)
            assert client.llen(QUEUE) == 1
        finally:
            client.execute_command("ACL", "DELUSER", "sender")
