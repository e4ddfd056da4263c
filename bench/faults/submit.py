"""Who sends the calls, and what does it know of each? A process of its own: ``python -m bench.faults.submit``.

It writes ``OUTCOME NUMBER TIME`` for each call, before it sends the next: ``C`` confirmed, ``R`` refused, ``U`` it may
have arrived. It sends so many a second and never catches up what an outage has cost; while the file ``hold`` is there,
it waits, so that a slow machine is not buried. It ends when it has sent all and the file ``enough`` is there, so that
tasks come for as long as the story goes on; three times as many are enough in any case.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bench.faults.workload import QUEUE, Call, task_id, workload

__all__ = ["ENOUGH", "Outcome", "Sent", "main", "read_sent"]

Outcome = Literal["C", "R", "U"]

ENOUGH = "enough"
"""File in the cell's folder: no task need come any more."""
_MOST = 3
_TICK = 0.1


@dataclass(frozen=True)
class Sent:
    """What the sender knows of one call.

    Args:
        outcome: confirmed, refused, or uncertain.
        number: of the call.
        at: monotonic seconds, after the answer.
    """

    outcome: Outcome
    number: int
    at: float


def read_sent(path: Path) -> list[Sent]:
    """Read the sender's whole lines."""
    if not path.exists():
        return []
    text, _, _ = path.read_text().rpartition("\n")
    rows = (line.split() for line in text.splitlines())
    return [Sent(cast(Outcome, outcome), int(number), float(at)) for outcome, number, at in rows]


def _ours() -> Callable[[Call], Outcome]:
    from bench.faults.ours import work
    from qbridge import BrokerUnavailable

    def send(call: Call) -> Outcome:
        options: dict[str, Any] = {"task_id": task_id(call.number)}
        if call.countdown is not None:
            options["countdown"] = call.countdown
        try:
            work.using(**options).delay(call.number, call.pieces, call.pause, call.failures)
        except BrokerUnavailable as error:
            return "U" if error.may_have_arrived else "R"
        return "C"

    return send


def _theirs() -> Callable[[Call], Outcome]:
    from bench.faults.theirs import work

    def send(call: Call) -> Outcome:
        arguments = (call.number, call.pieces, call.pause, call.failures)
        try:
            work.apply_async(arguments, task_id=task_id(call.number), countdown=call.countdown, queue=QUEUE)
        except Exception:  # which one it is depends on the moment; none says whether the message arrived
            return "U"
        return "C"

    return send


def main() -> None:
    """Send all calls; see the module's text."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    folder, rate = Path(told["folder"]), float(told["rate"])
    send = _ours() if told["system"] == "qbridge" else _theirs()
    log = os.open(folder / "sent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    hold, enough = folder / "hold", folder / ENOUGH
    credit, before = 0.0, time.monotonic()
    for call in workload(_MOST * told["tasks"], told["seed"]):
        if call.number >= told["tasks"] and enough.exists():
            break
        while credit < 1:
            time.sleep(_TICK)
            now = time.monotonic()
            if not hold.exists():
                credit += rate * min(now - before, 2 * _TICK)
            before = now
        credit -= 1
        outcome = send(call)
        os.write(log, f"{outcome} {call.number} {time.monotonic():.6f}\n".encode())
    os._exit(0)  # nothing of it is needed any more, and a bridge would say good-bye to a broker that may be away


if __name__ == "__main__":
    main()
