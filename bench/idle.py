"""What does a worker cost that has nothing to do? Commands per second on Redis, and processor time; plain beside ours.

::

    python bench/idle.py --csv bench/results/idle-0.1.0.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RedisServer, obtain
from qbridge.testing.waiting import wait_until

PLAIN = "from celery import Celery\napp = Celery('idle', broker={url!r})\n"


def ticks(pid: int) -> float:
    """Processor time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, fields)) / os.sysconf("SC_CLK_TCK")


def watch(server: RedisServer, pid: int, seconds: float) -> tuple[float, float]:
    """Commands per second, and percent of a processor."""
    with server.client() as client:
        commands, worked, began = _commands(client), ticks(pid), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        return (_commands(client) - commands - 1) / took, 100 * (ticks(pid) - worked) / took


def _commands(client: object) -> int:
    return int(client.info("stats")["total_commands_processed"])  # type: ignore[attr-defined]  # redis-py's


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows = [["worker", "commands_per_s", "cpu_percent"]]
    with obtain(RedisServer) as server, tempfile.TemporaryDirectory() as folder, server.fresh() as url:
        contract = Contract(url, f"sqlite:///{folder}/results.db", Path(folder))
        with contract.worker_of("fragile", pool="solo") as worker:
            time.sleep(3)
            rows.append(["qbridge", *(f"{value:.1f}" for value in watch(server, worker.pid, given.seconds))])
        contract.close()
        (Path(folder) / "idle_app.py").write_text(PLAIN.format(url=url))
        for name, words in (("plain", []), ("plain, without gossip", ["--without-gossip", "--without-mingle"])):
            output = Path(folder) / f"{len(rows)}.log"
            with output.open("w") as log:
                plain = subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "idle_app", "worker", "-l", "INFO", "-P", "solo", *words],
                    cwd=folder, stdout=log, stderr=log,
                )  # fmt: skip
                try:
                    wait_until(lambda output=output: " ready." in output.read_text(), 60, what="the worker")
                    time.sleep(3)
                    rows.append([name, *(f"{value:.1f}" for value in watch(server, plain.pid, given.seconds))])
                finally:
                    plain.kill()
                    plain.wait()
    for row in rows[1:]:
        print(f"{row[0]}: {row[1]} commands/s, {row[2]} % of a processor")
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
