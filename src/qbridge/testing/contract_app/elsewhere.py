"""What does another process of the application see? Run by contracts: ``elsewhere read ID``, ``elsewhere fork N M``.

The last line of its output is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from qbridge.exceptions import QBridgeError
from qbridge.testing.contract_app.app import bridge, tasks


def read(task_id: str) -> dict[str, Any]:
    """Read the result of a task that another process sent."""
    began = time.monotonic()
    try:
        value = bridge.result(task_id, tasks.echo_uuid).get(timeout=20)
    except QBridgeError as error:
        return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - began}
    return {"value": str(value), "type": type(value).__name__}


def _exchange(number: int, count: int) -> bool:
    """Send tasks, get their results, and say whether each is one's own."""
    results = [tasks.add.delay(number * 1000, step) for step in range(count)]
    return [result.get(timeout=60) for result in results] == [number * 1000 + step for step in range(count)]


def fork(children: int, count: int) -> dict[str, Any]:
    """Send, fork, and let every process send and get at the same time."""
    assert tasks.add.delay(1, 1).get(timeout=60) == 2
    unread = tasks.add.delay(2, 2)
    pids = []
    for number in range(children):
        pid = os.fork()
        if pid == 0:
            good = False
            try:
                good = _exchange(number + 1, count)
            finally:
                os._exit(0 if good else 1)
        pids.append(pid)
    own = _exchange(50, count) and unread.get(timeout=60) == 4
    return {"children": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], "parent": own}


if __name__ == "__main__":
    _command, *_words = sys.argv[1:]
    print(json.dumps(read(*_words) if _command == "read" else fork(*map(int, _words))), flush=True)
    bridge.close()
