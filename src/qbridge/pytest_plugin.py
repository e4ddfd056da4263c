"""The pytest plugin of qbridge: which servers does a test get, and which broker × result pairs does it run on?

Every user of qbridge who runs pytest loads this module through its entry point. So it imports nothing but pytest at
the top, has no autouse fixture, and starts a server only when a test asks for it.

Fixtures: ``qbridge_rabbitmq``, ``qbridge_redis``, ``qbridge_postgresql``, ``qbridge_mariadb`` are servers (see
``qbridge.testing.servers``) that live as long as the test run. ``broker_url`` and ``results_url`` are fresh places on
them, one per module and pair: a test that asks for both runs once on every pair of ``PAIRS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from qbridge.testing.servers import MariaDBServer, PostgreSQLServer, RabbitMQServer, RedisServer, Server

    ServerT = TypeVar("ServerT", bound=Server)

BROKERS = ("rabbitmq", "redis", "embedded")
RESULTS = ("rpc", "redis", "postgresql", "sqlite", "mariadb")
#: The matrix: every broker with every result backend, and MariaDB once (it differs from PostgreSQL by its driver only).
PAIRS = tuple(
    (broker, results) for broker in BROKERS for results in RESULTS if results != "mariadb" or broker == "rabbitmq"
)

_PROPERTY = "qbridge_pair"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose a part of the matrix."""
    group = parser.getgroup("qbridge", "qbridge: which brokers and result backends")
    group.addoption(
        "--qbridge-broker", choices=BROKERS, default=None, help="run tests of this broker only (default: of all)"
    )
    group.addoption(
        "--qbridge-results", choices=RESULTS, default=None, help="run tests of these results only (default: of all)"
    )


# Servers.


@contextmanager
def _server(kind: type[ServerT]) -> Iterator[ServerT]:
    from qbridge.testing.servers import ServerMissing, cannot_run, obtain

    try:
        server = obtain(kind)
    except ServerMissing as error:
        cannot_run(str(error))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def qbridge_rabbitmq() -> Iterator[RabbitMQServer]:
    """A RabbitMQ server, started when the first test asks for it."""
    from qbridge.testing.servers import RabbitMQServer

    with _server(RabbitMQServer) as server:
        yield server


@pytest.fixture(scope="session")
def qbridge_redis() -> Iterator[RedisServer]:
    """A Redis server, started when the first test asks for it."""
    from qbridge.testing.servers import RedisServer

    with _server(RedisServer) as server:
        yield server


@pytest.fixture(scope="session")
def qbridge_postgresql() -> Iterator[PostgreSQLServer]:
    """A PostgreSQL server, started when the first test asks for it."""
    from qbridge.testing.servers import PostgreSQLServer

    with _server(PostgreSQLServer) as server:
        yield server


@pytest.fixture(scope="session")
def qbridge_mariadb() -> Iterator[MariaDBServer]:
    """A MariaDB server, started when the first test asks for it."""
    from qbridge.testing.servers import MariaDBServer

    with _server(MariaDBServer) as server:
        yield server


# Pairs.


@pytest.fixture(scope="module", params=BROKERS)
def qbridge_broker(request: pytest.FixtureRequest) -> str:
    """Name of the broker that this test runs on: one of ``BROKERS``."""
    return str(request.param)


@pytest.fixture(scope="module", params=RESULTS)
def qbridge_results(request: pytest.FixtureRequest) -> str:
    """Name of the result backend that this test runs on: one of ``RESULTS``."""
    return str(request.param)


def _depend_on(other: str, request: pytest.FixtureRequest) -> None:
    """Make a new place when the other half of the pair changes too, if the test has one: no pair sees another's."""
    if other in request.fixturenames:
        request.getfixturevalue(other)


@pytest.fixture(scope="module")
def broker_url(
    qbridge_broker: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of an empty broker that only this module and pair uses: a vhost, a Redis database, a new file."""
    _depend_on("qbridge_results", request)
    if qbridge_broker == "embedded":
        yield f"embedded://{tmp_path_factory.mktemp('broker') / 'bridge.db'}"
        return
    server: Server = request.getfixturevalue(f"qbridge_{qbridge_broker}")
    with server.heal().fresh() as url:
        yield url


@pytest.fixture(scope="module")
def results_url(
    qbridge_results: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of an empty result backend that only this module and pair uses: a Redis database, a database, a file."""
    _depend_on("qbridge_broker", request)
    if qbridge_results == "rpc":
        yield "rpc://"
        return
    if qbridge_results == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('results') / 'results.db'}"
        return
    server: Server = request.getfixturevalue(f"qbridge_{qbridge_results}")
    with server.heal().fresh() as url:
        yield url


def _choice(item: pytest.Item) -> tuple[str | None, str | None]:
    """The broker and the results that a collected test runs on; None where it has none."""
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    return params.get("qbridge_broker"), params.get("qbridge_results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the pairs of the matrix that were asked for, and note on each test which one it runs on."""
    wanted_broker, wanted_results = config.getoption("--qbridge-broker"), config.getoption("--qbridge-results")
    kept: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    for item in items:
        broker, results = _choice(item)
        if broker is not None and results is not None:
            if (broker, results) not in PAIRS:
                continue  # not a test: the fixtures' parameters are a full product, the matrix is not
            item.user_properties.append((_PROPERTY, f"{broker} × {results}"))
        # An option says nothing about tests that have no broker, or no results, of the matrix.
        other_broker = wanted_broker is not None and broker is not None and broker != wanted_broker
        other_results = wanted_results is not None and results is not None and results != wanted_results
        (deselected if other_broker or other_results else kept).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every pair with its numbers of tests."""
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            pair = dict(getattr(report, "user_properties", ())).get(_PROPERTY)
            if pair is not None:
                counts.setdefault(str(pair), Counter())["failed" if outcome == "error" else outcome] += 1
    if not counts:
        return
    terminalreporter.section("broker × results")
    order = {f"{broker} × {results}": number for number, (broker, results) in enumerate(PAIRS)}
    for pair in sorted(counts, key=lambda name: order.get(name, len(order))):
        count = counts[pair]
        terminalreporter.write_line(
            f"{pair}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped",
            red=bool(count["failed"]),
        )
