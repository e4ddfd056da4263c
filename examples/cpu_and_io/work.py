"""Tasks for two pools."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass

from qbridge import Bridge

bridge = Bridge()
app = bridge.celery


@dataclass
class Where:
    """Where a task ran."""

    process: int
    thread: str
    value: str


@bridge.task(queue="cpu", time_limit=60)
def digest(text: str, rounds: int = 20_000) -> Where:
    """Keep a core busy: a process pool uses them all, and can enforce the time limit."""
    value = hashlib.pbkdf2_hmac("sha256", text.encode(), b"salt", rounds).hex()
    return Where(os.getpid(), threading.current_thread().name, value)


@bridge.task(queue="io")
def fetch(url: str, seconds: float = 0.2) -> Where:
    """Wait for something far away: threads wait cheaply."""
    time.sleep(seconds)
    return Where(os.getpid(), threading.current_thread().name, url)
