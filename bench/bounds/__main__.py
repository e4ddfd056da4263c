"""Run the measurement, print the table, and say whether a call was over its bound by more than a second."""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qbridge
from bench.bounds.calls import CALLS, Call, Subject
from bench.bounds.places import PLACES, Fault, Place
from qbridge import Bridge
from qbridge.exceptions import ResultsUnavailable
from qbridge.testing.contracts.kit import Blocked, unblocked
from qbridge.testing.waiting import wait_until

HEADER = ["version", "place", "fault", "call", "bound", "longest", "over", "outcomes", "loop_ms", "promise"]
_THREADS = 50
_CROWD = ("task.delay(...)", "result.get(timeout)", "result.state", "task.using(idempotency_key=...).delay(...)")
"""Calls that are made by fifty threads at once too."""
_MIDDLE = 0.2
_HANGS = 60.0
"""Seconds after which a call counts as one that hangs for ever."""


@dataclass
class Row:
    """What was measured of one call under one fault."""

    place: str
    fault: str
    call: Call
    longest: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    loop: float = 0.0

    @property
    def over(self) -> float:
        return max(0.0, self.longest - self.call.bound)

    def cells(self) -> list[str]:
        said = " ".join(f"{name}:{count}" for name, count in sorted(self.outcomes.items()))
        loop = f"{self.loop * 1000:.0f}" if self.call.asynchronous else ""
        return [
            qbridge.__version__, self.place, self.fault, self.call.name, f"{self.call.bound:g}",
            f"{self.longest:.2f}", f"{self.over:.2f}", said, loop, self.call.promise,
        ]  # fmt: skip


def subject(place: Place, warm: bool) -> Subject:
    """A bridge of its own for a call: one that has just worked, or one that has not connected yet."""
    bridge = Bridge(place.config)

    @bridge.task(name="bounds.add")
    def add(a: int, b: int) -> int:
        return a + b

    if not warm:
        return Subject(bridge, add, None if not place.claims else bridge.result("never-sent"))
    if place.claims:
        add.using(idempotency_key=f"{time.time_ns()}").delay(1, 2)
    result = add.delay(1, 2)
    wait_until(lambda: _is_pending(result), 30, what="the server to be well again")
    return Subject(bridge, add, result)


def _is_pending(result: Any) -> bool:
    try:
        return bool(result.state == "PENDING")
    except ResultsUnavailable:
        return False


def make(call: Call, on: Subject, row: Row) -> None:
    """Make a call, and note how long it took and how it ended."""
    began = time.monotonic()
    try:
        if call.asynchronous:
            asyncio.run(_on_a_loop(call, on, row))
        else:
            call.make(on)
    except Exception as error:
        outcome = type(error).__name__
    else:
        outcome = "ok"
    row.outcomes[outcome] += 1
    row.longest = max(row.longest, time.monotonic() - began)


async def _on_a_loop(call: Call, on: Subject, row: Row) -> None:
    blocked = Blocked()
    try:
        async with unblocked() as blocked:
            await call.make(on)
    finally:
        row.loop = max(row.loop, blocked.longest)


def measure(place: Place, fault: Fault, calls: list[Call]) -> list[Row]:
    """Make every call under one fault, each in a thread of its own."""
    rows = []
    work: list[threading.Thread] = []
    subjects: list[Subject] = []
    for call in calls:
        if call.claims and not place.claims:
            continue
        row = Row(place.name, fault.name, call)
        rows.append(row)
        for warm in (True, False):
            if not warm and "result." in call.name and not place.claims:
                continue  # rpc results are the sender's: there is no handle without a send
            on = subject(place, warm)
            subjects.append(on)
            work.append(threading.Thread(target=make, args=(call, on, row), daemon=True))
    _under(fault, work, rows)
    for on in subjects:
        on.bridge.close()
    return rows


def measure_crowd(place: Place, fault: Fault, calls: list[Call]) -> list[Row]:
    """Make some calls from fifty threads at once on one bridge."""
    rows = []
    for call in calls:
        if call.name not in _CROWD or (call.claims and not place.claims):
            continue
        row = Row(place.name, f"{fault.name}, {_THREADS} threads", call)
        on = subject(place, True)
        _under(
            fault, [threading.Thread(target=make, args=(call, on, row), daemon=True) for _ in range(_THREADS)], [row]
        )
        on.bridge.close()
        rows.append(row)
    return rows


def _under(fault: Fault, work: list[threading.Thread], rows: list[Row]) -> None:
    if not fault.in_the_middle:
        fault.begin()
    try:
        for thread in work:
            thread.start()
        if fault.in_the_middle:
            time.sleep(_MIDDLE)
            fault.begin()
        end = time.monotonic() + _HANGS
        for thread in work:
            thread.join(max(0.0, end - time.monotonic()))
    finally:
        fault.end()
    if any(thread.is_alive() for thread in work):
        for row in rows:
            row.outcomes["hangs"] += not sum(row.outcomes.values())
            row.longest = row.longest or _HANGS


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", choices=list(PLACES), action="append")
    parser.add_argument("--fault", help="only faults whose name begins like this")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows: list[Row] = []
    for name in given.place or PLACES:
        with tempfile.TemporaryDirectory(prefix="qbridge-bounds-") as folder, PLACES[name](Path(folder)) as place:
            for fault in place.faults:
                if given.fault is not None and not fault.name.startswith(given.fault):
                    continue
                # apart: threads that wait for the interpreter's lock would count as pauses of the loop
                found = measure(place, fault, [call for call in CALLS if not call.asynchronous])
                for call in CALLS:
                    found += measure(place, fault, [call]) if call.asynchronous else []
                if fault.name in ("frozen", "cut off without a reset", "locked by another process"):
                    found += measure_crowd(place, fault, list(CALLS))
                for row in found:
                    print(
                        *(f"{cell:<{width}}" for cell, width in zip(row.cells()[1:9], _WIDTHS, strict=True)), flush=True
                    )
                rows += found
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *(row.cells() for row in rows)])
    late = [row for row in rows if row.over > 1.0 or (row.call.asynchronous and row.loop > 0.05)]
    print(f"{len(rows)} cells, {len(late)} over their bound by more than a second, or blocking an event loop")
    return 1 if late else 0


_WIDTHS = (22, 34, 44, 6, 6, 6, 40, 4)

if __name__ == "__main__":
    sys.exit(main())
