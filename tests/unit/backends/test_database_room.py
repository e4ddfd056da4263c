"""What the operator writes for a database is what SQLAlchemy, its drivers and Celery read."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import celery
import pytest
import sqlalchemy as sa
from celery.app.defaults import DEFAULTS

from qbridge.backends.database import DatabaseResults
from qbridge.exceptions import ConfigurationError

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("db+postgresql+psycopg://u:p%40@h:1/d", "postgresql+psycopg://u:p%40@h:1/d"),
        ("postgresql://h/d", "postgresql+psycopg://h/d"),
        ("postgres://h/d", "postgresql+psycopg://h/d"),
        ("mysql://h/d", "mysql+pymysql://h/d"),
        ("db+mariadb://h/d", "mariadb+pymysql://h/d"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("postgresql://h/d?sslmode=require", "postgresql+psycopg://h/d?sslmode=require"),
    ],
)
def test_a_url_is_completed_with_an_installed_driver(url: str, expected: str) -> None:
    """SQLAlchemy's own choice depends on its version, and not on what is installed."""
    assert expected == DatabaseResults.from_url(url).sqlalchemy_url().render_as_string(hide_password=False)
    assert f"db+{expected}" == DatabaseResults.from_url(url).celery_url()


def test_a_relative_file_is_one_of_the_directory_of_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A daemon changes its directory, and must not change its database with it."""
    monkeypatch.chdir(tmp_path)
    results = DatabaseResults(url="sqlite:///some.db")
    monkeypatch.chdir("/")
    assert str(tmp_path / "some.db") == results.sqlalchemy_url().database
    assert not (tmp_path / "some.db").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+asyncpg://u:s3cret@h/d", "asyncio"),
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
        ("u:s3cret@h/d", "cannot be read"),
        ("postgresql://u:s3cret@h:port/d", "cannot be read"),
        ("oracel://u:s3cret@h/d", "knows no oracel"),
    ],
)
def test_what_cannot_work_is_refused(url: str, words: str) -> None:
    """Naming what to do, and no secret."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        DatabaseResults(url=url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "drivers", "extra"),
    [
        ("postgresql://h/d", {"psycopg", "psycopg2"}, "postgres"),
        ("postgresql+psycopg2://h/d", {"psycopg2"}, "postgres"),
        ("mysql://h/d", {"pymysql", "MySQLdb"}, "mysql"),
        ("mariadb+pymysql://h/d", {"pymysql"}, "mysql"),
    ],
)
def test_a_missing_driver_is_said_at_configuration_time(
    url: str, drivers: set[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact extra to install."""
    find = importlib.util.find_spec
    for module in ("qbridge.backends.base", "qbridge.backends.database"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name in drivers else find(name))
    with pytest.raises(ConfigurationError, match=rf'pip install "qbridge\[{extra}\]"'):
        DatabaseResults(url=url)


def test_neither_the_model_nor_its_urls_load_a_driver() -> None:
    """And importing the room does not load SQLAlchemy."""
    code = (
        "import sys; from qbridge.backends.database import DatabaseResults as D;"
        "assert 'sqlalchemy' not in sys.modules;"
        "D(url='postgresql://h/d').celery_settings(); D(url='mysql://h/d').celery_settings();"
        "assert not {'psycopg', 'pymysql', 'celery', 'kombu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_room_is_a_value() -> None:
    """Comparable, hashable, picklable, and silent about its password."""
    results = DatabaseResults(url=sa.make_url(f"postgresql://u:{SECRET}@h/d"))
    assert results == pickle.loads(pickle.dumps(results))
    assert isinstance(hash(results), int)
    assert "db+postgresql+psycopg://u:**@h/d" == results.safe_url()
    for text in (repr(results), f"{results.model_dump()}", results.model_dump_json(), repr(results.sqlalchemy_url())):
        assert SECRET not in text


def test_celery_report_shows_no_password() -> None:
    """Celery masks the one that is in the URL."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(DatabaseResults(url=f"postgresql://u:{SECRET}@h/d").celery_settings())
    assert SECRET not in app.bugreport()


@pytest.mark.parametrize("name", ["password", "passwd", "sslpassword"])
def test_a_password_among_the_parameters_is_refused_without_showing_it(name: str) -> None:
    """Nobody masks it there: it was in the bridge's repr and in `celery report`."""
    with pytest.raises(ConfigurationError, match=name) as caught:
        DatabaseResults(url=f"postgresql://u@h/d?{name}={SECRET}")
    assert SECRET not in str(caught.value)


def test_every_setting_is_one_that_celery_reads() -> None:
    """Celery accepts any name in silence."""
    results = DatabaseResults(url="sqlite:////a.db", table_names={"task": "t"}, table_schemas={"group": "s"}, expires=5)
    extra = {"result_backend_thread_safe"}
    assert set() == set(results.celery_settings()) - set(DEFAULTS) - extra
    assert set() == set(results.minimal_celery_settings()) - set(DEFAULTS)
    assert {"task": "t"} == results.celery_settings()["database_table_names"]


@pytest.mark.parametrize("url", ["sqlite:////a.db", "postgresql://h/d", "postgresql+psycopg://h/d", "mysql://h/d"])
def test_sqlalchemy_takes_every_engine_option(url: str) -> None:
    """It refuses unknown ones when the engine is made."""
    results = DatabaseResults(url=url, pool_size=3, max_overflow=4, pool_timeout=2)
    engine = sa.create_engine(results.sqlalchemy_url(), **results.engine_options())
    assert isinstance(engine.pool, sa.QueuePool)
    assert 3 == engine.pool.size()


def test_psycopg_gets_the_bounds_that_libpq_knows() -> None:
    """libpq refuses unknown words in a connection string when it connects: they are all known."""
    from psycopg import pq

    arguments = DatabaseResults(url="postgresql://h/d", statement_timeout=3, lock_timeout=2).connect_args()
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    assert set() == set(arguments) - known
    assert "-c statement_timeout=3000 -c lock_timeout=2000" == arguments["options"]


def test_options_of_the_url_are_kept() -> None:
    """Arguments replace what the URL says: ours are added to it, or left out."""
    results = DatabaseResults(url="postgresql://h/d?options=-csearch_path%3Dx&connect_timeout=30")
    arguments = results.connect_args()
    assert arguments["options"].startswith("-csearch_path=x -c statement_timeout=")
    assert "connect_timeout" not in arguments


def test_behind_pgbouncer_the_server_is_told_nothing() -> None:
    """It refuses startup options that it does not know."""
    results = DatabaseResults(url="postgresql://h/d", statement_timeout=None, lock_timeout=None)
    assert "options" not in results.connect_args()
    assert 10.0 == results.celery_settings()["result_backend_transport_options"]["operation_timeout"]


def test_pymysql_gets_the_bounds() -> None:
    """Of its own socket, so that they hold for a frozen server."""
    pymysql: Any = importlib.import_module("pymysql")  # it has no types
    arguments = DatabaseResults(
        url="mysql://h/d", statement_timeout=3, connect_timeout=2, lock_timeout=4
    ).connect_args()
    assert set() == set(arguments) - set(inspect.signature(pymysql.connect).parameters)
    assert (2, 3, 3) == tuple(arguments[name] for name in ("connect_timeout", "read_timeout", "write_timeout"))
    assert "SET SESSION innodb_lock_wait_timeout=4" == arguments["init_command"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pool_sise": 1}, "did you mean pool_size"),
        ({"pool_size": 0}, "pool_size"),
        ({"poll_min": 2, "poll_max": 1}, "poll_min is above"),
        ({"table_names": {"tasks": "x"}}, "table_names"),
        ({"expires": 0}, "expires"),
    ],
)
def test_wrong_fields_are_configuration_errors(fields: dict[str, Any], words: str) -> None:
    """They name the field, and never show the URL that stands beside it."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        DatabaseResults(**{"url": f"postgresql://u:{SECRET}@h/d", **fields})
    assert SECRET not in str(caught.value)


def test_under_celerys_defaults_only_what_was_written_is_set() -> None:
    """A bridge can join an existing fleet."""
    assert {"result_backend"} == set(DatabaseResults.from_url("sqlite:////a.db").minimal_celery_settings())
    settings = DatabaseResults(url="sqlite:////a.db", create_tables=False).minimal_celery_settings()
    assert settings["database_create_tables_at_setup"] is False
