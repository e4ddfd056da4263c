"""How are results stored in a database and read from it: Celery's backend, with one statement per operation."""

# long because: it is Celery's backend interface, method by method; tables and engine are modules of their own.

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, cast

import sqlalchemy as sa
from celery import states
from celery.backends.base import BaseBackend
from celery.backends.database import DatabaseBackend as CeleryDatabaseBackend
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import result_from_tuple
from celery.utils.imports import symbol_by_name
from celery.utils.time import get_exponential_backoff_interval, maybe_timedelta
from kombu.utils import encoding
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchTableError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.orm import Session

from qbridge.backends.database.claim_store import DatabaseClaims
from qbridge.backends.database.damage import is_rows_fault
from qbridge.backends.database.engine import PooledEngine
from qbridge.backends.database.fitting import shortened, storable
from qbridge.backends.database.numbers import put, with_number
from qbridge.backends.database.quiet import inside_sqlite
from qbridge.backends.database.tables import Layout, ResultTables, missing_tables
from qbridge.backends.storing import KeepsOutcomes, ValueRefused
from qbridge.exceptions import ConfigurationError, PayloadError
from qbridge.serialization.results import TypedResultMixin, has_types, revive

__all__ = ["DatabaseBackend"]

ensure_bytes: Callable[[Any], bytes] = cast(
    "Callable[[Any], bytes]", encoding.ensure_bytes
)  # kombu leaves it without types

_BATCH = 500
_TRACEBACK = 1_000_000
"""Bytes of a traceback at most, where the column takes any length."""
_LENGTHS = (None, 8_192, 2_048, 256)
"""Characters of an error's text and bytes of its traceback that are tried in turn, until both have room."""
_CREATE_ATTEMPTS = 6
_REFUSED = ((1366,), (1406,), (3854,), (3988,))
"""MySQL's numbers for texts that do not fit a column or its character set: drivers call some of them operational."""


class DatabaseBackend(KeepsOutcomes, TypedResultMixin, CeleryDatabaseBackend):
    """Celery's database results on a pooled engine, without pickles, and without a table ever being altered.

    The tables are Celery's own and are made at first use if ``database_create_tables_at_setup`` is true; with False
    they must be there. ``result_backend_transport_options`` may hold ``connect_timeout``, ``operation_timeout`` and
    ``cleanup_interval``, in seconds.
    """

    def __init__(
        self,
        dburi: str | None = None,
        engine_options: dict[str, Any] | None = None,
        url: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Celery's own __init__ would rename its process-wide ORM tables, make its SessionManager and connect.
        BaseBackend.__init__(self, expires_type=maybe_timedelta, url=url, **kwargs)
        conf = self.app.conf
        self.thread_safe = True
        self.url: str = url or dburi or conf.database_url
        if not self.url:
            raise ImproperlyConfigured("The database result backend has no URL; set result_backend to db+<URL>.")
        always, most = conf.result_backend_always_retry, conf.result_backend_max_retries
        # As in Celery: this backend retries unless told not to.
        self.always_retry = always if conf.value_set_for("result_backend_always_retry") and always is not None else True
        self.max_retries = most if conf.value_set_for("result_backend_max_retries") and most is not None else 3
        self.engine_options: dict[str, Any] = {**(conf.database_engine_options or {}), **(engine_options or {})}
        self.short_lived_sessions = True
        self.tables: ResultTables = ResultTables(conf.database_table_names, conf.database_table_schemas)
        callback = kwargs.get("engine_callback", conf.database_engine_callback)
        if isinstance(callback, str):
            callback = symbol_by_name(callback)
        options = conf.result_backend_transport_options or {}
        self.operation_timeout: float = float(options.get("operation_timeout", 10.0))
        #: Seconds between two removals of expired results by a worker; None: somebody else's business.
        interval = options.get("cleanup_interval")
        self.cleanup_interval: float | None = None if interval is None else float(interval)
        self._pooled = PooledEngine(
            self.url,
            self.engine_options,
            cast("Callable[[Any], Any] | None", callback),
            connect_timeout=float(options.get("connect_timeout", 5.0)),
            operation_timeout=self.operation_timeout,
        )
        self._claims = DatabaseClaims(self, (conf.database_table_schemas or {}).get("task"))
        self._layout: Layout | None = None
        self._is_sqlite = self.url.removeprefix("db+").startswith("sqlite")

    # -- the database

    @property
    def engine(self) -> sa.Engine:
        """The engine of this process."""
        return self._pooled.get()

    def close(self) -> None:
        """Close the pooled connections."""
        self._pooled.close()

    def claim_store(self) -> DatabaseClaims:
        """What keeps claims beside the results."""
        return self._claims

    def ResultSession(self, session_manager: Any = None) -> Session:  # noqa: N802 - Celery's name
        """A session on the pooled engine; the tables are there."""
        self._find_layout()
        return Session(self.engine, autoflush=False, expire_on_commit=False)

    def _create_tables(self) -> None:
        self._find_layout()

    def _find_layout(self) -> Layout:
        layout = self._layout
        if layout is None:
            engine = self.engine
            # Two threads may look at once: harmless, and a lock held at a fork would block the child for ever.
            try:
                layout = Layout.find(engine, self.tables, bool(self.extended_result))
            except NoSuchTableError:
                self._make_tables(engine)
                layout = Layout.find(engine, self.tables, bool(self.extended_result))
            self._layout = layout
        return layout

    def _make_tables(self, engine: sa.Engine) -> None:
        if not self.app.conf.database_create_tables_at_setup:
            self._refuse(engine, "they are not made here, because database_create_tables_at_setup is False", None)
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                self.tables.metadata.create_all(engine)
            except DBAPIError as exc:
                # Several processes start at once, and looking whether a table is there is not the same as making it.
                if not missing_tables(engine, self.tables):
                    return
                if attempt == _CREATE_ATTEMPTS - 1:
                    self._refuse(engine, f"they could not be made ({type(exc.orig).__name__})", exc)
                time.sleep(0.01 * 2**attempt)
            else:
                return

    def _refuse(self, engine: sa.Engine, why: str, cause: Exception | None) -> NoReturn:
        missing = " and ".join(missing_tables(engine, self.tables)) or self.tables.task.fullname
        raise ConfigurationError(
            f"The result tables {missing} are missing in {self.as_uri()}, and {why}",
            f"Create them once, as a user who may:\n{self.tables.statements(engine.dialect)}",
        ) from cause

    @contextmanager
    def _session(self) -> Iterator[tuple[Session, Layout]]:
        with inside_sqlite() if self._is_sqlite else nullcontext():
            layout = self._find_layout()
            with Session(self.engine, autoflush=False, expire_on_commit=False) as session:
                yield session, layout

    # -- bounds

    def exception_safe_to_retry(self, exc: BaseException) -> Any:
        """Lost connections, locks and deadlocks pass; a wrong statement or value does not."""
        return not self._is_values_fault(exc) and isinstance(exc, (OperationalError, InterfaceError, InternalError))

    def _is_values_fault(self, error: BaseException) -> bool:
        """Also a value that the column refuses."""
        for cause in (error, error.__cause__, error.__context__):
            if isinstance(cause, (DataError, IntegrityError)):
                return True
            if isinstance(cause, DBAPIError) and cause.orig is not None and cause.orig.args[:1] in _REFUSED:
                return True
        return super()._is_values_fault(error)

    def _ensure_retryable(
        self,
        func: Callable[..., Any],
        *args: Any,
        fallback_exc: Callable[[Any], Exception] | None = None,
        fallback_msg: str | None = None,
        max_retries: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Celery's retries, with two differences: a lost idle connection is free, and the whole has an end."""
        limit = (self.max_retries if max_retries is None else max_retries) if self.always_retry else 0
        end = time.monotonic() + 2 * self.operation_timeout
        retries = 0
        repeated = False
        while True:
            try:
                return func(*args, **kwargs)
            except SQLAlchemyError as exc:
                # What was found at the first look may have changed: a table made, a column added.
                self._layout = None
                lost = isinstance(exc, DBAPIError) and exc.connection_invalidated
                if not repeated and (lost or isinstance(exc, ProgrammingError)) and time.monotonic() < end:
                    repeated = True
                    continue
                if retries < limit and self.exception_safe_to_retry(exc) and time.monotonic() < end:
                    retries += 1
                    pause = get_exponential_backoff_interval(
                        self.base_sleep_between_retries_ms, retries, self.max_sleep_between_retries_ms, True
                    )
                    self._sleep(min(pause / 1000, max(0.0, end - time.monotonic())))
                    continue
                if fallback_exc is None:
                    raise
                raise fallback_exc(fallback_msg) from exc

    # -- storing

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> None:
        with self._session() as (session, layout):
            row = self._fitting_row(layout, task_id, result, state, traceback, request)
            values = {f"new_{name}": row.get(name) for name in layout.columns}
            if layout.upsert is not None:
                put(session, layout.upsert, values)
            else:
                self._update_or_insert(session, layout, values)
            session.commit()

    def _update_or_insert(self, session: Session, layout: Layout, values: dict[str, Any]) -> None:
        # For databases without an upsert: each statement is atomic, and a SUCCESS is never written over.
        insert = layout.insert, values
        for left in (2, 1, 0):
            if cast("Any", session.execute(layout.update, values)).rowcount:
                return
            task = self.tables.task
            if session.execute(sa.select(task.c.id).where(task.c.task_id == values["new_task_id"])).first():
                return
            try:
                session.execute(*insert)
            except IntegrityError:
                if not left:
                    raise
                session.rollback()  # another worker was faster, or some row has the number that this one would get
                insert = with_number(layout.insert, values)
            else:
                return

    def _fitting_row(
        self, layout: Layout, task_id: str, result: Any, state: str, traceback: Any, request: Any
    ) -> dict[str, Any]:
        """Make the row; of an error and its traceback as much as the columns take.

        Raises:
            PayloadError: if a value is larger than the column.
        """
        limit = layout.room.get("result")
        room = layout.room.get("traceback", _TRACEBACK)
        size = 0
        for longest in _LENGTHS:
            fitting = result if longest is None else shortened(result, longest)
            text = None if traceback is None else storable(str(traceback), min(room, longest or room))
            locked, text = self.locked(task_id, state, fitting, text, request)
            row = self._row(task_id, locked, state, text, request)
            if self.lock is not None:
                row["children"] = None  # they are with the value
            size = len(row["result"])
            if limit is None or size <= limit:
                return row
            if state not in states.EXCEPTION_STATES:
                break
        table = self.tables.task.fullname
        raise ValueRefused(
            f"the value of task {task_id} ({state}) has {size:,} bytes as it is stored, and the column result of "
            f"{table} takes {limit:,}",
            f"Store the data elsewhere and return a reference, or run: ALTER TABLE {table} MODIFY result LONGBLOB;",
        )

    def _row(self, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> dict[str, Any]:
        row: dict[str, Any] = self._get_result_meta(
            result=ensure_bytes(self.encode(result)),
            state=state,
            traceback=traceback,
            request=request,
            format_date=False,
            encode=True,
        )
        row["task_id"] = task_id
        # Celery's column default fires for unfinished states too; it is what expiry goes by.
        row["date_done"] = _utc_now()
        children = row.get("children")
        row["children"] = ensure_bytes(self.encode(children)) if children else None
        stamped = row.get("stamped_headers")
        if stamped:
            info = {"stamped_headers": stamped, "stamps": {name: row[name] for name in stamped if name in row}}
            row["stamps"] = ensure_bytes(self.encode(info))
        else:
            row.pop("stamps", None)
        return row

    # -- reading

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        with self._session() as (session, layout):
            task = self.tables.task
            found = session.query(*(task.c[name] for name in layout.columns)).filter(task.c.task_id == task_id)
            try:
                row = found.first()
            except Exception as exc:
                if is_rows_fault(exc):
                    raise _unreadable(task_id, exc) from exc
                raise
        if row is None:
            return self._blank(task_id)
        return self._meta(dict(row._mapping))

    def get_many_meta(self, task_ids: Iterable[str], *, ready_only: bool = True) -> dict[str, Any]:
        """Read the metas of many tasks at once: one query per 500, nothing cached, no retries.

        Args:
            task_ids: ids of tasks.
            ready_only: leave out tasks that have not ended.

        Returns:
            The metas of those found by id; in place of one that cannot be decoded, the exception that says so.
        """
        ids = list(task_ids)
        found: dict[str, Any] = {}
        for start in range(0, len(ids), _BATCH):
            for task_id, row in self._read_apart(ids[start : start + _BATCH], ready_only):
                try:
                    found[task_id] = row if isinstance(row, Exception) else self._meta(row)
                except Exception as exc:  # noqa: BLE001
                    # One broken row must not keep the others from their results.
                    found[task_id] = exc
        return found

    def _read_apart(self, ids: list[str], ready_only: bool) -> Iterator[tuple[str, dict[str, Any] | PayloadError]]:
        """Read rows; one that cannot be read fails the whole query, and is found by halves."""
        try:
            rows = self._once_more(self._read_many, ids, ready_only)
        except Exception as exc:
            if not is_rows_fault(exc):
                raise
            if len(ids) == 1:
                yield ids[0], _unreadable(ids[0], exc)
                return
        else:
            yield from ((row["task_id"], row) for row in rows)
            return
        for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            yield from self._read_apart(half, ready_only)

    def _once_more(self, func: Callable[..., Any], *args: Any) -> Any:
        return self._ensure_retryable(func, *args, max_retries=0)

    def _read_many(self, ids: list[str], ready_only: bool) -> list[dict[str, Any]]:
        with self._session() as (session, layout):
            task = self.tables.task
            query = sa.select(*(task.c[name] for name in layout.columns)).where(task.c.task_id.in_(ids))
            if ready_only:
                # a row without a status is damaged, and will not change
                query = query.where(task.c.status.in_(sorted(states.READY_STATES)) | task.c.status.is_(None))
            return [dict(row._mapping) for row in session.execute(query)]

    def _blank(self, task_id: str) -> dict[str, Any]:
        blank: dict[str, Any] = dict.fromkeys(("result", "traceback", "date_done", "children", "result_json"), None)
        return {"task_id": task_id, "status": states.PENDING, **blank}

    def _meta(self, row: dict[str, Any]) -> dict[str, Any]:
        payload = row.get("result")
        row["result"] = self._decode_stored_result(payload)
        row.setdefault("children", None)
        for name in ("args", "kwargs", "children"):
            if row.get(name) is not None:
                # Text of other Celery versions in these must not hide the result.
                row[name] = self._decode_leniently(row[name])
        stamps = row.pop("stamps", None)
        meta = self.open_meta(row, has_types(payload))
        meta = self.meta_from_decoded(meta)
        info = None if stamps is None else self._decode_leniently(stamps)
        if isinstance(info, dict):
            if "stamped_headers" in info:
                meta["stamped_headers"] = info["stamped_headers"]
            if isinstance(info.get("stamps"), dict):
                meta.update(info["stamps"])
        return meta

    def _decode_leniently(self, payload: Any) -> Any:
        try:
            return revive(self.decode(payload))
        except Exception:  # noqa: BLE001
            # Each serializer has errors of its own.
            return None

    def _decode_stored_result(self, payload: Any) -> Any:
        try:
            return self.decode(None if payload is None else ensure_bytes(payload))
        except Exception as exc:
            if not ensure_bytes(payload).startswith(b"\x80"):
                raise
            raise PayloadError(
                "A stored result is a pickle, as Celery before 5.7 wrote them. It is not loaded: it could run code",
                "Let the task run again, or read it once with plain Celery and store it as JSON.",
            ) from exc

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """Poll for one result: at once, soon, and ever more rarely until ``interval`` (seconds) is reached."""
        self._ensure_not_eager()
        end = None if timeout is None else time.monotonic() + timeout
        pause = min(0.002, interval)
        while True:
            meta = cast("dict[str, Any]", self.get_task_meta(task_id))
            if meta["status"] in states.READY_STATES:
                return meta
            if on_interval is not None:
                on_interval()
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise CeleryTimeout("The operation timed out.")
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 1.5, interval)

    def _task_result_exists(self, task_id: str) -> bool:
        with self._session() as (session, _):
            task = self.tables.task
            return session.execute(sa.select(task.c.id).where(task.c.task_id == task_id)).first() is not None

    # -- groups, forgetting, expiry

    def _save_group(self, group_id: str, result: Any) -> Any:
        value = ensure_bytes(self.encode(self.prepare_value(result)))
        group = self.tables.group
        with self._session() as (session, layout):
            if layout.upsert_group is not None:
                row = {"new_taskset_id": group_id, "new_result": value, "new_date_done": _utc_now()}
                put(session, layout.upsert_group, row)
            else:
                session.execute(sa.delete(group).where(group.c.taskset_id == group_id))
                row = {"taskset_id": group_id, "result": value, "date_done": _utc_now()}
                session.execute(sa.insert(group).values(row).inline())
            session.commit()
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        group = self.tables.group
        with self._session() as (session, _):
            query = sa.select(group.c.taskset_id, group.c.result, group.c.date_done)
            row = session.execute(query.where(group.c.taskset_id == group_id)).first()
        if row is None:
            return None
        meta = dict(row._mapping)
        value = self._decode_stored_result(meta["result"])
        meta["result"] = None if value is None else result_from_tuple(value, self.app)
        return meta

    def _delete_group(self, group_id: str) -> None:
        self._delete(self.tables.group.c.taskset_id == group_id)

    def _forget(self, task_id: str) -> None:
        self._delete(self.tables.task.c.task_id == task_id)

    def _delete(self, condition: sa.ColumnElement[bool]) -> None:
        with self._session() as (session, _):
            session.execute(sa.delete(cast("Any", condition).left.table).where(condition))
            session.commit()

    def _cleanup(self) -> None:
        if not self.expires:
            return
        before = _utc_now() - cast("timedelta", self.expires)
        for table in (self.tables.task, self.tables.group):
            # In portions, so that no statement is long and no lock is large.
            while True:
                with self._session() as (session, _):
                    query = sa.select(table.c.id).where(table.c.date_done < before).limit(1000)
                    ids = list(session.execute(query).scalars())
                    if ids:
                        # once more by its time: it may have been stored anew since
                        session.execute(sa.delete(table).where(table.c.id.in_(ids), table.c.date_done < before))
                    session.commit()
                if len(ids) < 1000:
                    break
        self._claims.clean()


def _unreadable(task_id: str, cause: Exception) -> PayloadError:
    error = PayloadError(
        f"The stored result of task {task_id} cannot be read ({type(cause).__name__})",
        "A column of its row holds what the database's driver cannot read: correct the row, or delete it.",
    )
    error.__cause__ = cause
    return error


def _utc_now() -> datetime:
    # The column has no time zone; servers would convert an aware value to the session's.
    return datetime.now(UTC).replace(tzinfo=None)
