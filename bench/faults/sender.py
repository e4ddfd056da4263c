"""Is the process that sends still at it? One that does not end in time is killed, and that is said."""

from __future__ import annotations

import time

from qbridge.testing.servers.process import ChildProcess

__all__ = ["Sender"]


class Sender:
    """The process, and until when it may go on.

    Args:
        process: that sends.
        name: of the cell, for what is said.
        patience: seconds for it; ``give`` changes that.
    """

    def __init__(self, process: ChildProcess, name: str, patience: float) -> None:
        self._process = process
        self._name = name
        self._began = time.monotonic()
        self._until = self._began + patience
        self.killed: bool = False
        """Whether it was killed because it did not end."""

    def give(self, until: float) -> None:
        """Let it go on until a moment.

        Args:
            until: monotonic seconds.
        """
        self._until = until

    @property
    def sends(self) -> bool:
        """Whether it goes on; whoever asks when its time is over has it killed."""
        if self._process.exit_code() is not None:
            return False
        if time.monotonic() < self._until:
            return True
        self.killed = True
        self.kill()
        seconds = time.monotonic() - self._began
        print(f"{self._name}: the sender did not end within {seconds:.0f} s and was killed; see submitted", flush=True)
        return False

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def demand_success(self) -> None:
        """Raise what it said, if it has failed by itself."""
        if not self.killed and self._process.exit_code() not in (0, None):
            raise RuntimeError(f"the sender of {self._name} failed:\n{self._process.tail()}")
