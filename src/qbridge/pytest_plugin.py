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
    from pathlib import Path

    from qbridge import Bridge
    from qbridge.testing.contracts.kit import Contract
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


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a choice that no test could run on."""
    chosen = (config.getoption("--qbridge-broker"), config.getoption("--qbridge-results"))
    if None not in chosen and chosen not in PAIRS:
        pairs = ", ".join(f"{broker} × {results}" for broker, results in PAIRS)
        raise pytest.UsageError(f"{chosen[0]} × {chosen[1]} is not in the matrix; it has {pairs}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs a broker and results on every pair, one that needs half of it on every such half."""
    # Only our own fixtures lead to qbridge_pair: a project's own fixture named broker_url is none of our business.
    if "qbridge_pair" not in metafunc.fixturenames:
        return
    if any("qbridge_pair" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")):
        return
    with_broker, with_results = "qbridge_broker" in metafunc.fixturenames, "qbridge_results" in metafunc.fixturenames
    wanted_broker = metafunc.config.getoption("--qbridge-broker") if with_broker else None
    wanted_results = metafunc.config.getoption("--qbridge-results") if with_results else None
    pairs = dict.fromkeys(
        (broker if with_broker else None, results if with_results else None)
        for broker, results in PAIRS
        if wanted_broker in {None, broker} and wanted_results in {None, results}
    )
    ids = ["-".join(name for name in pair if name is not None) for pair in pairs]
    metafunc.parametrize("qbridge_pair", list(pairs), ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def qbridge_pair(request: pytest.FixtureRequest) -> tuple[str | None, str | None]:
    """Names of the broker and of the results that this test runs on; None for a half that it does not ask for."""
    broker, results = request.param
    return broker, results


@pytest.fixture(scope="module")
def qbridge_broker(qbridge_pair: tuple[str | None, str | None]) -> str:
    """Name of the broker that this test runs on: one of ``BROKERS``."""
    return str(qbridge_pair[0])


@pytest.fixture(scope="module")
def qbridge_results(qbridge_pair: tuple[str | None, str | None]) -> str:
    """Name of the result backend that this test runs on: one of ``RESULTS``."""
    return str(qbridge_pair[1])


@pytest.fixture(scope="module")
def broker_url(
    qbridge_broker: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of an empty broker that only this module and pair uses: a vhost, a Redis database, a new file."""
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
    """URL of an empty result backend that only this module and pair uses: a Redis database, a database, a new file."""
    if qbridge_results == "rpc":
        yield "rpc://"
        return
    if qbridge_results == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('results') / 'results.db'}"
        return
    server: Server = request.getfixturevalue(f"qbridge_{qbridge_results}")
    with server.heal().fresh() as url:
        yield url


# The contract, and a bridge for a test.

# Before anything imports them: a failing behaviour then shows the values that it compared.
pytest.register_assert_rewrite("qbridge.testing.contracts")


@pytest.fixture(scope="module")
def qbridge_contract(broker_url: str, results_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    """One pair with its bridge, tasks and shared worker process (see ``qbridge.testing.contracts``)."""
    from qbridge.testing.contracts.kit import Contract

    contract = Contract(broker_url, results_url, tmp_path_factory.mktemp("contract"))
    try:
        _ = contract.worker
        yield contract
    finally:
        contract.close()


@pytest.fixture
def qbridge_bridge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bridge]:
    """A bridge without tasks on a broker and results of its own, closed after the test.

    It runs on an embedded broker and SQLite results; in a test that asks for ``broker_url`` or ``results_url`` too, on
    those.
    """
    from qbridge import Bridge, BridgeConfig

    def url(fixture: str, otherwise: str) -> str:
        return str(request.getfixturevalue(fixture)) if fixture in request.fixturenames else otherwise

    broker = url("broker_url", f"embedded://{tmp_path / 'bridge.db'}")
    results = url("results_url", f"sqlite:///{tmp_path / 'results.db'}")
    with Bridge(BridgeConfig(broker=broker, results=results)) as bridge:
        yield bridge


@pytest.fixture
def qbridge_worker(qbridge_bridge: Bridge) -> Iterator[object]:
    """A worker of ``qbridge_bridge`` in threads of this process; it also runs tasks that the test declares later."""
    with qbridge_bridge.worker() as worker:
        yield worker


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note on each test which pair it runs on, so that its reports say so (in JUnit files and from xdist too).

    With ``-n 2 --dist loadgroup`` the tests of a pair stay together: each process of xdist starts servers of its own,
    and a pair's worker process once.
    """
    grouped = config.pluginmanager.hasplugin("xdist")
    for item in items:
        callspec = getattr(item, "callspec", None)
        pair = None if callspec is None else callspec.params.get("qbridge_pair")
        if pair is not None and None not in pair:
            item.user_properties.append((_PROPERTY, " × ".join(pair)))
            if grouped:
                item.add_marker(pytest.mark.xdist_group("-".join(pair)))


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
