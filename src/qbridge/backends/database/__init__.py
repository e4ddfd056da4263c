"""Which database keeps the results, and how is it reached? The model, and the settings that it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from qbridge.backends.base import Finding, ResultBackend, ResultCapabilities, Seconds, need_driver
from qbridge.exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

__all__ = ["DatabaseResults"]

DRIVERS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        # URL scheme without a driver: the drivers we know (scheme with driver, module), the preferred one first.
        # SQLAlchemy's own choice differs between 2.0 and 2.1, and is made before it looks at what is installed.
        "postgresql": (("postgresql+psycopg", "psycopg"), ("postgresql+psycopg2", "psycopg2")),
        "mysql": (("mysql+pymysql", "pymysql"), ("mysql+mysqldb", "MySQLdb")),
        "mariadb": (("mariadb+pymysql", "pymysql"), ("mariadb+mysqldb", "MySQLdb")),
    }
)
EXTRAS = MappingProxyType({"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"})
SCHEME_ALIASES = MappingProxyType({"postgres": "postgresql"})


def _as_text(value: Any) -> Any:
    # sqlalchemy.URL's str() hides the password; without importing SQLAlchemy here, ask the object itself.
    render = getattr(value, "render_as_string", None)
    return render(hide_password=False) if render is not None else value


_SECRET_PARAMETERS = frozenset({"password", "passwd", "pwd", "sslpassword", "ssl_key_password"})


class DatabaseResults(ResultBackend, frozen=True):
    """Results kept in an SQL database and read by anybody who knows the id, until they expire.

    The tables are those of Celery 5.7, so plain Celery reads and writes the same results.

    Args:
        url: SQLAlchemy URL, with or without Celery's ``db+`` in front and with or without a driver.
        timeout: seconds that ``get()`` waits where the caller names none.
        look_timeout: seconds that one look may take: ``state``, ``ready()``, ``progress()``, ``forget()``.
        expires: seconds that a result is kept.
        create_tables: whether missing tables are created at first use (``CREATE TABLE IF NOT EXISTS``, never
            ``ALTER``). False: ``qbridge check`` prints the SQL.
        table_names: names of the tables: ``{"task": …, "group": …}``.
        table_schemas: their schemas, likewise.
        pool_size: connections that a process keeps open.
        max_overflow: connections that it may open beyond that for a while.
        pool_timeout: seconds to wait for a free one.
        connect_timeout: seconds for one attempt to connect; whole seconds are used.
        statement_timeout: seconds that one statement may take; None: the server is not told (PgBouncer refuses to
            pass it on), and the client gives up after 10.
        lock_timeout: seconds that it may wait for a lock; None: the server is not told.
        cleanup_interval: seconds between two removals of expired results by each worker, which needs no beat; None:
            workers remove none. Times are spread by chance.
        poll_min: seconds between the first looks at a result that is waited for.
        poll_max: seconds between the later ones; the interval grows from one to the other.
    """

    schemes: ClassVar[tuple[str, ...]] = ("db", "sqlite", "postgresql", "postgres", "mysql", "mariadb")

    kind: Literal["database"] = "database"
    url: Annotated[SecretStr, BeforeValidator(_as_text)]
    expires: Seconds = 86400.0
    create_tables: bool = True
    table_names: Mapping[Literal["task", "group"], str] | None = None
    table_schemas: Mapping[Literal["task", "group"], str] | None = None
    pool_size: int = Field(default=5, ge=1)
    max_overflow: int = Field(default=10, ge=0)
    pool_timeout: Seconds = 5.0
    connect_timeout: Seconds = 5.0
    statement_timeout: Seconds | None = 10.0
    lock_timeout: Seconds | None = 5.0
    cleanup_interval: Seconds | None = 3600.0
    poll_min: Seconds = 0.001
    poll_max: Seconds = 0.015

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            url: str | URL | SecretStr,
            kind: Literal["database"] = "database",
            timeout: float | timedelta = 60.0,
            look_timeout: float | timedelta = 5.0,
            expires: float | timedelta = 86400.0,
            create_tables: bool = True,
            table_names: Mapping[Literal["task", "group"], str] | None = None,
            table_schemas: Mapping[Literal["task", "group"], str] | None = None,
            pool_size: int = 5,
            max_overflow: int = 10,
            pool_timeout: float | timedelta = 5.0,
            connect_timeout: float | timedelta = 5.0,
            statement_timeout: float | timedelta | None = 10.0,
            lock_timeout: float | timedelta | None = 5.0,
            cleanup_interval: float | timedelta | None = 3600.0,
            poll_min: float | timedelta = 0.001,
            poll_max: float | timedelta = 0.015,
        ) -> None: ...

    @field_validator("url")
    @classmethod
    def _url_names_a_driver(cls, value: SecretStr) -> SecretStr:
        """Make the URL complete: no ``db+``, a driver that is installed and that SQLAlchemy can use here."""
        from sqlalchemy.engine import make_url  # not at import: only those who use a database pay for SQLAlchemy
        from sqlalchemy.exc import ArgumentError

        text = value.get_secret_value().strip().removeprefix("db+")
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):  # its message may quote the URL
            raise ConfigurationError(
                "this SQLAlchemy URL cannot be read",
                "Write dialect+driver://user:password@host:port/database, the password percent-encoded.",
            ) from None
        name = SCHEME_ALIASES.get(url.drivername, url.drivername)
        if name in DRIVERS:
            name = _installed_driver(name)
        url = url.set(drivername=name)
        _refuse_what_cannot_be_used(url)
        secret = next((name for name in url.query if name.lower() in _SECRET_PARAMETERS), None)
        if secret is not None:  # SQLAlchemy, kombu and Celery mask what stands before the @, and nothing else
            raise ConfigurationError(
                f"this URL has its {secret} among the query parameters, where logs and reports would show it",
                "Write dialect+driver://user:password@host:port/database; a key's password belongs into a file.",
            )
        if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:"):
            # As of the working directory now: a daemon changes it, and its workers would use another file.
            url = url.set(database=str(Path(url.database).absolute()))
        return SecretStr(url.render_as_string(hide_password=False))

    @model_validator(mode="after")
    def _polls_grow(self) -> Self:
        if self.poll_min > self.poll_max:
            raise ValueError("poll_min is above poll_max: the interval grows from poll_min to poll_max")
        return self

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``db+dialect+driver://user:password@host:port/database`` or the same without ``db+``."""
        return cls(url=url)

    def sqlalchemy_url(self) -> URL:
        """The URL for ``sqlalchemy.create_engine``; its ``str()`` and ``repr()`` hide the password."""
        from sqlalchemy.engine import make_url

        return make_url(self.url.get_secret_value())

    @property
    def dialect(self) -> str:
        """The name before the driver: ``"sqlite"``, ``"postgresql"``, ``"mysql"``, ``"mariadb"`` or another."""
        return self.url.get_secret_value().partition(":")[0].partition("+")[0]

    @property
    def driver(self) -> str:
        """The name of the driver, such as ``"psycopg"``; empty where SQLAlchemy chooses."""
        return self.url.get_secret_value().partition(":")[0].partition("+")[2]

    def celery_url(self) -> str:
        return f"db+{self.url.get_secret_value()}"

    def safe_url(self) -> str:
        return f"db+{self.sqlalchemy_url().render_as_string(hide_password=True).replace(':***@', ':**@')}"

    def celery_settings(self) -> dict[str, Any]:
        """The bounded way to keep results in a database; what keeps them is qbridge's own backend class."""
        return {
            **self.minimal_celery_settings(),
            "result_expires": self.expires,
            "database_engine_options": self.engine_options(),
            "database_create_tables_at_setup": self.create_tables,
            "result_backend_thread_safe": True,
            # Read by qbridge's backend: a frozen server keeps none of its own timeouts, so the client ends the wait.
            "result_backend_transport_options": {
                "connect_timeout": self.connect_timeout,
                "operation_timeout": self.operation_timeout,
                "cleanup_interval": self.cleanup_interval,
            },
            "result_backend_always_retry": True,
            "result_backend_max_retries": 3,
            "result_backend_base_sleep_between_retries_ms": 100,
            "result_backend_max_sleep_between_retries_ms": 1000,
        }

    def minimal_celery_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"result_backend": self.celery_url()}
        if "expires" in self.model_fields_set:
            settings["result_expires"] = self.expires
        if not self.create_tables:
            settings["database_create_tables_at_setup"] = False
        if self.table_names:
            settings["database_table_names"] = dict(self.table_names)
        if self.table_schemas:
            settings["database_table_schemas"] = dict(self.table_schemas)
        if self.model_fields_set & {"pool_size", "max_overflow", "pool_timeout", "connect_timeout"}:
            settings["database_engine_options"] = self.engine_options()
        return settings

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of ``sqlalchemy.create_engine``: a bounded pool, and bounded waits in the driver."""
        return {
            "pool_pre_ping": True,
            "pool_recycle": 3600,
            "pool_size": self.pool_size,
            "max_overflow": self.max_overflow,
            "pool_timeout": self.pool_timeout,
            "connect_args": self.connect_args(),
        }

    def connect_args(self) -> dict[str, Any]:
        """Arguments of the driver's ``connect``: the timeouts that it has, but for those that the URL's query names."""
        query = self.sqlalchemy_url().query
        arguments = {name: value for name, value in self._driver_timeouts().items() if name not in query}
        if self.driver in ("psycopg", "psycopg2"):
            bounds = (("statement_timeout", self.statement_timeout), ("lock_timeout", self.lock_timeout))
            options = [f"-c {name}={_ms(seconds)}" for name, seconds in bounds if seconds is not None]
            if options:  # after those of the URL, which arguments would replace
                theirs = query.get("options", ())
                arguments["options"] = " ".join([*((theirs,) if isinstance(theirs, str) else theirs), *options])
        return arguments

    def _driver_timeouts(self) -> dict[str, Any]:
        whole = max(1, round(self.connect_timeout))
        if self.driver in ("psycopg", "psycopg2"):
            return {
                # libpq counts whole seconds per address, and takes 1 for 2.
                "connect_timeout": max(2, whole),
                # statement_timeout is the server's: a frozen server does not keep it. Data that the server's kernel
                # does not acknowledge ends the connection after this, an idle one after 30 + 3 x 10 s.
                "tcp_user_timeout": _ms(max(self.operation_timeout, self.connect_timeout)),
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
            }
        if self.driver in ("pymysql", "mysqldb"):
            patience = max(1, round(self.operation_timeout))
            # Of the client's socket: they hold for a frozen server too.
            arguments: dict[str, Any] = {
                "connect_timeout": whole,
                "read_timeout": patience,
                "write_timeout": patience,
            }
            if self.lock_timeout is not None:
                seconds = max(1, round(self.lock_timeout))
                arguments["init_command"] = f"SET SESSION innodb_lock_wait_timeout={seconds}"
            return arguments
        if self.dialect == "sqlite":
            # Seconds to wait while another process writes.
            return {"timeout": self.operation_timeout if self.lock_timeout is None else self.lock_timeout}
        return {}  # a driver that we do not know: its own defaults, and the URL's query, decide

    @property
    def operation_timeout(self) -> float:
        """Seconds after which the client gives up one read or write, whatever the server does."""
        return 10.0 if self.statement_timeout is None else self.statement_timeout

    @property
    def capabilities(self) -> ResultCapabilities:
        return ResultCapabilities(
            readable_elsewhere=True,
            claims=True,
            chords=True,
            progress=True,
            notes=("waiting polls the database; chords are polled by a task, once a second",),
        )

    def check(self) -> Iterable[Finding]:
        from qbridge.backends.database.check import check  # loads SQLAlchemy: not needed to configure

        return check(self)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _installed_driver(dialect: str) -> str:
    """The first known driver that is installed.

    Raises:
        ConfigurationError: if none is, naming the extra that brings one.
    """
    for name, module in DRIVERS[dialect]:
        if find_spec(module) is not None:
            return name
    need_driver(DRIVERS[dialect][0][1], EXTRAS[dialect], f"{dialect}://")
    return dialect


def _refuse_what_cannot_be_used(url: URL) -> None:
    from sqlalchemy.exc import NoSuchModuleError

    modules = {name: (module, dialect) for dialect, each in DRIVERS.items() for name, module in each}
    if url.drivername in modules:
        module, dialect = modules[url.drivername]
        need_driver(module, EXTRAS[dialect], f"{url.drivername}://")
    try:
        url.get_dialect()
    except NoSuchModuleError:
        raise ConfigurationError(
            f"SQLAlchemy knows no {url.drivername}://",
            "Install the package that brings this dialect, or write sqlite, postgresql, mysql or mariadb.",
        ) from None
    if url.drivername.endswith(("+asyncpg", "+aiosqlite", "+aiomysql", "+asyncmy", "+psycopg_async")):
        raise ConfigurationError(
            f"{url.drivername}:// is an asyncio driver, and results are read and written by threads too",
            "Use postgresql+psycopg://, mysql+pymysql:// or sqlite://; waiting with await works with them.",
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "an SQLite database in memory cannot be seen by the worker, nor by other threads",
            "Name a file: sqlite:///relative.db or sqlite:////absolute/path.db.",
        )
