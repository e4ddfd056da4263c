"""What does a forked process keep of its parent's connections? Nothing: a server sees at once that a parent is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until

PLACES = [
    ("rabbitmq", "rpc"),
    ("rabbitmq", "postgresql"),
    ("rabbitmq", "mariadb"),
    ("redis", "redis"),
    ("embedded", "sqlite"),
]
CLIENT = """
import os, signal, time
from contextlib import suppress
from qbridge import Bridge, ResultTimeout
signal.alarm(120)
bridge = Bridge()

@bridge.task(name="never.run")
def work() -> int:
    return 1

with suppress(ResultTimeout):
    work.delay().get(timeout=1)
kept = bridge.celery.connection()  # one that the application made and uses
kept.default_channel.queue_declare(queue="kept")
child = os.fork()
if not child:
    signal.alarm(120)
    time.sleep(100)
print(child, flush=True)
time.sleep(100)
"""


def ends_of(pid: int) -> dict[str, str]:
    """The descriptors of a process, and what they are."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def sockets(pid: int) -> set[str]:
    """The sockets of a process, by their names in the kernel."""
    return {end for end in ends_of(pid).values() if end.startswith("socket:")}


def kinds(pid: int) -> list[str]:
    """What a process has open, in order: pipes, sockets, files."""
    return sorted(re.sub(r":\[\d+\]", "", end) for end in ends_of(pid).values())


def connected(names: set[str]) -> set[str]:
    """Which of the sockets are connections that their peer has not seen the end of."""
    inodes = {name.removeprefix("socket:[").removesuffix("]") for name in names}
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "01" and words[9] in inodes:
            found.add(words[1])
    return found


def still_connected(ends: set[str]) -> set[str]:
    """Which local ends are established, whoever has them."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return ends & {words[1] for words in lines if words[3] == "01"}


def children(pid: int) -> set[int]:
    """The living child processes of one."""
    told = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    lines = (line.split() for line in told.stdout.splitlines())
    return {int(child) for child, state in lines if not state.startswith("Z")}


def digits_in(log: Path) -> str | None:
    """The last line of a log that is a number: beside it there may be warnings."""
    found = re.findall(r"^\d+$", log.read_text(), re.MULTILINE)
    return found[-1] if found else None


def replaced(pid: int, victim: int) -> bool:
    """Whether a worker of four processes has another one for one that was killed."""
    found = children(pid)
    return victim not in found and len(found) == 4


def shares_no_socket(child: int, parent: int) -> bool:
    """Whether two processes have no socket in common."""
    return not sockets(child) & sockets(parent)


def has_pipes(pid: int, most: int) -> bool:
    """Whether a process has so many pipes at most."""
    return kinds(pid).count("pipe") <= most


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contract]:
    """A bridge whose broker and results nobody else uses."""
    broker, results = request.param
    with ExitStack() as stack:

        def url(kind: str) -> str:
            own = {
                "rpc": "rpc://",
                "embedded": f"embedded://{tmp_path / 'bridge.db'}",
                "sqlite": f"sqlite:///{tmp_path / 'results.db'}",
            }
            if kind in own:
                return own[kind]
            found: str = stack.enter_context(request.getfixturevalue(f"qbridge_{kind}").heal().fresh())
            return found

        first = url(broker)
        contract = Contract(first, first if results == broker else url(results), tmp_path)
        stack.callback(contract.close)
        yield contract


def test_a_process_in_anothers_place_has_no_more_than_the_first_ones(place: Contract) -> None:
    """It is forked from a parent that is connected by then, has an event loop, and pipes to the other processes."""
    with place.worker_of("fragile", pool="process", concurrency=4) as worker:
        jot, before = place.tasks.jot.using(queue="fragile"), place.path()
        for _ in range(40):
            jot.delay(str(before))
        wait_until(lambda: len(runs(before)) == 40, 30, what="the first tasks to run")
        first = children(worker.pid)
        most = max(kinds(child).count("pipe") for child in first)
        for victim in sorted(first)[:2]:
            os.kill(victim, signal.SIGKILL)
            wait_until(partial(replaced, worker.pid, victim), 30, what="another process in its place")
        for child in children(worker.pid):
            wait_until(partial(shares_no_socket, child, worker.pid), 5, what="no socket of the parent in a child")
            wait_until(partial(has_pipes, child, most), 5, what="no pipes of another process")
        after = place.path()
        for _ in range(40):
            jot.delay(str(after))
        wait_until(lambda: len(runs(after)) == 40, 30, what="the tasks after to run")


@pytest.mark.parametrize("place", PLACES[:-1], indirect=True, ids="-".join)
def test_a_server_sees_the_end_of_a_killed_process_whose_child_lives_on(place: Contract) -> None:
    """A connection ends with the last copy of its socket, which a child would keep for as long as it lives."""
    client = ChildProcess(
        [sys.executable, "-c", textwrap.dedent(CLIENT)],
        log=place.folder / "client.txt", env=place.process_environment(), cwd=place.folder,
    )  # fmt: skip
    child = 0
    try:
        said = wait_until(partial(digits_in, place.folder / "client.txt"), 30, what="the client to fork")
        child = int(said or 0)
        ends = connected(sockets(client.pid))
        assert len(ends) >= 2
        os.kill(client.pid, signal.SIGKILL)
        wait_until(lambda: not still_connected(ends), 5, what="the connections to end")
        os.kill(child, 0)
    finally:
        client.kill()
        if child:
            os.kill(child, signal.SIGKILL)
