"""Who ends the servers when the test run itself is killed? This small process does.

It is run as a script beside the test run, in a session of its own, and reads lines from its standard input:
``watch PID``, ``forget PID``, ``folder PATH``, ``forget-folder PATH``. When the test run disappears (the pipe
closes, or the parent changes: a forked child may hold the pipe open), it kills every watched process with all
its descendants and removes the folders. ``PR_SET_PDEATHSIG`` would not do: it follows the thread that forked,
is dropped by a change of user, and does not reach grandchildren such as PostgreSQL's or Erlang's.

Only the standard library, and nothing of qbridge: it runs under ``python -I -S``.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def parents() -> dict[int, int]:
    """Every process of the machine, pid to parent's pid."""
    found: dict[int, int] = {}
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError, ValueError, IndexError):
                    # The name, in brackets, may hold blanks and brackets: read behind the last one.
                    after_name = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
                    found[int(entry)] = int(after_name[1])
        return found
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        pid, parent = line.split()
        found[int(pid)] = int(parent)
    return found


def tree(pid: int) -> list[int]:
    """``pid`` and all its descendants, parents first (a server's children may have sessions of their own)."""
    children: dict[int, list[int]] = {}
    for child, parent in parents().items():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:  # grows while it is walked
        found.extend(children.get(one, ()))
    return found


def signal_tree(pid: int, number: int) -> None:
    """Send a signal to ``pid`` and all its descendants; those that are gone already are passed over."""
    for one in tree(pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, number)


def main() -> None:
    """Read orders until the test run is gone, then clear up."""
    parent = int(sys.argv[1])
    watched: set[int] = set()
    folders: set[str] = set()
    buffer = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            order, _, subject = line.decode().partition(" ")
            if order == "watch":
                watched.add(int(subject))
            elif order == "forget":
                watched.discard(int(subject))
            elif order == "folder":
                folders.add(subject)
            elif order == "forget-folder":
                folders.discard(subject)
    for pid in watched:
        signal_tree(pid, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
