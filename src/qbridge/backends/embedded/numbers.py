"""What if somebody has used up the numbers of messages? Those far above any that was given are numbered anew.

SQLite gives each message a number above all that were there before. One row with the largest number there is, or that
number in ``sqlite_sequence``, would end that for good: "database or disk is full", also after the row is deleted.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from qbridge.backends.embedded.database import Database
from qbridge.backends.embedded.errors import FileFull

__all__ = ["check_number", "with_numbers"]

_T = TypeVar("_T")

_SANE = 2**61
_HIGHEST = 2**62
"""Nobody comes from one to the other by sending: so messages of ours are never above the second."""


def with_numbers(database: Database, step: Callable[[], _T]) -> _T:
    """Do a step that adds messages; if their numbers are used up, make room and do it again.

    Args:
        database: the broker's file.
        step: one transaction; it has changed nothing if it raises.
    """
    try:
        return step()
    except FileFull:
        with database.write() as sql:
            (last,) = sql.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'message'").fetchone()
            (number,) = sql.execute("SELECT max(id) FROM message").fetchone()
            # anything that is no number is above all of them in SQLite, and never the reason
            used_up = any(isinstance(each, int) and each > _HIGHEST for each in (last, number))
            if used_up:
                _number_anew(sql)
        if not used_up:
            raise  # it is the disk
    return step()


def check_number(sql: sqlite3.Connection, number: int | None) -> None:
    """Number anew if a message has got a number that leads nowhere, this message among them.

    Args:
        sql: within the transaction that has added it.
        number: of the message.
    """
    if number is not None and number > _HIGHEST:
        _number_anew(sql)


def _number_anew(sql: sqlite3.Connection) -> None:
    # Microseconds are more than there ever were messages: no number is given twice, whatever was the last one.
    now = time.time_ns() // 1000
    (last,) = sql.execute("SELECT max(coalesce(max(id), 0), ?) FROM message WHERE id <= ?", (now, _SANE)).fetchone()
    # in this order each new number is free: it is not above the old one, and the ones before have moved
    for (old,) in sql.execute("SELECT id FROM message WHERE id > ? ORDER BY id", (_SANE,)).fetchall():
        last += 1
        sql.execute("UPDATE message SET id = ? WHERE id = ?", (last, old))
    sql.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'message'", (last,))
