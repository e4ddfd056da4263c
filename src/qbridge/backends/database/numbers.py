"""What if the number that a new row gets is somebody else's, or there is none left? The row gets another one.

Databases count: a row that somebody has put ahead of the count, or at its end, is in the way of one task's outcome, or
of all, for good. Their errors look like those of a value that the column does not take.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Any

import sqlalchemy as sa
from celery.utils.log import get_logger
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

__all__ = ["put", "with_number"]

logger = get_logger(__name__)

_ATTEMPTS = 3
_MYSQL = frozenset({167, 1062, 1467, 1690, 4084})
"""No number left, one that is taken, none to be read, what our own statement fails with on another task's row; the end
of a sequence."""
_POSTGRESQL = frozenset({"22003", "2200H", "23505"})
"""A number too large for the column, none left in the sequence, one that is taken."""


def put(session: Session, insert: sa.Insert, values: dict[str, Any]) -> None:
    """Insert a row, under a number of our choice where the database finds none.

    Args:
        session: nothing was done in it yet.
        insert: into a table with a column ``id``, which it leaves to the database.
        values: its parameters.
    """
    try:
        session.execute(insert, values)
    except DBAPIError as error:
        if not _is_numbers_fault(error):
            raise
        session.rollback()
    else:
        return
    for left in reversed(range(_ATTEMPTS)):
        try:
            session.execute(*with_number(insert, values))
        except DBAPIError as error:
            if not left or not _is_numbers_fault(error):
                raise
            session.rollback()
        else:
            logger.warning(
                "Table %s has no number for a new row, or another row has it: the row was given one below zero. Look "
                "for rows with large ids that no worker has written, delete them, and set its sequence back",
                insert.table.name,
            )
            return


def with_number(insert: sa.Insert, values: dict[str, Any]) -> tuple[sa.Insert, dict[str, Any]]:
    """Return the same with a number below zero: no database counts there, or counts on from there."""
    return insert.values(id=sa.bindparam("new_id", type_=sa.Integer)), {
        **values,
        "new_id": -1 - secrets.randbelow(2**31 - 1),
    }


def _is_numbers_fault(error: DBAPIError) -> bool:
    """Tell whether it may be the number's; if it is the value's, that is said once more."""
    cause: Any = error.orig
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return True
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    code = cause.args[0] if getattr(cause, "args", ()) else None
    return isinstance(error, IntegrityError) or state in _POSTGRESQL or (isinstance(code, int) and code in _MYSQL)
