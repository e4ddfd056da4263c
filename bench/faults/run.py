"""How is one cell run? Servers, workers and sender are started, the story happens, and the evidence is gathered."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.cells import CONCURRENCY, PREFETCH, Cell
from bench.faults.fleet import Fleet
from bench.faults.judge import Evidence, Happened, Verdict, judge, runs_of
from bench.faults.place import Place
from bench.faults.recorder import RunLog, pid_of
from bench.faults.sender import Sender
from bench.faults.story import OF_WORKERS, OUTAGES, Event, Story
from bench.faults.submit import ENOUGH, read_sent
from bench.faults.work import RUNS
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.servers.process import ChildProcess

__all__ = ["Load", "run"]

_ROOT = Path(__file__).parents[2]
_LOOK = 0.05
"""Seconds between two looks at which processes live."""
_PATIENCE = 60.0
"""Seconds to wait for all workers but one to consume before another is killed, and for all before a server is."""
_BACKLOG = 100
"""Calls that are sent and have not run, beyond which the sender waits while the workers get on with them."""
_QUIET = 16.0
"""Seconds in which nothing happens although all workers consume: what has not run by then will not."""
_LATELY = 6.0
"""Seconds before the last send in which a worker that does not stand still begins a task."""
_SENDERS_PATIENCE = 120.0
"""Seconds for the sender to begin, and for it to end when it should have ended."""
_LATEST = 120.0
"""Seconds after the last send until which everything must have run, whatever still happens."""


@dataclass(frozen=True)
class Load:
    """What a cell is run with.

    Args:
        tasks: calls to send, at least: they come until the story is over.
        rate: calls a second.
        seed: of all that is random.
        quiet: seconds in which nothing happens, after which the run is over.
    """

    tasks: int
    rate: float
    seed: int
    quiet: float = _QUIET


class _Watch:
    """A thread that looks which processes live, which calls are done, and whether the sender should wait."""

    def __init__(self, folder: Path, log: RunLog, fleet: Fleet) -> None:
        self._folder = folder
        self._log = log
        self._fleet = fleet
        self._alive: dict[int, float] = {}
        self.last_seen: dict[int, float] = {}
        self.lock = threading.Lock()
        self._ending = threading.Event()
        self._sent = (0, 0)  # bytes of the sender's log that were read, and calls confirmed in them
        self._progress: deque[tuple[float, int]] = deque(maxlen=40)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        while not self._ending.wait(_LOOK):
            self._look_at_processes()
            turn += 1
            if turn % 4 == 0:
                with self.lock:
                    self._log.look()
                self._hold()

    def _look_at_processes(self) -> None:
        now = time.monotonic()
        for path in list(self._log.lines):
            pid = pid_of(path)
            if pid not in self.last_seen:
                if _lives(pid):
                    self._alive[pid] = now
                else:
                    self.last_seen[pid] = self._alive.get(pid, 0.0)

    def _hold(self) -> None:
        now, done = time.monotonic(), len(self._log.done)
        self._progress.append((now, done))
        confirmed = self._confirmed()
        gets_on = any(at > now - 3 and before < done for at, before in self._progress)
        hold = self._folder / "hold"
        if gets_on and confirmed - done > _BACKLOG:
            hold.touch()
        else:
            hold.unlink(missing_ok=True)

    def _confirmed(self) -> int:
        at, confirmed = self._sent
        with suppress(FileNotFoundError), (self._folder / "sent.log").open("rb") as file:
            file.seek(at)
            new = file.read()
            self._sent = (at + len(new), confirmed + new.count(b"C"))
        return self._sent[1]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def run(cell: Cell, story: Story, load: Load, folder: Path, rabbitmq: RabbitMQServer | None = None) -> Verdict:
    """Run a cell.

    Args:
        cell: which.
        story: what happens in it.
        load: what is sent.
        folder: an empty one, for its files.
        rabbitmq: a private server to use; None: one of its own.

    Returns:
        What became of the calls.
    """
    (folder / "runs").mkdir()
    with Place(cell, folder, rabbitmq) as place:
        fleet = Fleet(cell, _environment(cell, place, folder, place.url_of_workers), folder)
        log = RunLog(folder / "runs")
        try:
            fleet.start(story.workers)
            watch = _Watch(folder, log, fleet)
            try:
                happened, still = _tell(cell, place, fleet, log, watch, story, load, folder)
            finally:
                watch.close()
        finally:
            fleet.end()
        ended = time.monotonic()
        time.sleep(_LOOK)
        log.look()
        left, dead = place.left()
        sends = read_sent(folder / "sent.log")
        runs = runs_of(log.lines, watch.last_seen, ended)
        stored = place.stored([sent.number for sent in sends])
    (folder / "happened.json").write_text(json.dumps([[h.act, h.began, h.ended, sorted(h.pids)] for h in happened]))
    held = story.workers * CONCURRENCY[cell.pool] * PREFETCH
    verdict = judge(Evidence(sends, runs, happened, left, dead, stored, still, fleet.fell, held))
    (folder / "verdict.json").write_text(json.dumps(asdict(verdict), default=sorted))
    return verdict


def _environment(cell: Cell, place: Place, folder: Path, broker: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QBRIDGE_", "CELERY_"))}
    return {
        **kept,
        "FAULTS_SYSTEM": cell.system,
        "FAULTS_BROKER": broker,
        "FAULTS_RESULTS": place.results_url,
        "FAULTS_POOL": cell.pool,
        "FAULTS_CONCURRENCY": "1",
        RUNS: str(folder / "runs"),
    }


def _tell(
    cell: Cell, place: Place, fleet: Fleet, log: RunLog, watch: _Watch, story: Story, load: Load, folder: Path
) -> tuple[list[Happened], int]:
    told = {"system": cell.system, "folder": str(folder), "tasks": load.tasks, "rate": load.rate, "seed": load.seed}
    process = ChildProcess(
        [sys.executable, "-m", "bench.faults.submit", json.dumps(told)],
        log=folder / "sender.txt",
        env=_environment(cell, place, folder, place.url_of_sender),
        cwd=_ROOT,
    )
    sender = Sender(process, str(cell), _SENDERS_PATIENCE)
    try:
        while not read_sent(folder / "sent.log") and sender.sends:
            time.sleep(_LOOK)
        began, shift = time.monotonic(), 0.0
        sender.give(float("inf"))
        happened: list[Happened] = []
        away = False
        for event in story.events:
            due = began + shift + event.at
            while (now := time.monotonic()) < due or (
                not away and now < due + _PATIENCE and not _may_happen(event, fleet)
            ):
                fleet.supervise()
                time.sleep(_LOOK)
            one = _do(event, place, fleet, log, watch)
            happened.append(one)
            away = event.act in OUTAGES or (away and event.act not in OUTAGES.values())
            # a server takes seconds to start, a worker too on a busy machine: what follows keeps its distance
            shift = max(shift, (one.ended if event.act == "start_broker" else one.began) - began - event.at - 2 * _LOOK)
        ends = began + shift + story.length
        # it is held up while a broker is away and while workers are behind: three times as long as planned is enough
        sender.give(max(ends, began + 3 * load.tasks / load.rate) + _SENDERS_PATIENCE)
        still = _drain(ends, sender, fleet, log, watch, load, folder)
        sender.demand_success()
    finally:
        sender.kill()
    return happened, still


def _may_happen(event: Event, fleet: Fleet) -> bool:
    """Whether enough workers are there: what a worker needs to start is not what the rest need to go on."""
    return fleet.is_well if event.act in OF_WORKERS else fleet.all_consume


def _do(event: Event, place: Place, fleet: Fleet, log: RunLog, watch: _Watch) -> Happened:
    began = time.monotonic()
    pids: frozenset[int] = frozenset()
    if event.act == "kill_child":
        with watch.lock:
            log.look()
            busy = log.busy()
        pids = fleet.kill_child(event.worker, busy)
    elif hasattr(fleet, event.act):
        pids = getattr(fleet, event.act)(event.worker)
    else:
        getattr(place, event.act)()
    return Happened(event.act, began, time.monotonic(), pids)


def _drain(until: float, sender: Sender, fleet: Fleet, log: RunLog, watch: _Watch, load: Load, folder: Path) -> int:
    """Wait until everything has run, or nothing happens any more; return how many workers stood still at the end."""
    seen, changed, sent_at = 0, time.monotonic(), 0.0
    while True:
        fleet.supervise()
        time.sleep(_LOOK * 4)
        now = time.monotonic()
        with watch.lock:
            total, done = log.total, set(log.done)
        if total != seen or not fleet.all_consume:
            seen, changed = total, now
        if now >= until:
            (folder / ENOUGH).touch()
        if sender.sends or now < until:
            sent_at = now
            continue
        confirmed = {sent.number for sent in read_sent(folder / "sent.log") if sent.outcome == "C"}
        if confirmed <= done or now - changed > load.quiet or now - sent_at > _LATEST:
            break
    with watch.lock:
        log.look()
    return _standing_still(fleet, log, sent_at)


def _standing_still(fleet: Fleet, log: RunLog, sent_at: float) -> int:
    """Workers that consumed while the last tasks came, and began none of them."""
    began = sent_at - _LATELY
    lately = {pid_of(path) for path, lines in log.lines.items() if any(line.at > began for line in lines[-100:])}
    long_ago = time.monotonic() - began + 1
    return sum(not tree & lately for place, tree in enumerate(fleet.trees()) if fleet.consumes_for(place) > long_ago)
