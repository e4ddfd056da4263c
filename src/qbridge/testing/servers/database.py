"""How are a private PostgreSQL and a private MariaDB run?"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from qbridge.testing.servers.base import Server, fresh_name, run_once
from qbridge.testing.servers.install import program
from qbridge.testing.servers.process import free_ports
from qbridge.testing.servers.tls import ThrowawayCA

__all__ = ["DatabaseServer", "MariaDBServer", "PostgreSQLServer"]

_PASSWORD = "qbridge"  # noqa: S105 - of a private server on the loopback that lives as long as the test


class DatabaseServer(Server):
    """What PostgreSQL and MariaDB share: databases made and dropped through SQLAlchemy."""

    def __init__(self) -> None:
        super().__init__()
        self.port: int = 0

    def _choose_ports(self) -> None:
        (self.port,) = free_ports(1)

    def execute(self, *statements: str) -> None:
        """Run SQL statements on ``url``'s database, each committed by itself."""
        from sqlalchemy import create_engine, text  # only tests that use a database pay for it
        from sqlalchemy.pool import NullPool

        engine = create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def database_url(self, name: str) -> str:
        """URL of another database on this server."""
        from sqlalchemy import make_url

        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def create_database(self, name: str) -> str:
        """Create an empty database.

        Returns:
            Its URL.
        """
        self.execute(f"CREATE DATABASE {name}")
        return self.database_url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE {name}")

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """A database that nobody used before, dropped afterwards.

        Yields:
            Its URL.
        """
        name = fresh_name()
        url = self.create_database(name)
        yield url
        if self.running:
            self.drop_database(name)


class PostgreSQLServer(DatabaseServer):
    """A PostgreSQL server; user and password are ``qbridge``. Commits survive ``kill``.

    Args:
        tls: offer TLS, with a certificate of a throwaway CA (``.ca.certificate``); the client decides (``sslmode``).
    """

    name: ClassVar[str] = "postgresql"
    environment_variable: ClassVar[str] = "QBRIDGE_TEST_POSTGRESQL_URL"
    # "Fast shutdown": clients are disconnected instead of waited for.
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__()
        self.ca: ThrowawayCA | None = None
        self._tls = tls

    def issue(self, ca: ThrowawayCA, *, host: str | None = None, expired: bool = False) -> tuple[Path, Path]:
        """Make a certificate, and a key that PostgreSQL reads: it refuses one that others can read."""
        certificate, key = ca.issue("server", host=host, expired=expired)
        key.chmod(0o600)
        if (user := self._user()) is not None:
            shutil.chown(key, user)
        return certificate, key

    @property
    def _private_url(self) -> str:
        return f"postgresql+psycopg://qbridge:{_PASSWORD}@127.0.0.1:{self.port}/postgres"

    def _user(self) -> str | None:
        # PostgreSQL refuses to run as root; its packages bring a user of its own.
        if os.geteuid() != 0:
            return None
        known = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in known else "nobody"

    def _prepare(self, folder: Path) -> None:
        password = folder / "password"
        password.write_text(_PASSWORD)
        password.chmod(0o644)
        user = self._user()
        run_once(
            [_postgresql_program("initdb"), "--pgdata", str(folder / "data"), "--username", "qbridge",
             "--auth", "scram-sha-256", "--pwfile", str(password), "--encoding", "UTF8", "--locale", "C", "--no-sync"],
            "initdb",
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(folder)},
            user=user,
        )  # fmt: skip
        if self._tls:
            self.ca = ThrowawayCA(folder / "tls")
            self.issue(self.ca)

    def _command(self, folder: Path) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            # A crash of the machine loses the test anyhow; a crash of the process alone loses nothing by these.
            "fsync": "off",
            "full_page_writes": "off",
        }
        if self._tls:
            tls = folder / "tls"
            settings |= {"ssl": "on", "ssl_cert_file": str(tls / "server.pem"), "ssl_key_file": str(tls / "server.key")}
        command = [_postgresql_program("postgres"), "-D", str(folder / "data")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _is_ready(self) -> bool:
        # A start-up packet by hand: "R" asks for the password (ready), "E" says that it is still starting.
        if not self.private:
            return _connects(self)
        body = b"\x00\x03\x00\x00user\x00qbridge\x00database\x00postgres\x00\x00"
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2) as connection:
                connection.sendall((len(body) + 4).to_bytes(4, "big") + body)
                return connection.recv(1) == b"R"
        except OSError:
            return False

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


class MariaDBServer(DatabaseServer):
    """A MariaDB server; user, password and database are ``qbridge``. Commits survive ``kill``."""

    name: ClassVar[str] = "mariadb"
    environment_variable: ClassVar[str] = "QBRIDGE_TEST_MARIADB_URL"

    @property
    def _private_url(self) -> str:
        return f"mysql+pymysql://qbridge:{_PASSWORD}@127.0.0.1:{self.port}/qbridge"

    def _user(self) -> str | None:
        # It runs as root only when told to; its packages bring a user of its own.
        known = {entry.pw_name for entry in pwd.getpwall()}
        return "mysql" if os.geteuid() == 0 and "mysql" in known else None

    def _run_as(self) -> list[str]:
        return ["--user=root"] if os.geteuid() == 0 and self._user() is None else []

    def _prepare(self, folder: Path) -> None:
        run_once(
            [program("mariadb-install-db"), "--no-defaults", f"--datadir={folder / 'data'}", "--skip-test-db",
             "--auth-root-authentication-method=normal", *self._run_as()],
            "mariadb-install-db",
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)},
            user=self._user(),
        )  # fmt: skip
        (folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS qbridge CHARACTER SET utf8mb4;\n"
            f"CREATE USER IF NOT EXISTS 'qbridge'@'%' IDENTIFIED BY '{_PASSWORD}';\n"
            "GRANT ALL PRIVILEGES ON *.* TO 'qbridge'@'%' WITH GRANT OPTION;\n"
        )
        (folder / "init.sql").chmod(0o644)

    def _environment(self, folder: Path) -> Mapping[str, str]:
        return {"HOME": str(folder)}

    def _command(self, folder: Path) -> list[str]:
        return [
            program("mariadbd", "/usr/sbin"),
            "--no-defaults",
            f"--datadir={folder / 'data'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            f"--socket={folder / 'mariadb.sock'}",
            f"--pid-file={folder / 'mariadb.pid'}",
            f"--init-file={folder / 'init.sql'}",
            f"--tmpdir={folder}",
            # Commits reach the operating system, not the disk: enough to survive the death of the process.
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-buffer-pool-size=64M",
            "--performance-schema=OFF",
            *self._run_as(),
        ]

    def _is_ready(self) -> bool:
        if not self.private:
            return _connects(self)
        # The greeting of protocol 10 comes once the init file was run.
        try:
            with socket.create_connection(("127.0.0.1", self.port), 2) as connection:
                return connection.recv(5)[4:] == b"\x0a"
        except OSError:
            return False


def _connects(server: DatabaseServer) -> bool:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        server.execute("SELECT 1")
    except SQLAlchemyError:
        return False
    return True


def _postgresql_program(name: str) -> str:
    # Debian keeps a folder per version and puts none of them on the path.
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: int(folder.parent.name.split(".")[0]),
        reverse=True,
    )
    return program(name, *map(str, folders))
