"""The story that users tell: pages are crawled on Redis and threads, many of them twice; then all stands still.

Tasks fetch slow pages from a server in this process and write to PostgreSQL. Meanwhile the broker, which also keeps the
results, is restarted again and again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg

from qbridge.testing.servers import PostgreSQLServer, RedisServer
from qbridge.testing.waiting import wait_until

__all__ = ["Crawl", "crawl"]

#: Seconds after a restart of the broker within which the next task must begin.
STUCK = 20.0


class _Web(ThreadingHTTPServer):
    """A web server that counts."""

    asked = 0


class _Page(BaseHTTPRequestHandler):
    """A page that takes its time."""

    server: _Web

    def do_GET(self) -> None:
        self.server.asked += 1
        time.sleep(random.uniform(0.02, 0.3))
        body = self.path.encode() * 20
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class Crawl:
    """Pages to crawl, and what was written.

    Args:
        database: URL of a PostgreSQL database.
        web: the server of the pages.
        pages: how many there are.
    """

    def __init__(self, database: str, web: _Web, pages: int) -> None:
        self.database = database
        self._web = web
        self.urls = [f"http://127.0.0.1:{web.server_address[1]}/{number}" for number in range(pages)]
        self.sent = 0
        self._connection = psycopg.connect(database, autocommit=True)
        self._connection.execute("CREATE TABLE pages (url text PRIMARY KEY, size int, runs int DEFAULT 1)")

    def calls(self, copies: int) -> list[tuple[str, str]]:
        """The arguments of all tasks: each page so many times, in some order."""
        calls = [(url, self.database) for url in self.urls * copies]
        self.sent = len(calls)
        random.Random(17).shuffle(calls)
        return calls

    def written(self) -> tuple[int, int]:
        """How many pages were written, and how many runs wrote them."""
        row = self._connection.execute("SELECT count(*), coalesce(sum(runs), 0) FROM pages").fetchone()
        assert row is not None  # an aggregate has a row
        return int(row[0]), int(row[1])

    def restart_often(self, server: RedisServer, times: int) -> list[float]:
        """Restart the broker in the middle of the work, and wait after each time until another page was asked for.

        Args:
            server: the broker, with all tasks in its queue.
            times: how often.

        Returns:
            Seconds until the next task began, each time.
        """
        took = []
        step = self.sent // (times + 1)
        for number in range(1, times + 1):
            wait_until(lambda low=number * step: self.written()[1] >= low, STUCK * 3, what="the worker to work")
            server.restart()
            began, before = time.monotonic(), self._web.asked
            wait_until(lambda low=before: self._web.asked > low, STUCK, what="the worker to go on")
            took.append(time.monotonic() - began)
        return took

    def close(self) -> None:
        """Close the connection to the database."""
        self._connection.close()


@contextmanager
def crawl(postgresql: PostgreSQLServer, pages: int) -> Iterator[Crawl]:
    """A web server with so many slow pages, and an empty table for them."""
    web = _Web(("127.0.0.1", 0), _Page)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        with postgresql.fresh() as database:
            story = Crawl(database.replace("+psycopg", ""), web, pages)
            try:
                yield story
            finally:
                story.close()
    finally:
        web.shutdown()
        web.server_close()
        thread.join(5)
