"""The embedded broker between real processes: nothing lost, nothing run twice, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.asynchronous import Hub

from qbridge.backends.embedded import register
from qbridge.backends.embedded.inspect import QueueState, queue_states
from qbridge.testing.waiting import wait_until

assert register.SCHEME == "embedded"

HERE = Path(__file__).parent
POOLS = ["solo", "prefork", "threads"]


class Cluster:
    """A broker's file in a folder of its own, and the processes on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.app = Celery(
            "embedded",
            broker=f"embedded://{folder}/bridge.db",
            backend=f"db+sqlite:///{folder}/results.db",
            set_as_current=False,
        )
        self.app.conf.task_create_missing_queues = True

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "EMBEDDED_TEST_FOLDER": str(self.folder), "PYTHONPATH": str(HERE)}
        with (self.folder / f"process{len(self.processes)}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def worker(self, name: str, *options: str, pool: str = "solo", concurrency: int = 2) -> subprocess.Popen[bytes]:
        """Start a worker, and wait until it consumes."""
        worker = self.start(
            *("-m", "celery", "-A", "embedded_app", "worker", "-n", f"{name}@test", "-P", pool),
            *("-c", str(concurrency), "-l", "INFO", *options),
        )
        log = self.folder / f"process{len(self.processes) - 1}.log"
        wait_until(lambda: f"{name}@test ready." in log.read_text(), 30, what=f"worker {name} to be ready")
        return worker

    def producer(self, name: str, count: int, batch: int = 0) -> subprocess.Popen[bytes]:
        return self.start(str(HERE / "embedded_app.py"), name, str(count), str(batch))

    def send(self, task: str, *arguments: Any, **options: Any) -> Any:
        return self.app.send_task(f"embedded_app.{task}", arguments, **options)

    def lines(self, kind: str) -> list[list[str]]:
        log = self.folder / "runs.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [words[1:] for words in lines if words[0] == kind]

    def ran(self) -> Counter[str]:
        return Counter(words[0] for words in self.lines("ran"))

    def queues(self) -> dict[str, QueueState]:
        return {state.name: state for state in queue_states(self.folder / "bridge.db")}

    def idle(self) -> bool:
        return all(state.ready == state.claimed == 0 for state in self.queues().values() if state.durable)

    def wait_idle(self, timeout: float = 60) -> None:
        wait_until(self.idle, timeout, what="all messages to be acknowledged")

    def stop(self) -> None:
        self.app.close()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                kill(process)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children the hard way, as a machine short of memory would."""
    family = [*children(process), process.pid]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    total = 0
    for pid in [process.pid, *children(process)]:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def test_every_task_of_many_producers_runs_exactly_once_on_many_workers(cluster: Cluster) -> None:
    """No kill, no loss, no second run: with every pool, single sends and batches at the same time."""
    for pool in POOLS:
        cluster.worker(pool, pool=pool)
    producers = [cluster.producer("a", 300), cluster.producer("b", 300), cluster.producer("c", 300, batch=50)]
    for producer in producers:
        assert producer.wait(60) == 0
    cluster.wait_idle()
    sent = Counter(words[0] for words in cluster.lines("sent"))
    assert len(sent) == 900
    assert sent == cluster.ran()


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_worker_is_killed_runs_again_on_another_one(cluster: Cluster, pool: str) -> None:
    """Within 3 seconds, marked as redelivered; what waited behind it is run too."""
    victim = cluster.worker("victim", pool=pool, concurrency=1)
    cluster.send("slow", "long", 60)
    wait_until(lambda: cluster.lines("began"), 10, what="the task to begin")
    for number in range(20):
        cluster.send("record", str(number))
    cluster.worker("heir", pool="threads")
    kill(victim)
    began = time.monotonic()
    wait_until(lambda: len(cluster.lines("began")) == 2, 10, what="the second run")
    assert time.monotonic() - began < 3
    first, second = cluster.lines("began")
    assert [first[0], second[0]] == ["long", "long"]
    assert (first[2:], second[2:]) == (["False"], ["True"])
    wait_until(lambda: len(cluster.ran()) == 20, 10, what="the other tasks")
    assert set(cluster.ran().values()) == {1}


def test_a_worker_started_later_takes_over_from_one_that_died_alone(cluster: Cluster) -> None:
    """Nobody was there to notice the death."""
    victim = cluster.worker("victim")
    cluster.send("slow", "long", 60)
    wait_until(lambda: cluster.lines("began"), 10, what="the task to begin")
    kill(victim)
    assert cluster.queues()["celery"].claimed == 1
    cluster.worker("heir")
    wait_until(lambda: len(cluster.lines("began")) == 2, 3, what="the second run")


def test_a_killed_child_of_a_prefork_worker_does_not_take_its_siblings_tasks_away(cluster: Cluster) -> None:
    """The worker lives, so its claims are its own: the other child's task ends undisturbed, and runs once."""
    worker = cluster.worker("prefork", pool="prefork", concurrency=2)
    cluster.worker("other", "-Q", "other")  # somebody who sweeps
    cluster.send("slow", "killed", 5)
    cluster.send("slow", "spared", 5)
    wait_until(lambda: len(cluster.lines("began")) == 2, 10, what="both tasks to begin")
    pids = {words[0]: int(words[1]) for words in cluster.lines("began")}
    assert set(pids.values()) <= set(children(worker))
    os.kill(pids["killed"], signal.SIGKILL)
    cluster.wait_idle()
    assert cluster.lines("ended").count(["spared", str(pids["spared"])]) == 1
    assert Counter(words[0] for words in cluster.lines("began"))["spared"] == 1


def test_a_stopped_worker_keeps_its_task(cluster: Cluster) -> None:
    """SIGSTOP is not death: nobody else may run the task, however long it takes."""
    frozen = cluster.worker("frozen")
    cluster.worker("other")
    # One of the two has it; the other one sweeps every second.
    cluster.send("slow", "long", 4)
    (began,) = wait_until(lambda: cluster.lines("began"), 10, what="the task to begin")
    holder = next(process for process in cluster.processes if process.pid == int(began[1]))
    holder.send_signal(signal.SIGSTOP)
    time.sleep(3.5)  # the absence of an event cannot be waited for
    assert len(cluster.lines("began")) == 1
    holder.send_signal(signal.SIGCONT)
    cluster.wait_idle()
    assert len(cluster.lines("ended")) == 1
    assert frozen.poll() is None


def test_a_warm_shutdown_finishes_its_task_and_returns_the_others(cluster: Cluster) -> None:
    """Nothing runs twice, nothing waits for a sweep."""
    leaving = cluster.worker("leaving", "--prefetch-multiplier", "10", pool="threads", concurrency=1)
    for number in range(5):
        cluster.send("slow", str(number), 1)
    wait_until(lambda: cluster.lines("began"), 10, what="the first task to begin")
    leaving.terminate()
    cluster.worker("heir", pool="threads", concurrency=4)
    cluster.wait_idle()
    assert leaving.wait(10) == 0
    assert Counter({str(number): 1 for number in range(5)}) == Counter(words[0] for words in cluster.lines("ended"))


def test_a_killed_producer_leaves_what_it_was_told_is_sent(cluster: Cluster) -> None:
    """Each task that a send returned for is run once; the broken one may be there or not, but not in part."""
    producer = cluster.producer("p", 100_000)
    wait_until(lambda: len(cluster.lines("sent")) > 200, 20, what="some sends")
    kill(producer)
    sent = {words[0] for words in cluster.lines("sent")}
    cluster.worker("w", "--prefetch-multiplier", "64")
    cluster.wait_idle(60)
    ran = cluster.ran()
    assert sent <= set(ran)
    assert len(ran) <= len(sent) + 1
    assert set(ran.values()) == {1}


def test_workers_killed_again_and_again_lose_nothing(cluster: Cluster) -> None:
    """At-least-once under a rain of SIGKILL, prefork children publishing included."""
    producer = cluster.producer("p", 400)
    for round_ in range(4):
        worker = cluster.worker(f"victim{round_}", pool="prefork" if round_ % 2 else "solo")
        cluster.send("spawn", f"s{round_}", 25)
        wait_until(lambda goal=50 * (round_ + 1): len(cluster.ran()) >= goal, 20, what="some runs")
        kill(worker)
    assert producer.wait(30) == 0
    cluster.worker("last", pool="threads", concurrency=4)
    cluster.wait_idle()
    ran = cluster.ran()
    expected = {f"p-{number}" for number in range(400)}
    expected |= {f"s{round_}" for round_ in range(4)} | {f"s{round_}.{n}" for round_ in range(4) for n in range(25)}
    assert expected == set(ran)
    assert sum(ran.values()) - len(ran) <= 4 * 5 * 26  # only what was in hand at a kill may have run twice


def test_tasks_sent_from_prefork_children_arrive(cluster: Cluster) -> None:
    """Children were forked from a parent that had the file open before (it is told to restart its pool)."""
    cluster.worker("w", "--max-tasks-per-child", "3", pool="prefork")
    for number in range(20):
        cluster.send("spawn", str(number), 5)
    cluster.wait_idle()
    wait_until(lambda: len(cluster.ran()) == 120, 10, what="all tasks")
    assert set(cluster.ran().values()) == {1}


def test_priorities_are_kept_between_processes(cluster: Cluster) -> None:
    """A queue filled while no worker runs is emptied high to low."""
    for number, priority in enumerate([1, 5, 9, 1, 5, 9, None]):
        cluster.send("record", f"{priority}-{number}", priority=priority)
    cluster.worker("w")
    cluster.wait_idle()
    assert ["9-2", "9-5", "5-1", "5-4", "None-6", "1-0", "1-3"] == [words[0] for words in cluster.lines("ran")]


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_answers_remote_control_while_it_works(cluster: Cluster, pool: str) -> None:
    """Ping, stats, revoke; and no temporary queue is left when the processes have gone, one of them killed."""
    worker = cluster.worker("one", pool=pool)
    killed = cluster.worker("two", pool=pool)
    if pool != "solo":
        cluster.send("slow", "a", 1)
    inspect = cluster.app.control.inspect(timeout=5, destination=["one@test", "two@test"])
    assert {"one@test", "two@test"} == set(inspect.ping() or {})
    assert {"one@test", "two@test"} == set(inspect.stats() or {})
    assert {"one@test", "two@test"} == set(inspect.active_queues() or {})
    kill(killed)
    wait_until(
        lambda: [name for name in cluster.queues() if not name.startswith("celery")] == ["one@test.celery.pidbox"],
        15,
        what="the queues of the dead worker and of the replies to go",
    )
    cluster.wait_idle()
    worker.terminate()
    assert worker.wait(15) == 0
    cluster.app.pool.force_close_all()  # it has asked, so it is a party too
    assert set(cluster.queues()) == {"celery"}
    assert list((cluster.folder / "bridge.db-parties").iterdir()) == []


def test_events_reach_another_process(cluster: Cluster) -> None:
    """Task and worker events, through the topic exchange; without a listener they pile up nowhere."""
    cluster.worker("w", "-E")
    cluster.send("record", "unseen")
    cluster.wait_idle()
    assert not any(state.ready for state in cluster.queues().values())
    awaited = {"task-received", "task-started", "task-succeeded"}

    def on_event(event: dict[str, Any]) -> None:
        awaited.discard(event["type"])
        receiver.should_stop = not awaited

    with cluster.app.connection() as connection:
        receiver = cluster.app.events.Receiver(connection, handlers={"*": on_event})
        receiver.on_consume_ready = lambda *args, **kwargs: cluster.send("record", "seen")
        receiver.capture(limit=100, timeout=10)
    assert awaited == set()


@pytest.mark.parametrize("pool", [*POOLS, "gevent"])
def test_a_round_trip_is_quick_and_an_idle_worker_is_idle(cluster: Cluster, pool: str, record_property: Any) -> None:
    """Through another process and back, the reading of the result included; also for a worker that has dozed off."""
    if pool == "gevent":
        pytest.importorskip("gevent")
    worker = cluster.worker("w", pool=pool)
    times = []
    for number in range(60):
        if number % 20 == 0:
            time.sleep(0.5)  # let the worker fall asleep: the pause is what is measured
        began = time.monotonic()
        result = cluster.send("add", number, 1, ignore_result=False)
        assert result.get(timeout=10, interval=0.001) == number + 1
        times.append(1000 * (time.monotonic() - began))
    used = cpu_seconds(worker)
    time.sleep(3)  # idleness is measured over time
    idle = (cpu_seconds(worker) - used) / 3
    times.sort()
    record_property("round_trip_ms", {"p50": times[30], "max": times[-1]})
    record_property("idle_cpu", idle)
    assert times[30] < 100
    assert idle < 0.1


def test_the_worker_survives_the_loss_of_its_place(cluster: Cluster) -> None:
    """Someone deletes the folder of the parties: the worker registers again and goes on."""
    cluster.worker("w")
    for file in (cluster.folder / "bridge.db-parties").iterdir():
        file.unlink()
    cluster.worker("other", "-Q", "other")  # finds the first one dead, by its missing lock
    cluster.send("record", "after")
    wait_until(lambda: cluster.ran() == {"after": 1}, 15, what="the task")


def test_the_worker_survives_the_deletion_of_the_file(cluster: Cluster) -> None:
    """A new file is made, declared anew, and consumed."""
    cluster.worker("w")
    for file in cluster.folder.glob("bridge.db*"):
        if file.is_file():
            file.unlink()
    wait_until(
        lambda: (cluster.folder / "bridge.db").exists() and cluster.queues().get("celery", None) is not None,
        15,
        what="the new file",
    )
    cluster.send("record", "after")
    wait_until(lambda: cluster.ran() == {"after": 1}, 15, what="the task")


def test_forking_with_a_hub_running_disturbs_nobody(cluster: Cluster) -> None:
    """A consumer forks in the middle of its work: it still gets every message, its child gets none."""
    hub = Hub()
    got: list[int] = []
    with cluster.app.connection() as connection:
        connection.connect()
        connection.register_with_event_loop(hub)
        queue = connection.SimpleQueue("simple")
        queue.consumer.callbacks = [lambda body, message: (got.append(body["n"]), message.ack())]
        queue.consumer.consume()
        producer = cluster.app.connection().Producer()
        for number in range(30):
            producer.publish({"n": number}, routing_key="simple")
            if number % 10 == 5:
                pid = os.fork()
                if pid == 0:  # in the child
                    time.sleep(0.2)
                    os._exit(len(got) != number)
                hub.run_once()
                os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while len(got) < 30 and time.monotonic() < deadline:
            hub.run_once()
    hub.close()
    assert got == list(range(30))
