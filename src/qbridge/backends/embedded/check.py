"""Can the embedded broker's file be used from here, and what is in it?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbridge.backends.base import Finding
from qbridge.backends.embedded.database import Database
from qbridge.backends.embedded.errors import FileUnavailable
from qbridge.backends.embedded.inspect import queue_states

__all__ = ["findings"]

_NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "ceph", "glusterfs", "lustre", "9p", "fuse.sshfs"}
)
_PATIENCE = 2.0  # seconds: a healthy file is locked for milliseconds


def findings(path: Path, timeout: float, queues: Sequence[str] = ()) -> Iterator[Finding]:
    """Look at the file at ``path`` and say what is found; makes nothing, and waits at most ``timeout`` seconds.

    Args:
        path: absolute path of the broker's file.
        timeout: seconds.
        queues: names to report, beside those found.
    """
    folder = next(parent for parent in path.parents if parent.exists())
    filesystem = _filesystem_of(folder)
    if filesystem in _NETWORK_FILESYSTEMS:
        yield Finding(
            "error",
            "broker.network_filesystem",
            f"the embedded broker's file {path} is on a network filesystem ({filesystem}), where its locks do not work",
            "Name a path on a local disk, or use RabbitMQ or Redis for several machines",
        )
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            "error",
            "broker.not_writable",
            f"the folder {folder} of the embedded broker's file {path.name} is not writable for this user",
            "Give this user write permission on it, or name another path",
        )
        return
    if not path.exists():
        yield Finding("ok", "broker.usable", f"the embedded broker's file {path} will be made with the first message")
        return
    yield from _look_inside(path, min(timeout, _PATIENCE), queues)


def _look_inside(path: Path, timeout: float, queues: Sequence[str]) -> Iterator[Finding]:
    database = Database(path, timeout, create=False)
    try:
        with database.write():  # a sender needs the lock: can it be had?
            pass
        damage = database.read("PRAGMA quick_check(1)")[0][0]
        states = {state.name: state for state in queue_states(path, timeout)}
    except FileUnavailable as error:
        what, _, todo = str(error).partition(". ")
        yield Finding("error", "broker.unusable", what, todo or "Look at the cause")
        return
    finally:
        database.close()
    if damage != "ok":
        yield Finding(
            "error",
            "broker.damaged",
            f"the embedded broker's file {path} is damaged: {damage}",
            "Stop all workers, move it away, and restore a copy if there is one",
        )
        return
    ready, claimed = sum(state.ready for state in states.values()), sum(state.claimed for state in states.values())
    delayed = sum(state.delayed for state in states.values())
    later = f", {delayed} delayed" if delayed else ""
    yield Finding(
        "ok",
        "broker.usable",
        f"the embedded broker's file {path} works: {ready} messages waiting{later}, {claimed} being run",
    )
    for name in queues:
        state = states.get(name)
        if state is not None and state.ready and not state.consumers:
            yield Finding(
                "warning",
                "broker.queue_without_consumer",
                f"queue {name}: {state.ready} messages are waiting and no worker consumes it",
                "Start a worker for this queue",
            )


def _filesystem_of(folder: Path) -> str | None:
    """Type of the filesystem that holds ``folder``; None where the system does not say (all but Linux)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    best, kind = "", None
    real = os.path.realpath(folder)
    for line in lines:
        mounted, _, described = line.partition(" - ")
        point = mounted.split()[4].encode().decode("unicode_escape")  # octal escapes for spaces
        if len(point) >= len(best) and os.path.commonpath([point, real]) == point:
            best, kind = point, described.split()[0]
    return kind
