"""What do processes and servers hold at this moment?"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Held", "held_by", "tree"]

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Held:
    """What some processes hold together.

    Args:
        pids: which.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self.memory = 0.0
        """Megabytes, resident."""
        self.descriptors = 0
        self.threads = 0
        for pid in pids:
            try:
                self.memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6
                self.descriptors += len(os.listdir(f"/proc/{pid}/fd"))
                self.threads += len(os.listdir(f"/proc/{pid}/task"))
            except OSError:  # it ended meanwhile
                continue


def tree(pid: int) -> list[int]:
    """Return a process and its children, and theirs."""
    found = [pid]
    for each in found:
        try:
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
    return found


def held_by(pid: int) -> Held:
    """What a process and all below it hold."""
    return Held(tree(pid))
