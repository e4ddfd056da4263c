"""What does an error of a database driver mean to the operator, and what is there to do about it?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from qbridge.backends.base import Finding
from qbridge.backends.network import redact

if TYPE_CHECKING:
    from qbridge.backends.database import DatabaseResults

__all__ = ["explain", "is_refusal"]

# MySQL's and MariaDB's error numbers; PostgreSQL's SQLSTATEs, which libpq does not pass on for a refused connection:
# there its words are looked at. What is not recognised is shown as it was said.
_WRONG_PASSWORD = (
    1045,
    1698,
    "28P01",
    "28000",
    r"password authentication failed|no password supplied|role .* does not",
)
_NOT_LET_IN = ("no pg_hba", r"no pg_hba\.conf entry|Host .* is not allowed to connect", 1130)
_NO_DATABASE = (1049, "3D000", r"database .* does not exist")
_NO_ACCESS = (1044, r"permission denied for database")
_NO_PRIVILEGE = (1142, 1143, "42501", r"command denied to user|permission denied")
_NO_SQLITE = (r"file is not a database|database disk image is malformed",)
_FULL = (1040, "53300", r"too many (clients|connections)|remaining connection slots")
_STARTING = ("57P03", r"the database system is (starting up|shutting down|in recovery)")
_TLS = (
    2026,
    r"certificate verify failed|does not match host name|root certificate|server does not support SSL|SSL error",
)
_FROZEN = (2013, r"timeout expired|timed out|Lost connection|server closed the connection|terminating connection")


def is_refusal(error: DBAPIError) -> bool:
    """Whether a statement was refused because the account may not run it."""
    return _is(error.orig, _NO_PRIVILEGE)


def _is(cause: Any, kind: tuple[int | str, ...]) -> bool:
    number = cause.args[0] if cause is not None and cause.args and isinstance(cause.args[0], int) else None
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    patterns = [pattern for pattern in kind if isinstance(pattern, str)]
    return number in kind or state in patterns or any(re.search(p, str(cause), re.IGNORECASE) for p in patterns)


def explain(error: Exception, results: DatabaseResults) -> Finding:
    """The finding that an error means.

    Args:
        error: as SQLAlchemy or the driver raised it.
        results: what was spoken to.
    """
    url = results.sqlalchemy_url()
    place = url.render_as_string(hide_password=True).replace(":***@", ":**@")
    if isinstance(error, ImportError):
        return Finding(
            "error",
            "results.driver_missing",
            f"the driver of {url.drivername}:// cannot be imported: {redact(error, url.password)}",
            'pip install "qbridge[postgres]" or "qbridge[mysql]" brings drivers with all that they need.',
        )
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    said = redact(cause, url.password)

    if _is(cause, _WRONG_PASSWORD):
        return Finding(
            "error",
            "results.credentials",
            f"the database at {place} refused user {url.username!r} or the password",
            "Correct them in the URL, the password percent-encoded.",
        )
    if _is(cause, _TLS):
        return Finding(
            "error",
            "results.tls",
            f"the connection to {place} is not encrypted as asked for: {said}",
            "PostgreSQL: name the authority in ?sslmode=verify-full&sslrootcert=FILE; the certificate must be valid, "
            "and name the host of the URL.",
        )
    if _is(cause, _NOT_LET_IN):
        return Finding(
            "error",
            "results.credentials",
            f"the database server of {place} lets nobody in from this machine as {url.username!r}",
            "PostgreSQL: add a line to pg_hba.conf and reload. MySQL: CREATE USER 'name'@'host'.",
        )
    if _is(cause, _NO_DATABASE):
        return Finding(
            "error",
            "results.database_missing",
            f"there is no database {url.database!r} at {place}",
            f"CREATE DATABASE {url.database}; as a user who may, or correct the name in the URL.",
        )
    if _is(cause, _NO_ACCESS):
        return Finding(
            "error",
            "results.permission",
            f"user {url.username!r} may not use the database {url.database!r}",
            f"PostgreSQL: GRANT CONNECT ON DATABASE {url.database} TO {url.username}; "
            f"MySQL: GRANT ALL ON {url.database}.* TO '{url.username}'@'%';",
        )
    if _is(cause, _NO_PRIVILEGE):
        return Finding(
            "error",
            "results.permission",
            f"user {url.username!r} may not look at the tables of {place}: {said}",
            f"MySQL: GRANT ALL ON {url.database}.* TO '{url.username}'@'%'; or CREATE, SELECT, INSERT, UPDATE, DELETE.",
        )
    if _is(cause, _NO_SQLITE):
        return Finding(
            "error",
            "results.database_missing",
            f"{url.database} is not an SQLite database, or is damaged",
            "Correct the path in the URL, or move the file away: the first use makes a new one.",
        )
    if _is(cause, _FULL):
        return Finding(
            "error",
            "results.full",
            f"the database server of {place} takes no more connections",
            "Lower pool_size and max_overflow (they count per process), or raise the server's max_connections.",
        )
    if _is(cause, _STARTING):
        return Finding("error", "results.starting", f"the database server of {place} is starting or stopping", "Wait.")
    if _is(cause, _FROZEN) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return Finding(
            "error",
            "results.frozen",
            f"{place} accepts connections and does not answer in time",
            "It may be stopped (SIGSTOP), overloaded or out of disk, or something else listens there: look at its log.",
        )
    return Finding(
        "error",
        "results.check_failed",
        f"the check of {place} ended early: {type(cause).__name__}: {said}",
        "Look at the database's log at this moment.",
    )
