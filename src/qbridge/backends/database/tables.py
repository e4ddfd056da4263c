"""Where do results lie in a database: Celery's own two tables, as they are found there.

The tables are Celery's (``celery.backends.database.models``), column by column, so that plain Celery reads what we
write and the other way round. They are described here once more because Celery's ORM classes are process-wide: giving
one app other table names would rename the tables of every app.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.schema import CreateIndex, CreateSequence, CreateTable

__all__ = ["EXTENDED", "ID", "Layout", "ResultTables", "absent", "missing_tables", "room_of", "statements_for"]

_PLAIN = ("task_id", "status", "result", "date_done", "traceback", "children")
EXTENDED = ("name", "args", "kwargs", "worker", "retries", "queue", "stamps")
"""Columns that are filled under ``result_extended`` only."""

_MYSQLS = ("mysql", "mariadb")
# What Celery asks for there is BLOB and TEXT, of 65,535 bytes; plain Celery reads these just as well.
_BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *_MYSQLS)
_TEXT = sa.Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), *_MYSQLS)
# Elsewhere "a" and "A" are two ids anyway.
ID = sa.String(155).with_variant(mysql.VARCHAR(155, charset="utf8mb4", collation="utf8mb4_bin"), *_MYSQLS)
_ROOM: dict[type, int] = {
    mysql.TINYBLOB: 255, mysql.TINYTEXT: 255, sa.BLOB: 65_535, mysql.TEXT: 65_535, mysql.MEDIUMBLOB: 16_777_215,
    mysql.MEDIUMTEXT: 16_777_215,
}  # fmt: skip

_TOO_LARGE = sa.literal_column(str(2**64 - 1), sa.BigInteger)
"""The largest number of MySQL: a sum with it is error 1690."""

_INTEGER = sa.Integer().with_variant(sa.BigInteger, "mssql")


class ResultTables:
    """Celery's result tables under the names and schemas of one app.

    Args:
        names: ``database_table_names``: ``task`` and ``group`` to other names.
        schemas: ``database_table_schemas``: the same to schemas.
    """

    def __init__(self, names: Mapping[str, str] | None = None, schemas: Mapping[str, str] | None = None) -> None:
        names, schemas = names or {}, schemas or {}
        self.metadata: sa.MetaData = sa.MetaData()
        schema = schemas.get("task")
        self.task: sa.Table = sa.Table(
            names.get("task") or "celery_taskmeta",
            self.metadata,
            sa.Column(
                "id",
                _INTEGER,
                sa.Sequence("task_id_sequence", schema=schema),
                primary_key=True,
                autoincrement=True,
            ),
            sa.Column("task_id", ID, unique=True),
            sa.Column("status", sa.String(50)),
            sa.Column("result", _BYTES, nullable=True),
            sa.Column("date_done", sa.DateTime, nullable=True, index=True),
            sa.Column("traceback", _TEXT, nullable=True),
            sa.Column("children", _BYTES, nullable=True),
            sa.Column("name", sa.String(155), nullable=True),
            sa.Column("args", _BYTES, nullable=True),
            sa.Column("kwargs", _BYTES, nullable=True),
            sa.Column("worker", sa.String(155), nullable=True),
            sa.Column("retries", sa.Integer, nullable=True),
            sa.Column("queue", sa.String(155), nullable=True),
            sa.Column("stamps", _BYTES, nullable=True),
            schema=schema,
            sqlite_autoincrement=True,
        )
        schema = schemas.get("group")
        self.group: sa.Table = sa.Table(
            names.get("group") or "celery_tasksetmeta",
            self.metadata,
            sa.Column(
                "id",
                _INTEGER,
                sa.Sequence("taskset_id_sequence", schema=schema),
                primary_key=True,
                autoincrement=True,
            ),
            sa.Column("taskset_id", ID, unique=True),
            sa.Column("result", _BYTES, nullable=True),
            sa.Column("date_done", sa.DateTime, nullable=True, index=True),
            schema=schema,
            sqlite_autoincrement=True,
        )

    def statements(self, dialect: Dialect) -> str:
        """The SQL that creates both tables, for an administrator to run.

        Args:
            dialect: of an engine that was connected: it then knows whether the server has sequences.
        """
        return statements_for(self.metadata.sorted_tables, dialect)


def statements_for(tables: Iterable[sa.Table], dialect: Dialect) -> str:
    """The SQL that creates some tables with all that belongs to them.

    Args:
        tables: to be made.
        dialect: of an engine that was connected: it then knows whether the server has sequences.
    """
    made: list[Any] = []
    for table in tables:
        default = table.c.id.default if "id" in table.c else None
        if dialect.supports_sequences and isinstance(default, sa.Sequence):
            made.append(CreateSequence(default))
        made.append(CreateTable(table))
        made.extend(CreateIndex(index) for index in table.indexes)
    return "\n".join(f"{str(item.compile(dialect=dialect)).strip()};" for item in made)


def missing_tables(engine: Engine, tables: ResultTables) -> list[str]:
    """Names of the result tables that the database does not have."""
    return [table.fullname for table in absent(engine, tables.metadata.sorted_tables)]


def absent(engine: Engine, tables: Iterable[sa.Table]) -> list[sa.Table]:
    """Those tables that the database does not have."""
    inspector = sa.inspect(engine)
    return [table for table in tables if not _exists(inspector, table)]


def _exists(inspector: Any, table: sa.Table) -> bool:
    return bool(inspector.has_table(table.name, schema=table.schema))


@dataclass(frozen=True)
class Layout:
    """The tables as they were found, and the statements that fit them.

    Older tables lack columns (Celery 5.6 has no ``children`` and no ``stamps``); they are written without them.
    """

    columns: tuple[str, ...]
    """Columns of the task table that are there and used."""

    upsert: sa.Insert | None
    """Stores a task in one statement unless SUCCESS is stored already; None: this database has no such statement."""

    update: sa.Update
    """The same for a row that is there."""

    insert: sa.Insert
    """The same for a row that is not there."""

    upsert_group: sa.Insert | None

    room: Mapping[str, int]
    """Bytes that a column of the task table takes, where there is a limit to it (MySQL, MariaDB)."""

    @classmethod
    def find(cls, engine: Engine, tables: ResultTables, extended: bool) -> Layout:
        """Look at the database once.

        Args:
            engine: connected to the database.
            tables: what to look for.
            extended: whether the columns of ``result_extended`` are used.
        """
        inspector = sa.inspect(engine)
        task, group = tables.task, tables.group
        found = inspector.get_columns(task.name, schema=task.schema)
        there = {column["name"] for column in found}
        if not {"task_id", "status", "result"} <= there:
            # Looked up while another process was making it.
            raise NoSuchTableError(task.fullname)
        # After the tables were seen: they and their sequences are made in one transaction, so both are there now.
        task_insert, group_insert = (_insertable(inspector, engine.dialect, table) for table in (task, group))
        wanted = _PLAIN + EXTENDED if extended else _PLAIN
        columns = tuple(name for name in wanted if name in there)
        written = [name for name in columns if name != "task_id"]
        values: dict[str, Any] = {name: sa.bindparam(f"new_{name}", type_=task.c[name].type) for name in written}
        key = sa.bindparam("new_task_id", type_=task.c.task_id.type)
        if "stamps" in values:
            values["stamps"] = sa.func.coalesce(values["stamps"], task.c.stamps)
        dialect = engine.dialect.name
        return cls(
            columns=columns,
            upsert=_upsert(dialect, task, task_insert, "task_id", written, open_only=True)
            if _is_unique(inspector, task, "task_id")
            else None,
            update=sa.update(task).where(task.c.task_id == key, _open(task)).values(values),
            insert=sa.insert(task_insert).values({name: _parameter(task, name) for name in columns}).inline(),
            upsert_group=_upsert(dialect, group, group_insert, "taskset_id", ["result", "date_done"], open_only=False)
            if _is_unique(inspector, group, "taskset_id")
            else None,
            room=room_of(engine.dialect, found),
        )


def room_of(dialect: Dialect, columns: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes that columns take, by name; those without a limit that matters are left out.

    Args:
        dialect: of the engine.
        columns: as an inspector gives them.
    """
    if dialect.name not in _MYSQLS:
        return {}
    return {each["name"]: _ROOM[kind] for each in columns if (kind := type(each["type"])) in _ROOM}


def _open(task: sa.Table) -> Any:
    # As in Celery, nothing is written over a SUCCESS: a second run of a task does not replace its result.
    return sa.or_(task.c.status.is_(None), task.c.status != "SUCCESS")


def _parameter(table: sa.Table, name: str) -> Any:
    return sa.bindparam(f"new_{name}", type_=table.c[name].type)


def _insertable(inspector: Any, dialect: Dialect, table: sa.Table) -> Any:
    """The table to insert into: one that numbers its rows by itself, if the sequence that Celery uses is missing."""
    default = table.c.id.default
    if (
        not dialect.supports_sequences
        or not isinstance(default, sa.Sequence)
        or inspector.has_sequence(default.name, schema=default.schema)
    ):
        return table
    return sa.table(table.name, *(sa.column(each.name, each.type) for each in table.c), schema=table.schema)


def _upsert(dialect: str, table: sa.Table, target: Any, key: str, written: list[str], *, open_only: bool) -> Any:
    values = {name: _parameter(table, name) for name in [key, *written]}
    if dialect in ("postgresql", "sqlite"):
        kind = postgresql if dialect == "postgresql" else sqlite
        insert: Any = kind.insert(target).values(values).inline()
        new = {name: insert.excluded[name] for name in written}
        if "stamps" in new:
            new["stamps"] = sa.func.coalesce(new["stamps"], table.c.stamps)
        return insert.on_conflict_do_update(
            index_elements=[table.c[key]], set_=new, where=_open(table) if open_only else None
        )
    if dialect in ("mysql", "mariadb"):
        insert = mysql.insert(target).values(values).inline()
        new = {name: insert.inserted[name] for name in written}
        if "stamps" in new:
            new["stamps"] = sa.func.coalesce(new["stamps"], table.c.stamps)
        if open_only:
            done = table.c.status == "SUCCESS"
            new = {name: sa.case((done, table.c[name]), else_=value) for name, value in new.items()}
            # Assignments happen in order and see the earlier ones: the status decides for all, so it comes last.
            new["status"] = new.pop("status")
        # "Duplicate" may be the number, if that of another row was given out: an error then, or its result were ours.
        whose = sa.case(
            (table.c[key] == insert.inserted[key], table.c[key]), else_=_TOO_LARGE + sa.func.abs(table.c.id)
        )
        return insert.on_duplicate_key_update([(key, whose), *new.items()])
    return None


def _is_unique(inspector: Any, table: sa.Table, column: str) -> bool:
    where = {"table_name": table.name, "schema": table.schema}
    if any(each["column_names"] == [column] for each in inspector.get_unique_constraints(**where)):
        return True
    return any(each["unique"] and each["column_names"] == [column] for each in inspector.get_indexes(**where))
