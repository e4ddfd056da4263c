"""The examples, as their READMEs say to run them, against real servers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qbridge.testing.servers import RabbitMQServer, RedisServer, free_ports
from qbridge.testing.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = [sys.executable, "-m", "qbridge"]


def environment(**variables: str) -> dict[str, str]:
    """The environment of an example: this one without any QBRIDGE_ setting but the given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QBRIDGE_")}
    return {**kept, **variables}


@contextmanager
def running(
    command: list[str], folder: Path, env: Mapping[str, str], log: Path, ready: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends; the block begins when its log says that it is ready."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=dict(env), stdout=out, stderr=subprocess.STDOUT)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return re.search(ready, log.read_text()) is not None

        wait_until(is_ready, 60)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def run(command: list[str], folder: Path, env: Mapping[str, str]) -> str:
    """Run a program to its end and return what it printed."""
    done = subprocess.run(command, cwd=folder, env=dict(env), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_package_shows_a_slow_task_that_is_not_ready_and_then_is(
    qbridge_rabbitmq: RabbitMQServer, tmp_path: Path
) -> None:
    """RabbitMQ and rpc: submit five seconds of work, look at once, look later."""
    with qbridge_rabbitmq.fresh() as broker:
        env = environment(QBRIDGE_BROKER=broker, QBRIDGE_RESULTS="rpc://")
        folder = EXAMPLES / "package_rpc"
        with running([*PROGRAM, "worker", "-A", "longsum.tasks:bridge"], folder, env, tmp_path / "worker.log", "ready"):
            printed = run([sys.executable, "-m", "longsum.run"], folder, env)
    assert printed.splitlines() == ["ready at once: False", "ready now: True, the sum is 15"]


def test_web_app_gets_a_hundred_results_from_a_worker_that_shares_no_code(
    qbridge_rabbitmq: RabbitMQServer, qbridge_redis: RedisServer, tmp_path: Path
) -> None:
    """FastAPI, a remote task, four worker processes: 100 requests at once, each result in Redis under Celery's key."""
    folder = EXAMPLES / "fastapi_publisher"
    (port,) = free_ports(1)
    with qbridge_rabbitmq.fresh() as broker, qbridge_redis.fresh() as results:
        env = environment(QBRIDGE_BROKER=broker, QBRIDGE_RESULTS=results)
        worker = [*PROGRAM, "worker", "-A", "sum_tasks:bridge", "--concurrency", "4"]
        web = [sys.executable, "-m", "uvicorn", "webapp:api", "--host", "127.0.0.1", "--port", str(port)]
        with (
            running(worker, folder / "sumworker", env, tmp_path / "worker.log", "ready"),
            running(web, folder / "web", env, tmp_path / "web.log", "Application startup complete"),
        ):
            answers = asyncio.run(_ask(f"http://127.0.0.1:{port}/sum", 100))
            stored = qbridge_redis.client(results)
            keys = set(stored.keys("celery-task-meta-*"))
    assert [answer["sum"] for answer in answers] == [n + 2 * n for n in range(100)]
    assert {f"celery-task-meta-{answer['task_id']}" for answer in answers} <= keys


async def _ask(url: str, times: int) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=times)) as client:
        answers = await asyncio.gather(*(client.get(url, params={"a": n, "b": 2 * n}) for n in range(times)))
    assert [answer.status_code for answer in answers] == [200] * times
    return [answer.json() for answer in answers]


def test_processes_and_threads_each_take_their_queue_as_an_acl_user(qbridge_redis: RedisServer, tmp_path: Path) -> None:
    """Redis with an ACL user: the process pool computes, the thread pool waits."""
    folder = EXAMPLES / "cpu_and_io"
    user, password = f"bridge{uuid.uuid4().hex[:8]}", "s3cret"
    rules = re.search(r"ACL SETUSER bridge on (.*)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert rules is not None
    qbridge_redis.client().execute_command(
        "ACL", "SETUSER", user, "on", *(rule.strip("'").replace("s3cret", password) for rule in rules[1].split())
    )
    env = environment(
        QBRIDGE_BROKER=qbridge_redis.user_url(user, password, 7),
        QBRIDGE_RESULTS=qbridge_redis.user_url(user, password, 8),
    )
    worker = [*PROGRAM, "worker", "-A", "work:bridge"]
    with (
        running(
            [*worker, "--pool", "process", "--concurrency", "2", "--queues", "cpu"],
            folder,
            env,
            tmp_path / "cpu.log",
            "ready",
        ),
        running(
            [*worker, "--pool", "thread", "--concurrency", "16", "--queues", "io"],
            folder,
            env,
            tmp_path / "io.log",
            "ready",
        ),
    ):
        printed = run([sys.executable, "run.py"], folder, env)
    qbridge_redis.client().execute_command("ACL", "DELUSER", user)
    assert "cpu: 8 values from 2 processes" in printed
    assert re.search(r"io: [2-8] threads of 1 process", printed)


@pytest.mark.parametrize("folder", sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()))
def test_each_example_says_how_it_is_run(folder: str) -> None:
    """An example without a README is a riddle."""
    assert "```console" in (EXAMPLES / folder / "README.md").read_text()
