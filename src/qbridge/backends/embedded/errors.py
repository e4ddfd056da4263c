"""What can go wrong with the embedded broker's file, as kombu and Celery understand it.

Both are kombu ``OperationalError`` and listed among the transport's ``connection_errors``: a worker reconnects, a
sender gets them as they are. Only ``FileReplaced`` is *recoverable* in kombu's sense (reconnect, declare again, send
again): for everything else the transport has already tried for ``publish_timeout`` seconds, and trying again would
only multiply the bound.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from kombu.exceptions import OperationalError

__all__ = ["FileFull", "FileReplaced", "FileUnavailable", "is_busy", "translate"]


class FileUnavailable(OperationalError):
    """The file cannot be opened, read or written now: locked for too long, disk full, no permission, damaged."""


class FileFull(FileUnavailable):
    """There is no room: on the disk, or no number left for another message."""


class FileReplaced(FileUnavailable):
    """The file was deleted or replaced while in use, or this process lost its place in it; a reconnect helps."""


_WHAT_TO_DO = {
    sqlite3.SQLITE_FULL: "The disk is full: free some space",
    sqlite3.SQLITE_READONLY: "Give this user write permission on the file and on its folder",
    sqlite3.SQLITE_CANTOPEN: "Create the folder, or give this user write permission on it",
    sqlite3.SQLITE_PERM: "Give this user write permission on the file and on its folder",
    sqlite3.SQLITE_CORRUPT: "The file is damaged: stop all workers, move it away, restore a copy if there is one",
    sqlite3.SQLITE_INTERRUPT: "It took too long: look for triggers and views in it, which no qbridge makes",
    sqlite3.SQLITE_NOTADB: "Another program made this file: name another path",
}


def is_busy(error: sqlite3.Error) -> bool:
    """True if ``error`` only says that another process holds the lock, so that trying again makes sense."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def translate(error: sqlite3.Error, path: Path) -> FileUnavailable:
    """Say what ``error`` means for the broker's file at ``path``, and what to do about it."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    todo = _WHAT_TO_DO.get(code, "Look at the cause")
    kind = FileFull if code == sqlite3.SQLITE_FULL else FileUnavailable
    return kind(f"The embedded broker's file {path} cannot be used: {error}. {todo}")
