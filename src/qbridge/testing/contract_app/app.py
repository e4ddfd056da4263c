"""What a worker process of the contracts loads: a bridge configured by its environment, with every task.

``qbridge worker -A qbridge.testing.contract_app.app:bridge``, or
``celery -A qbridge.testing.contract_app.app:app worker``.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contract_app import READY
from qbridge.testing.contract_app.tasks import declare

__all__ = ["app", "bridge", "tasks"]

bridge: Bridge = Bridge()
tasks: SimpleNamespace = declare(bridge)
app: Celery = bridge.celery


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def _say_ready(sender: Any = None, **_: Any) -> None:
    if path := os.environ.get(READY):
        Path(path).write_text(str(sender.hostname))
