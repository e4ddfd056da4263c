"""``qbridge demo``: start a worker, tell the story, show what was true, leave nothing behind."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from importlib import import_module
from types import FrameType

import click

from qbridge.cli.demo.cleaning import sweep
from qbridge.cli.demo.place import Place, prepared
from qbridge.cli.demo.steps import STEPS, Row, Scene, told
from qbridge.cli.demo.telling import Teller
from qbridge.cli.demo.worker_process import WorkerDied, WorkerProcess
from qbridge.cli.screen import screen

__all__ = ["demo"]

LIMIT = 60.0
"""Seconds for everything."""
_ENDING = 20.0
"""Of these, seconds that ending the worker and cleaning up may take."""


@click.command()
@click.option("--broker", metavar="URL", help="Where messages go; default: an embedded broker, no server needed.")
@click.option("--results", metavar="URL", help="Where results are kept; default: an SQLite file.")
def demo(broker: str | None, results: str | None) -> None:
    """Show the whole story on a real worker process.

    Nothing needs to be installed or started. Everything shown is compared with what had to come: the exit code is 0
    only if all of it was true. The files of the demo are in a temporary folder; on a server it uses a queue of its
    own, and removes it.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _interrupt)
    with prepared(broker, results) as place:
        sys.exit(_run(place))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(place: Place) -> int:
    deadline = time.monotonic() + LIMIT - _ENDING
    teller = Teller(screen())
    warnings.simplefilter("ignore")  # of libraries: this is a program's output
    tasks = import_module("qbridge.cli.demo.tasks")
    bridge = tasks.bridge
    where = bridge.config.broker.safe_url(), bridge.config.results.safe_url()
    teller.opening(*where)
    problems = [finding for finding in bridge.check().findings if finding.level == "error"]
    if problems:
        teller.problems(problems)
        return 1
    worker = WorkerProcess(place.log)
    scene = Scene(tasks, teller, deadline, worker.refuse_dead)
    rows: list[Row] = []
    trouble = ""
    try:
        with worker:
            started = time.monotonic()
            with teller.waiting("starting a worker process"):
                worker.wait_until_ready(min(30.0, scene.left))
            teller.worker(worker.pid, time.monotonic() - started)
            for step in STEPS:
                rows.append(told(step, scene))  # noqa: PERF401 - what was shown before an end is shown
    except WorkerDied as error:
        trouble = str(error)
    finally:
        sweep(bridge, scene.sent)
    if rows:
        teller.table(rows, *where)
    good = not trouble and len(rows) == len(STEPS) and all(row.true for row in rows)
    if not good:
        place.keep = True
        teller.failure(trouble or "Not everything came as expected", worker.tail(20), str(place.log))
        return 1
    teller.what_next()
    return 0
