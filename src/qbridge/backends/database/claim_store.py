"""How does a database keep claims? One table of ours beside Celery's, by the server's clock, one statement per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import sqlalchemy as sa
from celery.utils.log import get_logger
from sqlalchemy.exc import DBAPIError, IntegrityError

from qbridge.backends.claims import ANYBODY, REVOKED_FOR, Claim, Kind, Wanted
from qbridge.backends.database.damage import is_rows_fault
from qbridge.backends.database.quiet import inside_sqlite
from qbridge.backends.database.tables import ID, statements_for
from qbridge.exceptions import ConfigurationError

__all__ = ["DatabaseClaims", "claim_table"]

logger = get_logger(__name__)

_REVOKED = "revoked"
_CREATE_ATTEMPTS = 6


def claim_table(schema: str | None = None) -> sa.Table:
    """Describe the table; times are in milliseconds since 1970.

    Args:
        schema: of the result tables.
    """
    return sa.Table(
        "qbridge_claim",
        sa.MetaData(),
        sa.Column("kind", sa.String(10), primary_key=True),
        sa.Column("key", ID, primary_key=True),
        sa.Column("holder", sa.String(155), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("ends", sa.BigInteger, nullable=False, index=True),
        sa.Column("note", sa.String(255), nullable=False),
        schema=schema,
    )


class DatabaseClaims:
    """Claims beside the results in a database (see ``qbridge.backends.claims.ClaimStore``).

    Args:
        backend: our database result backend: its engine, its bounds, how long results are kept.
        schema: of the result tables.
    """

    def __init__(self, backend: Any, schema: str | None) -> None:
        self._backend = backend
        self.table: sa.Table = claim_table(schema)
        self._there = False
        self._keep = int(backend.expires.total_seconds() * 1000) if backend.expires else 86400_000

    def take(self, kind: Kind, wanted: Sequence[Wanted]) -> list[Claim]:
        """Claim what is free, and extend what the holder has."""
        return cast(
            "list[Claim]", self._do(lambda connection: [self._take_one(connection, kind, one) for one in wanted])
        )

    def _take_one(self, connection: sa.Connection, kind: Kind, wanted: Wanted) -> Claim:
        try:
            claim = self._take(connection, kind, wanted)
        except Exception as error:
            if not is_rows_fault(error):
                raise
            connection.rollback()
            # Others must not lose theirs over one that somebody has damaged: it is nobody's, and begins anew.
            logger.warning("The claim on %s cannot be read (%s) and is made anew", wanted.key, type(error).__name__)
            table = self.table.c
            connection.execute(sa.delete(self.table).where(table.kind == kind, table.key == wanted.key))
            claim = self._take(connection, kind, wanted)
        connection.commit()  # each stands for itself
        return claim

    def _take(self, connection: sa.Connection, kind: Kind, wanted: Wanted) -> Claim:
        for _ in range(3):
            connection.execute(self._update(connection, kind, wanted))
            found = self._found(connection, kind, wanted.key)
            if found is not None:
                return found
            if self._insert(connection, kind, wanted):
                return Claim(wanted.holder, 1, 0.0, wanted.lease, wanted.note)
        raise RuntimeError("a claim appears and disappears")  # it was inserted by others and deleted, three times

    def _update(self, connection: sa.Connection, kind: Kind, wanted: Wanted) -> sa.Update:
        table, now = self.table.c, _now(connection)
        mine = table.holder == wanted.holder
        free = table.ends <= now
        if wanted.over:
            free = sa.true() if wanted.over == ANYBODY else sa.or_(free, table.holder == wanted.over)
        older = now - table.since >= int(wanted.running * 1000)
        note: Any = wanted.note or sa.case((mine, table.note), else_="")
        # in order: MySQL sees what was assigned before, so the holder comes last
        return (
            sa.update(self.table)
            .where(table.kind == kind, table.key == wanted.key, sa.or_(mine, sa.and_(free, older)))
            .ordered_values(
                (table.token, sa.case((mine, table.token), else_=table.token + 1)),
                (table.since, sa.case((mine, table.since), else_=now)),
                (table.note, note),
                (table.ends, now + int(wanted.lease * 1000)),
                (table.holder, wanted.holder),
            )
        )

    def _insert(self, connection: sa.Connection, kind: str, wanted: Wanted) -> bool:
        now = _now(connection)
        row = {"kind": kind, "key": wanted.key, "holder": wanted.holder, "token": 1, "note": wanted.note}
        try:
            connection.execute(
                sa.insert(self.table).values(**row, since=now, ends=now + int(wanted.lease * 1000)).inline()
            )
        except IntegrityError:
            connection.rollback()
            return False  # another was faster
        return True

    def _found(self, connection: sa.Connection, kind: str, key: str) -> Claim | None:
        table, now = self.table.c, _now(connection)
        query = sa.select(table.holder, table.token, now - table.since, table.ends - now, table.note)
        row = connection.execute(query.where(table.kind == kind, table.key == key)).first()
        if row is None:
            return None
        holder, token, age, left, note = row
        return Claim(str(holder), int(token), int(age) / 1000, int(left) / 1000, str(note))

    def look(self, kind: Kind, key: str) -> Claim | None:
        """Return a claim, ended or not."""
        return cast("Claim | None", self._do(lambda connection: self._found(connection, kind, key)))

    def release(self, kind: Kind, key: str, holder: str) -> None:
        """End a claim, if the holder has it."""
        table = self.table.c
        statement = sa.update(self.table).where(table.kind == kind, table.key == key, table.holder == holder)
        self._do(lambda connection: connection.execute(statement.values(ends=0)))

    def revoke(self, task_id: str) -> None:
        """Note that a task is revoked."""
        wanted = Wanted(task_id, _REVOKED, max(REVOKED_FOR, self._keep / 1000))
        self._do(lambda connection: self._insert(connection, _REVOKED, wanted))

    def is_revoked(self, task_id: str) -> bool:
        """Whether a task is revoked."""
        table = self.table.c
        query = sa.select(sa.literal(1)).where(table.kind == _REVOKED, table.key == task_id)
        return self._do(lambda connection: connection.execute(query).first()) is not None

    def revoked_since(self, moment: int) -> tuple[list[str], int]:
        """Return what was revoked since a moment, and the next moment."""
        table = self.table.c

        def read(connection: sa.Connection) -> tuple[list[str], int]:
            now = int(connection.execute(sa.select(_now(connection))).scalar_one())
            query = sa.select(table.key).where(table.kind == _REVOKED, table.since >= moment)
            return [str(key) for key in connection.execute(query).scalars()], now

        return cast("tuple[list[str], int]", self._do(read))

    def clean(self) -> None:
        """Delete what has ended, and whose token nobody can have any more; a database without claims gets no table."""
        if not self._there and not sa.inspect(self._backend.engine).has_table(self.table.name, self.table.schema):
            return
        table = self.table.c

        def delete(connection: sa.Connection) -> None:
            before = _now(connection) - self._keep
            connection.execute(sa.delete(self.table).where(table.ends < before, table.since < before))

        self._do(delete)

    # -- the database

    def _do(self, action: Callable[[sa.Connection], Any]) -> Any:
        """Do something on a connection; once more if it had died, or if the table was dropped."""

        def once() -> Any:
            backend = self._backend
            with inside_sqlite() if backend._is_sqlite else nullcontext():
                if not self._there:
                    self._make_table(backend.engine)
                with backend.engine.connect() as connection:
                    try:
                        answer = action(connection)
                        connection.commit()
                        return answer
                    except DBAPIError:
                        self._there = False
                        raise

        return self._backend._once_more(once)

    def _make_table(self, engine: sa.Engine) -> None:
        for attempt in range(_CREATE_ATTEMPTS):
            if sa.inspect(engine).has_table(self.table.name, schema=self.table.schema):
                self._there = True
                return
            if not self._backend.app.conf.database_create_tables_at_setup:
                self._refuse(engine, "it is not made here, because database_create_tables_at_setup is False", None)
            try:
                self.table.create(engine)
            except DBAPIError as error:  # several processes start at once
                if attempt == _CREATE_ATTEMPTS - 1:
                    self._refuse(engine, f"it could not be made ({type(error.orig).__name__})", error)
                time.sleep(0.01 * 2**attempt)

    def _refuse(self, engine: sa.Engine, why: str, cause: Exception | None) -> None:
        text = statements_for([self.table], engine.dialect)
        raise ConfigurationError(
            f"The table {self.table.fullname} is missing in {self._backend.as_uri()}, and {why}",
            f"Create it once, as a user who may:\n{text}",
        ) from cause


def _now(connection: sa.Connection) -> Any:
    """Return the server's clock in milliseconds since 1970; for a database whose way is not known here, this one's."""
    name = connection.dialect.name
    if name == "postgresql":
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * 1000, sa.BigInteger)
    if name in ("mysql", "mariadb"):
        # not UNIX_TIMESTAMP(): once a year it does not know which of two equal hours it is
        epoch, clock = sa.text("'1970-01-01'"), sa.func.utc_timestamp(sa.text("3"))
        return sa.func.timestampdiff(sa.text("MICROSECOND"), epoch, clock, type_=sa.BigInteger).op("DIV")(1000)
    if name == "sqlite":
        days = sa.func.julianday("now") - 2440587.5
        return sa.cast(sa.func.round(days * 86400000.0), sa.BigInteger)
    return sa.literal(int(time.time() * 1000), sa.BigInteger)
