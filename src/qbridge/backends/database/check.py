"""What is wrong between us and the database of the results? A look at the live server that changes nothing on it.

Privileges are asked for with statements that touch no row: a database looks at the account all the same.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn

from qbridge.backends.base import Finding
from qbridge.backends.database.claim_store import claim_table
from qbridge.backends.database.engine import PooledEngine
from qbridge.backends.database.explain import explain, is_refusal
from qbridge.backends.database.tables import EXTENDED, ResultTables, absent, room_of, statements_for
from qbridge.backends.network import reach, redact
from qbridge.backends.urls import Address

if TYPE_CHECKING:
    from qbridge.backends.database import DatabaseResults

__all__ = ["check"]

_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_PRODUCTS = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB", "sqlite": "SQLite"}
_LARGE = ("result", "traceback")
_OPTIONAL = {"children", *EXTENDED}
_KEY_AND_VALUE = (("task_id", "result"), ("taskset_id", "result"), ("key", "note"))  # of results, groups, claims


def check(results: DatabaseResults) -> tuple[Finding, ...]:
    """Look at the database within ``connect_timeout`` (twice) and ``operation_timeout`` seconds."""
    visit = _Visit(results)
    findings: list[Finding] = []
    try:
        for finding in visit.look():
            findings.append(finding)  # noqa: PERF402 - what was found before an error counts
    except (SQLAlchemyError, ImportError, OSError) as error:
        findings.append(explain(error, results))
    except Exception as error:  # noqa: BLE001 - a check reports, whatever happens
        said = redact(error, results.sqlalchemy_url().password)
        findings.append(
            Finding(
                "error",
                "results.check_failed",
                f"the check of {visit.place} ended early: {type(error).__name__}: {said}",
                "Look at the database's log at this moment.",
            )
        )
    finally:
        visit.leave()
    return tuple(findings)


class _Visit:
    def __init__(self, results: DatabaseResults) -> None:
        self.results = results
        self.url = results.sqlalchemy_url()
        self.place = results.safe_url().removeprefix("db+")
        names, schemas = (
            {str(which): name for which, name in (named or {}).items()}
            for named in (results.table_names, results.table_schemas)
        )
        self.claims = claim_table(schemas.get("task"))
        self.tables: list[sa.Table] = [*ResultTables(names, schemas).metadata.sorted_tables, self.claims]
        self.pooled: PooledEngine | None = None

    def leave(self) -> None:
        if self.pooled is not None:
            with suppress(Exception):
                self.pooled.close()

    def look(self) -> Iterator[Finding]:
        dialect = self.results.dialect
        if dialect == "sqlite":
            trouble = self._file()
            if trouble is not None:
                yield trouble
                return
        elif self.url.host and dialect in _PORTS and not self.url.host.startswith("/"):
            server = Address(self.url.host, self.url.port or _PORTS[dialect])
            unreachable = reach(server, self.results.connect_timeout, of="results", product=_PRODUCTS[dialect])
            if unreachable is not None:
                yield unreachable
                return
        engine = self._engine()
        with engine.connect() as connection:
            version = ".".join(map(str, connection.dialect.server_version_info or ()))
        name = "MariaDB" if getattr(engine.dialect, "is_mariadb", False) else _PRODUCTS.get(dialect, dialect)
        yield Finding("ok", "results.server", f"{name} {version} at {self.place}")
        missing = absent(engine, self.tables)
        if missing:
            yield self._tables_missing(engine, missing)
        if any(table is not self.claims for table in missing):
            return
        self.tables = [table for table in self.tables if table not in missing]
        columns = list(self._columns(engine))
        yield from columns
        yield from self._room(engine)
        if any(finding.level == "error" for finding in columns):
            return
        denied = list(self._privileges(engine)) if dialect != "sqlite" else []
        yield from denied
        if not denied:
            yield Finding("ok", "results.tables", f"the tables {_names(self.tables)} are there and may be used")

    def _engine(self) -> sa.Engine:
        url = self.url
        if self.results.dialect == "sqlite" and url.database and not url.database.startswith("file:"):
            # Read-only: looking must not make the file, nor change it.
            url = url.set(database=Path(url.database).as_uri()).update_query_dict({"mode": "ro", "uri": "true"})
        self.pooled = PooledEngine(
            url.render_as_string(hide_password=False),
            self.results.engine_options(),
            connect_timeout=self.results.connect_timeout,
            operation_timeout=self.results.operation_timeout,
        )
        return self.pooled.get()

    def _file(self) -> Finding | None:
        """Look at an SQLite file; None if it is there and may be written."""
        if not self.url.database or self.url.database.startswith("file:"):
            return None
        path = Path(self.url.database)
        if path.exists():
            # SQLite writes its journal beside the file.
            if os.access(path, os.R_OK | os.W_OK) and os.access(path.parent, os.W_OK):
                return None
            return Finding(
                "error",
                "results.permission",
                f"this process may not write {path} and its folder",
                f"chown or chmod them: SQLite writes a journal beside the file. ls -ld {shlex.quote(str(path.parent))}",
            )
        folder = next(parent for parent in path.parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return Finding(
                "error",
                "results.permission",
                f"{path} does not exist and cannot be made: {folder} is not a folder that this process may write",
                "Correct the path in the URL, or the rights of the folder.",
            )
        if not self.results.create_tables:
            return self._tables_missing(sa.create_engine("sqlite://"), self.tables)
        return Finding("info", "results.tables_missing", f"{path} does not exist yet; the first use makes it")

    def _tables_missing(self, engine: sa.Engine, missing: list[sa.Table]) -> Finding:
        what = f"the tables {_names(missing)} do not exist"
        if missing == [self.claims]:
            what = (
                f"the table {_names(missing)} of revocations, idempotency keys, unique tasks and claims does not exist"
            )
        sql = statements_for(missing, engine.dialect)
        if self.results.create_tables:
            refused = None if self.results.dialect == "sqlite" else self._may_not_create(engine, missing)
            if refused is None:
                return Finding("info", "results.tables_missing", f"{what} yet; the first use makes them")
            return Finding(
                "error",
                "results.tables_missing",
                f"{what}, and {refused}",
                f"Run this as a user who may, and grant SELECT, INSERT, UPDATE, DELETE on them:\n{sql}",
            )
        return Finding(
            "error",
            "results.tables_missing",
            f"{what}, and create_tables=False says that somebody else makes tables",
            f"Run this in {self.place}:\n{sql}",
        )

    def _may_not_create(self, engine: sa.Engine, missing: list[sa.Table]) -> str | None:
        """Why the tables cannot be made, if the database can say so without making them."""
        if self.results.dialect != "postgresql":
            return None
        with engine.connect() as connection:
            for table in missing:
                schema = table.schema or connection.scalar(sa.text("SELECT current_schema()"))
                if schema is None:
                    return "the search_path names no schema to make them in"
                exists = connection.scalar(sa.text("SELECT to_regnamespace(:s) IS NOT NULL"), {"s": _quoted(schema)})
                if not exists:
                    return f"there is no schema {schema}"
                may = sa.text("SELECT has_schema_privilege(current_user, :s, 'CREATE')")
                if not connection.scalar(may, {"s": schema}):
                    return f"user {self.url.username!r} may not create tables in the schema {schema}"
        return None

    def _columns(self, engine: sa.Engine) -> Iterator[Finding]:
        inspector = sa.inspect(engine)
        for table in self.tables:
            there = {column["name"] for column in inspector.get_columns(table.name, schema=table.schema)}
            lacking = [column for column in table.columns if column.name not in there]
            if not lacking:
                continue
            optional = all(column.name in _OPTIONAL for column in lacking)
            preparer = engine.dialect.identifier_preparer
            sql = "\n".join(
                f"ALTER TABLE {preparer.format_table(table)} ADD COLUMN "
                f"{str(CreateColumn(column).compile(dialect=engine.dialect)).strip()};"
                for column in lacking
            )
            names = ", ".join(column.name for column in lacking)
            if table is self.claims:
                yield Finding(
                    "error",
                    "results.columns_missing",
                    f"the table {table.fullname} has no column {names}: it is not qbridge's table of claims",
                    "If no other program owns it, stop the workers and run:\n"
                    f"DROP TABLE {preparer.format_table(table)};\n{statements_for([table], engine.dialect)}",
                )
            elif optional:
                yield Finding(
                    "info",
                    "results.columns_missing",
                    f"the table {table.fullname} has no column {names} (an older Celery made it): left out",
                    f"To have them, stop the workers and run:\n{sql}",
                )
            else:
                yield Finding(
                    "error",
                    "results.columns_missing",
                    f"the table {table.fullname} has no column {names}: it is not a result table of Celery",
                    f"Name another table in table_names, or run:\n{sql}",
                )

    def _room(self, engine: sa.Engine) -> Iterator[Finding]:
        """Columns of plain Celery's tables on MySQL, which take 65,535 bytes."""
        preparer = engine.dialect.identifier_preparer
        for table in self.tables:
            if table is self.claims:
                continue
            found = sa.inspect(engine).get_columns(table.name, schema=table.schema)
            room = {name: size for name, size in room_of(engine.dialect, found).items() if name in _LARGE}
            if not room:
                continue
            sql = "\n".join(
                f"ALTER TABLE {preparer.format_table(table)} MODIFY {name} "
                f"{table.c[name].type.compile(dialect=engine.dialect)};"
                for name in room
            )
            yield Finding(
                "warning",
                "results.columns_small",
                f"the table {table.fullname} takes "
                + ", ".join(f"{size:,} bytes of {name}" for name, size in room.items())
                + ": a larger result makes its task fail, whatever serialization.max_payload_bytes says, and a longer "
                "traceback is cut",
                f"Run this while no worker stores results:\n{sql}",
            )

    def _privileges(self, engine: sa.Engine) -> Iterator[Finding]:
        denied: dict[str, list[str]] = {}
        with engine.connect() as connection:
            for table in self.tables:
                for right, statement in _touching_nothing(table, self.results.dialect):
                    try:
                        connection.execute(statement)
                    except DBAPIError as error:
                        if not is_refusal(error):
                            raise
                        denied.setdefault(table.fullname, []).append(right)
            sequences = self._sequences(connection)
        account = self._grantee()
        if denied:
            yield Finding(
                "error",
                "results.permission",
                f"user {self.url.username!r} may not "
                + "; ".join(f"{', '.join(rights)} on {name}" for name, rights in denied.items()),
                " ".join(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO {account};" for name in denied),
            )
        if sequences:
            yield Finding(
                "error",
                "results.permission",
                f"user {self.url.username!r} may not use the sequence {', '.join(sequences)}: it cannot insert",
                " ".join(
                    f"GRANT USAGE ON SEQUENCE {name} TO {account};"
                    if self.results.dialect == "postgresql"
                    else f"GRANT SELECT, INSERT ON {name} TO {account};"
                    for name in sequences
                ),
            )

    def _sequences(self, connection: sa.Connection) -> list[str]:
        """The sequences of the keys that exist and may not be used (PostgreSQL, MariaDB)."""
        denied = []
        inspector = sa.inspect(connection)
        for table in self.tables:
            sequence = table.c.id.default if "id" in table.c else None
            if not connection.dialect.supports_sequences or not isinstance(sequence, sa.Sequence):
                continue
            if not inspector.has_sequence(sequence.name, schema=sequence.schema):
                continue
            name = connection.dialect.identifier_preparer.format_sequence(sequence)
            if self.results.dialect == "postgresql":
                usable = bool(connection.scalar(sa.text("SELECT has_sequence_privilege(:n, 'USAGE')"), {"n": name}))
            else:
                usable = self._may_take_next(connection, name)
            if not usable:
                denied.append(name)
        return denied

    def _may_take_next(self, connection: sa.Connection, name: str) -> bool:
        try:
            # Takes none. The name is quoted by the dialect.
            connection.execute(sa.text(f"SELECT NEXTVAL({name}) FROM DUAL WHERE 1 = 0"))  # noqa: S608
        except DBAPIError as error:
            if not is_refusal(error):
                raise
            return False
        return True

    def _grantee(self) -> str:
        user = self.url.username or "user"
        return _quoted(user) if self.results.dialect == "postgresql" else f"'{user}'@'%'"


def _touching_nothing(
    table: sa.Table, dialect: str
) -> list[tuple[Literal["SELECT", "INSERT", "UPDATE", "DELETE"], Any]]:
    key, changed = next(pair for pair in _KEY_AND_VALUE if pair[0] in table.c)
    nothing = sa.false()
    # Not from the table itself: INSERT must not be refused for want of SELECT.
    filled = [column for column in table.c if not column.nullable or column.name == key]
    no_rows = sa.select(*(sa.literal("" if isinstance(each.type, sa.String) else 0) for each in filled)).where(nothing)
    if dialect in ("mysql", "mariadb"):
        no_rows = no_rows.select_from(sa.text("DUAL"))  # they know no WHERE without FROM
    return [
        ("SELECT", sa.select(table.c[key]).where(nothing)),
        ("INSERT", sa.insert(table).from_select(filled, no_rows, include_defaults=False)),
        ("UPDATE", sa.update(table).where(nothing).values({changed: sa.null() if changed == "result" else ""})),
        ("DELETE", sa.delete(table).where(nothing)),
    ]


def _names(tables: list[sa.Table]) -> str:
    return " and ".join(table.fullname for table in tables)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
