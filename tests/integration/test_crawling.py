"""Does a worker with threads go on after each restart of Redis, and is every page written in the end?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.integration.crawling import crawl

from qbridge import Bridge, BridgeConfig
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.servers import PostgreSQLServer, RedisServer
from qbridge.testing.waiting import wait_until

PAGES, COPIES, RESTARTS = 50, 4, 3
#: A queue that survives an orderly restart is enough here.
SLOW_DISK = {"appendfsync": "everysec"}


def test_restarts_of_redis_stop_no_crawl(qbridge_postgresql: PostgreSQLServer, tmp_path: Path) -> None:
    """Nothing stays PENDING: every page is written, every task has its result, and no claim is left."""
    with RedisServer(appendonly=True, settings=SLOW_DISK) as redis, crawl(qbridge_postgresql, PAGES) as story:
        urls = {"QBRIDGE_BROKER": f"{redis.url}", "QBRIDGE_RESULTS": f"{redis.url}", "QBRIDGE_BROKER__LEASE": "5"}
        environment = {**os.environ, **urls, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-m", "qbridge", "worker", "-A", "crawl_app:bridge", "--pool", "thread"]
        with Bridge(BridgeConfig(broker=redis.url, results=redis.url)) as bridge:
            sent = [bridge.send("crawl.page", call) for call in story.calls(COPIES)]
            worker = WorkerProcess([*command, "--concurrency", "6"], environment, tmp_path)
            try:
                _ = worker.name
                story.restart_often(redis, RESTARTS)
                wait_until(lambda: all(result.ready() for result in sent), 60, what="every result", interval=0.2)
                assert [] == [(result.state, result.result) for result in sent if not result.successful()]
                with redis.client() as client:
                    wait_until(lambda: not client.hlen("unacked"), 10, what="the last acknowledgement")
                    assert client.llen("default") == 0
            finally:
                worker.kill()
        written, runs = story.written()
        assert written == PAGES
        assert runs >= PAGES * COPIES
