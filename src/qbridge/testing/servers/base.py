"""What can every test server do, private or given by URL?"""

from __future__ import annotations

import atexit
import os
import pwd
import signal
import subprocess
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from qbridge.testing.servers.absence import ServerFailed, cannot_run
from qbridge.testing.servers.process import ChildProcess, private_folder, remove_folder

__all__ = ["Server"]

_open_servers: weakref.WeakSet[Server] = weakref.WeakSet()


class Server(ABC):
    """A server for tests: private by default, or one that runs elsewhere (``at``).

    A private server is a child process on free loopback ports with its data in a temporary folder. ``start`` chooses
    the ports once; ``stop``, ``kill`` and ``restart`` keep ports and data, ``close`` (or leaving the ``with`` block)
    removes everything.
    """

    name: ClassVar[str]
    """What it is called in messages and by the command line: ``"redis"``."""
    environment_variable: ClassVar[str]
    """A URL in this variable takes the place of the private server."""
    start_timeout: ClassVar[float] = 60.0
    stop_timeout: ClassVar[float] = 30.0
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self._given_url: str | None = None
        self._folder: Path | None = None
        self._process: ChildProcess | None = None
        self._owner = os.getpid()

    @classmethod
    def at(cls, url: str) -> Self:
        """The server that runs at ``url``: the tests use it and cannot stop, kill or freeze it."""
        server = cls()
        server._given_url = url
        return server

    @classmethod
    def from_environment(cls) -> Self:
        """The server named by ``environment_variable``, else a private one."""
        url = os.environ.get(cls.environment_variable)
        return cls.at(url) if url else cls()

    # What the kinds of servers say of themselves.

    @property
    @abstractmethod
    def _private_url(self) -> str:
        """URL of the private server."""

    @abstractmethod
    def _choose_ports(self) -> None:
        """Choose free ports; called again if another process was faster to take them."""

    @abstractmethod
    def _prepare(self, folder: Path) -> None:
        """Write configuration and data into the new folder."""

    @abstractmethod
    def _command(self, folder: Path) -> list[str]:
        """Program and arguments that run the server in the foreground."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """It answers now; bounded, and False for a server that is still starting."""

    @abstractmethod
    def fresh(self) -> AbstractContextManager[str]:
        """A place of one's own on this server, as a URL; cleared away at the end of the ``with`` block.

        It is a vhost on RabbitMQ, a database number on Redis, a database on PostgreSQL and MariaDB.
        """

    def _user(self) -> str | None:
        """Whom the server must run as; None: who runs the tests."""
        return None

    def _environment(self, folder: Path) -> Mapping[str, str]:
        """Variables that the server needs beside ``PATH`` and ``LANG``."""
        return {"HOME": str(folder)}

    def _folder_parent(self) -> Path | None:
        """Where the temporary folder is made; None: the system's temporary folder."""
        return None

    # What users do.

    @property
    def private(self) -> bool:
        """It is a child of this test run, so it may be stopped, killed and frozen."""
        return self._given_url is None

    @property
    def url(self) -> str:
        """URL with user and password, in the form that qbridge takes."""
        return self._private_url if self._given_url is None else self._given_url

    @property
    def folder(self) -> Path:
        """The private server's folder."""
        self._must_be_private("shown the folder of")
        if self._folder is None:
            raise ServerFailed(f"the private {self.name} server was not started yet")
        return self._folder

    @property
    def log(self) -> Path:
        """The file that the private server's output goes to."""
        return self.folder / "server.log"

    @property
    def pid(self) -> int:
        """Process id of the private server."""
        return self._running("shown the pid of").pid

    @property
    def running(self) -> bool:
        """The private server's process is alive (frozen counts); True for a server that runs elsewhere."""
        return not self.private or (self._process is not None and self._process.exit_code() is None)

    def start(self) -> Self:
        """Start the server and return once it answers; a running one is left alone.

        Raises:
            ServerFailed: if it ends, or does not answer within ``start_timeout``; shows its log.
        """
        if self.running:
            if not self.private and not self._is_ready():
                raise ServerFailed(
                    f"the {self.name} server given by {self.environment_variable} does not answer; "
                    "start it, or unset the variable to use a private server"
                )
            return self
        if self._folder is not None:
            self._launch(self._folder)
            return self
        self._folder = private_folder(self.name, user=self._user(), inside=self._folder_parent())
        _open_servers.add(self)
        self._choose_ports()
        self._prepare(self._folder)
        try:
            self._launch(self._folder)
        except ServerFailed as failure:
            if "in use" not in str(failure).lower() and "eaddrinuse" not in str(failure).lower():
                raise
            # Another process was faster to take one of the free ports.
            remove_folder(self._folder)
            self._folder = None
            return self.start()
        return self

    def _launch(self, folder: Path) -> None:
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "TMPDIR": str(folder),
            **self._environment(folder),
        }
        self._process = ChildProcess(
            self._command(folder), log=self.log, env=environment, cwd=folder, user=self._user()
        )
        deadline = time.monotonic() + self.start_timeout
        while not self._is_ready():
            code = self._process.exit_code()
            if code is not None:
                raise ServerFailed(
                    f"the private {self.name} server ended with code {code} while starting; its output:\n"
                    + self._process.tail()
                )
            if time.monotonic() > deadline:
                output = self._process.tail()
                self._process.kill()
                raise ServerFailed(
                    f"the private {self.name} server did not answer within {self.start_timeout:g} s; its output:\n"
                    + output
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server in order and wait until it is gone; ports and data are kept for the next ``start``."""
        self._must_be_private("stop")
        if self._process is not None:
            self._process.end(self.stop_signal, self.stop_timeout)
            self._process = None

    def kill(self) -> None:
        """SIGKILL the server with all its processes and wait until it is gone; ports and data are kept."""
        self._running("kill").kill()
        self._process = None

    def restart(self) -> Self:
        """Stop and start, on the same ports and data."""
        self.stop()
        return self.start()

    def freeze(self) -> None:
        """SIGSTOP: the server keeps its connections, takes new ones (the kernel does), and answers nothing."""
        self._running("freeze").freeze()

    def thaw(self) -> None:
        """Let a frozen server run on; nothing happens to one that is not frozen."""
        self._must_be_private("thaw")
        if self._process is not None and self._process.frozen:
            self._process.thaw()

    def heal(self) -> Self:
        """Make it run and answer again, whatever a test did to it: thaw, start, wait until it answers."""
        if self.private:
            self.thaw()
        self.start()
        deadline = time.monotonic() + self.start_timeout
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise ServerFailed(f"the {self.name} server does not answer {self.start_timeout:g} s after its thaw")
            time.sleep(0.05)
        return self

    def close(self) -> None:
        """End the private server and remove its folder; a server that runs elsewhere is left alone."""
        if not self.private or self._owner != os.getpid():
            return
        if self._process is not None:
            # Its data are thrown away with it: no need to wait until it has put them in order.
            self._process.kill()
            self._process = None
        self._closing()
        if self._folder is not None:
            remove_folder(self._folder)
            self._folder = None

    def _closing(self) -> None:  # noqa: B027 - most servers have nothing beside them
        """End what runs beside the server; called after it has ended."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "elsewhere" if not self.private else "running" if self.running else "not running"
        return f"<{type(self).__name__} {where}>"

    def _must_be_private(self, act: str) -> None:
        if not self.private:
            cannot_run(
                f"cannot {act} the {self.name} server: it is not private but given by {self.environment_variable}; "
                "unset the variable to let the test kit start a private one"
            )

    def _running(self, act: str) -> ChildProcess:
        self._must_be_private(act)
        if self._process is None:
            raise ServerFailed(f"the private {self.name} server is not running")
        return self._process


def fresh_name(prefix: str = "qbridge") -> str:
    """A name that nobody used before: lower-case letters, digits and underscores."""
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


def run_once(command: list[str], what: str, *, env: Mapping[str, str] | None = None, user: str | None = None) -> str:
    """Run a program to its end and return its output.

    Raises:
        ServerFailed: if it fails, or takes over two minutes; shows its output.
    """
    entry = None if user is None else pwd.getpwnam(user)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
            env=None if env is None else dict(env),
            user=None if entry is None else entry.pw_uid,
            group=None if entry is None else entry.pw_gid,
            extra_groups=None if entry is None else os.getgrouplist(entry.pw_name, entry.pw_gid),
            cwd="/",
        )
    except subprocess.TimeoutExpired as error:
        raise ServerFailed(f"{what} took over two minutes: {command[0]}") from error
    if done.returncode != 0:
        raise ServerFailed(f"{what} failed with code {done.returncode}; its output:\n{done.stdout[-4000:]}")
    return done.stdout


@atexit.register
def _close_all() -> None:
    for server in list(_open_servers):
        with suppress(Exception):  # the guardian clears up what could not be closed here
            server.close()
