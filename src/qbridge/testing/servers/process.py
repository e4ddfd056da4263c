"""How is one child process started, frozen and ended, so that nothing is ever left behind?"""

from __future__ import annotations

import atexit
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from qbridge.testing.servers import guardian

__all__ = ["ChildProcess", "free_ports", "private_folder", "remove_folder"]

#: Below the range that Linux and macOS give to outgoing connections, so that a client does not take the port of a
#: server that is being restarted.
_PORTS = range(15000, 32000)

_STOPS = 5.0  # seconds that a SIGSTOP may take to reach every thread


def free_ports(count: int) -> list[int]:
    """Ports on the loopback that nobody listens on now, all different.

    Args:
        count: how many.
    """
    chooser = random.SystemRandom()
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = chooser.choice(_PORTS)
            candidate = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            with suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


class _Guardian:
    """The clearing-up process of this test run; started when the first server is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def tell(self, order: str, subject: object) -> None:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                # -I -S: it must not depend on what the test run has on its path. A session of its own, so that what
                # kills the test run's process group does not reach it.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._owner = os.getpid()
                atexit.register(self._end, os.getpid())
            stdin = self._process.stdin
            assert stdin is not None  # Popen was given PIPE
            with suppress(BrokenPipeError):
                stdin.write(f"{order} {subject}\n".encode())
                stdin.flush()

    def _end(self, owner: int) -> None:
        """Close the pipe, so that the guardian clears up what is left and ends."""
        if os.getpid() == owner and self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)


_guardian = _Guardian()


def private_folder(name: str, *, user: str | None = None, inside: Path | None = None) -> Path:
    """Make a temporary folder that is removed when the test run ends, however it ends.

    Args:
        name: part of the folder's name.
        user: who shall own it; None: who runs the tests.
        inside: the folder to make it in; None: the system's temporary folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"qbridge-{name}-", dir=inside))
    _guardian.tell("folder", folder)
    if user is not None:
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder that ``private_folder`` made."""
    shutil.rmtree(folder, ignore_errors=True)
    _guardian.tell("forget-folder", folder)


def _has_stopped(pid: int) -> bool:
    """Whether every thread of a process stands still, or is gone; True where the system does not tell."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError, IndexError):  # gone meanwhile
            if thread.read_text().rsplit(")", 1)[1].split()[0] not in "TtZX":
                return False
    return True


class ChildProcess:
    """One running process with its output in a file, known to the guardian.

    Args:
        command: program and arguments.
        log: file that its output is appended to.
        env: its whole environment.
        cwd: its working directory.
        user: whom it runs as; only root can name another.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path, user: str | None = None
    ) -> None:
        self.log = log
        self._frozen = False
        with log.open("ab") as output:
            self._process = self._start(command, output, env, cwd, user)
        _guardian.tell("watch", self._process.pid)

    @staticmethod
    def _start(
        command: Sequence[str], output: IO[bytes], env: Mapping[str, str], cwd: Path, user: str | None
    ) -> subprocess.Popen[bytes]:
        entry = None if user is None else pwd.getpwnam(user)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            # Ctrl-C in the terminal goes to the test run, which then ends its servers in order.
            start_new_session=True,
            user=None if entry is None else entry.pw_uid,
            group=None if entry is None else entry.pw_gid,
            extra_groups=None if entry is None else os.getgrouplist(entry.pw_name, entry.pw_gid),
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def frozen(self) -> bool:
        """It was frozen, and not thawed since."""
        return self._frozen

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def freeze(self) -> None:
        """SIGSTOP to it and all its descendants: connections stay open and nobody answers."""
        guardian.signal_tree(self.pid, signal.SIGSTOP)
        self._frozen = True
        # the threads of a process stop one after the other, and one that has not may still answer
        end = time.monotonic() + _STOPS
        while not all(map(_has_stopped, guardian.tree(self.pid))) and time.monotonic() < end:
            time.sleep(0.002)

    def thaw(self) -> None:
        """SIGCONT to it and all its descendants."""
        guardian.signal_tree(self.pid, signal.SIGCONT)
        self._frozen = False

    def kill(self) -> None:
        """SIGKILL to it and all its descendants, and wait until it is gone."""
        if self._process.poll() is None:
            guardian.signal_tree(self.pid, signal.SIGKILL)
        self._gone(10)

    def end(self, number: signal.Signals, timeout: float) -> None:
        """Ask it to end by a signal, kill it if it does not, and wait until it is gone.

        Args:
            number: what its makers understand as "end now, in order".
            timeout: seconds until it is killed.
        """
        if self._process.poll() is None:
            if self._frozen:
                self.thaw()
            # Only the process itself: it ends its children in the order that it needs.
            self._process.send_signal(number)
            try:
                self._gone(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        else:
            self._gone(0)

    def _gone(self, timeout: float) -> None:
        self._process.wait(timeout)
        _guardian.tell("forget", self.pid)

    def tail(self, lines: int = 40) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
