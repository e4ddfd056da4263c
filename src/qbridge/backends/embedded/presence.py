"""Who is alive, as the kernel knows it, and how is a waiting consumer woken?

Every transport that consumes is a *party*, with two files in the folder ``<file>-parties`` beside the database:

- ``ID.lock``: a POSIX record lock, held from before the party is written into the database until it leaves. The kernel
  drops it at the moment the process dies, and only then (not while it is stopped), and forked children never hold it.
  Whoever can take the lock has proof that the party is dead. No pid is ever guessed about.
- ``ID.wake``: a named pipe. Who commits a message writes one byte into the pipe of each party that consumes its queue:
  an idle consumer sleeps in ``poll`` and uses no CPU. (A pipe: the path of a unix socket must be under 108 bytes.)

POSIX locks have one trap: a process that opens and closes the same file *again* drops its own lock. So a process never
probes its own parties: ``_own`` knows them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qbridge.backends.embedded.errors import FileUnavailable
from qbridge.backends.forking import begin_anew_after_fork

__all__ = ["Presence", "dead", "folder_of", "is_party", "remove_litter", "wake"]

_LITTER_AGE = 60.0  # seconds: a party writes its row within milliseconds of making its files

_MESSAGE = b"m"  # a sender has committed something
_TURN = b"t"  # the party itself wants another turn of its event loop

_ID = re.compile(r"[0-9]{1,20}-[0-9a-f]{16}")
"""What ``Presence`` makes; ids become names of files, so no other is ever used as one."""

_own: set[str] = set()


def folder_of(path: Path) -> Path:
    """The folder of the parties' files, for the broker's file at ``path``."""
    return path.with_name(path.name + "-parties")


def is_party(name: Any) -> bool:
    """Return whether a name from the database is one that a party gives itself."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None


class Presence:
    """This process's proof of life for one party, and the party's alarm clock.

    Raises:
        FileUnavailable: if the files cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._pid = os.getpid()
        self.id: str = f"{self._pid}-{uuid.uuid4().hex[:16]}"
        self._files = [folder / f"{self.id}.lock", folder / f"{self.id}.wake"]
        self._descriptors: list[int] = []
        begin_anew_after_fork(self)
        lock, pipe = self._files
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._descriptors.append(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            fcntl.lockf(self._descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            _own.add(self.id)
            os.mkfifo(pipe, 0o666)
            self._descriptors.append(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            # Our own writing end keeps the pipe from reporting a hang-up when the last sender has closed his.
            self._descriptors.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise FileUnavailable(f"The embedded broker cannot register a consumer in {folder}: {error}") from error

    def fileno(self) -> int:
        """The descriptor that becomes readable when the party is woken: for event loops."""
        return self._descriptors[1]

    def poke(self) -> None:
        """Wake this party, from any thread."""
        with contextlib.suppress(BlockingIOError, IndexError):  # the pipe is full: it is awake; closed: it is gone
            os.write(self._descriptors[2], _TURN)

    def settle(self) -> bool:
        """Forget the wake-ups so far, before looking at the queues; True if one of them came from a sender."""
        woken = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fileno(), 4096):
                woken = woken or _MESSAGE in data
        return woken

    def wait(self, seconds: float) -> None:
        """Sleep until woken, at most ``seconds``."""
        poller = select.poll()  # looked up now: gevent puts its own in place
        poller.register(self.fileno(), select.POLLIN)
        poller.poll(max(0.0, seconds) * 1000)

    def close(self) -> None:
        """End the proof of life; from now on the party is dead to everybody. In a forked child: nothing of it."""
        if os.getpid() != self._pid:
            self.abandon()
            return
        for file in self._files:
            with contextlib.suppress(OSError):
                file.unlink()
        self.abandon()
        _own.discard(self.id)

    def after_fork(self) -> None:
        """In a forked child the party is another process's: the child may probe it, and never speaks for it."""
        _own.discard(self.id)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the descriptors, and with them of the lock, but leave the files."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


@contextlib.contextmanager
def dead(folder: Path, party: str) -> Iterator[bool]:
    """Is ``party`` dead? Inside the context the proof holds: nobody else can act on it. Its files go afterwards."""
    if party in _own:
        yield False
        return
    if not is_party(party):
        yield True  # nobody is called that
        return
    lock = folder / f"{party}.lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # deleted by hand, or by one who found it dead a moment ago
        return
    except OSError:
        yield False  # not ours to judge
        return
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        for file in (lock.with_suffix(".wake"), lock):
            with contextlib.suppress(OSError):
                file.unlink()
    finally:
        os.close(descriptor)


def wake(folder: Path, parties: Iterable[str]) -> None:
    """Wake ``parties``; those that died are no matter."""
    for party in filter(is_party, parties):
        try:
            descriptor = os.open(folder / f"{party}.wake", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.write(descriptor, _MESSAGE)
        except OSError:
            pass  # the pipe is full, so it is awake; or it died a moment ago
        finally:
            os.close(descriptor)


def remove_litter(folder: Path, known: set[str]) -> None:
    """Remove the files of parties that died before they were written into the database."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            party, old = file.stem, time.time() - file.stat().st_mtime > _LITTER_AGE
            if old and is_party(party) and party not in known:
                with dead(folder, party) as is_dead:
                    if is_dead:
                        file.unlink(missing_ok=True)
