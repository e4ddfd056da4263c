"""How long after a result is stored in a database does ``get()`` return? It asks: often at first, more rarely later.

::

    python bench/wake.py --csv bench/results/wake-0.1.0.csv

The row is committed by another thread, on a connection of its own, at a moment drawn by chance; counted is from the end
of its commit to the return of ``get()``.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from qbridge import Bridge, BridgeConfig
from qbridge.testing.servers import MariaDBServer, PostgreSQLServer, obtain

SERVERS: dict[str, Any] = {"sqlite": None, "postgresql": PostgreSQLServer, "mariadb": MariaDBServer}
WAITS = {"up to 2 s": (0.02, 2.0, 30), "10 to 12 s": (10.2, 12.0, 5)}
"""Seconds after which the result is stored, from and to, and how often."""


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty one."""
    if SERVERS[kind] is None:
        yield f"sqlite:///{folder / 'results.db'}"
    else:
        with obtain(SERVERS[kind]) as server, server.fresh() as url:
            yield url


def late(bridge: Bridge, after: float) -> float:
    """Milliseconds between the end of the commit and the return of ``get()``."""
    task_id = str(uuid4())
    stored: list[float] = []

    def store() -> None:
        bridge.celery.backend.store_result(task_id, 1, "SUCCESS")
        stored.append(time.monotonic())

    timer = threading.Timer(after, store)
    timer.start()
    bridge.result(task_id).get(timeout=30)
    returned = time.monotonic()
    timer.join()
    return 1000 * (returned - stored[0])


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows: list[list[str]] = [["database", "stored_after", "times", "min_ms", "median_ms", "max_ms"]]
    with tempfile.TemporaryDirectory() as name:
        for kind in SERVERS:
            with database(kind, Path(name)) as url:
                config: Any = {"broker": f"embedded://{name}/bridge.db", "results": url}
                with Bridge(BridgeConfig(**config)) as bridge:
                    bridge.celery.backend.store_result("warm", 1, "SUCCESS")
                    for wait, (begin, end, times) in WAITS.items():
                        found = [late(bridge, random.uniform(begin, end)) for _ in range(times)]
                        figures = (f"{each(found):.1f}" for each in (min, statistics.median, max))
                        rows.append([kind, wait, str(times), *figures])
                        print(*rows[-1], sep="\t", flush=True)
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
