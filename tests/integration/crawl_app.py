"""What the workers of the crawling story run: fetch a page, write it to PostgreSQL, and say so as a result."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import psycopg
from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contracts.kit import READY

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def say_ready(sender: object = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(getattr(sender, "hostname", "worker")))


@bridge.task(name="crawl.page")
def page(url: str, database: str) -> int:
    """Fetch one page and keep its size; a second run of it counts itself."""
    with urllib.request.urlopen(url, timeout=30) as response:
        size = len(response.read())
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO pages (url, size) VALUES (%s, %s) ON CONFLICT (url) DO UPDATE SET runs = pages.runs + 1",
            (url, size),
        )
    return size
