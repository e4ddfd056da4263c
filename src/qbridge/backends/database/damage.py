"""Can a row not be read because of what somebody has written into it?"""

from __future__ import annotations

from sqlalchemy.exc import DataError, DBAPIError

from qbridge.exceptions import QBridgeError

__all__ = ["is_rows_fault"]

_UNREADABLE = (DataError, ValueError, TypeError, ArithmeticError)
"""What reading a row raises if a driver or SQLAlchemy cannot make a value of a column: ``infinity``, half a date."""
_OUT_OF_RANGE = 1690
"""MySQL's number for a sum that is too large; drivers call it operational."""


def is_rows_fault(error: Exception) -> bool:
    """Tell whether a row cannot be read, for good, while others can."""
    if isinstance(error, DBAPIError) and error.orig is not None and error.orig.args[:1] == (_OUT_OF_RANGE,):
        return True
    return isinstance(error, _UNREADABLE) and not isinstance(error, QBridgeError)
