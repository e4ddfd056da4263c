"""What the kit's servers do, and that nothing of them is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.pool import NullPool

from qbridge.testing.servers import (
    DatabaseServer,
    MariaDBServer,
    PostgreSQLServer,
    RabbitMQServer,
    RedisServer,
    Server,
    ServerFailed,
    obtain,
)
from qbridge.testing.servers.guardian import tree
from qbridge.testing.waiting import wait_until

pytestmark = pytest.mark.timeout(240)  # RabbitMQ starts several times


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that was killed and that nobody waited for still has a pid.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def run_sql(url: str, *statements: str) -> list[tuple[object, ...]]:
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            result = connection.execute(sqlalchemy.text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def write_rabbitmq(server: RabbitMQServer) -> None:
    server.api("PUT", "/api/queues/%2F/kept", {"durable": True, "arguments": {"x-queue-type": "quorum"}})
    message = {
        "routing_key": "kept",
        "payload": "kept",
        "payload_encoding": "string",
        "properties": {"delivery_mode": 2},
    }
    assert server.api("POST", "/api/exchanges/%2F/amq.default/publish", message)["routed"]


def read_rabbitmq(server: RabbitMQServer) -> object:
    order = {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"}
    # A quorum queue elects its leader a moment after the start, and is empty until then.
    (message,) = wait_until(lambda: server.api("POST", "/api/queues/%2F/kept/get", order), 20, what="the message")
    return message["payload"]


def write_redis(server: RedisServer) -> None:
    with server.client() as client:
        client.set("kept", "kept")


def read_redis(server: RedisServer) -> object:
    with server.client() as client:
        return client.get("kept")


def write_database(server: DatabaseServer) -> None:
    server.execute("CREATE TABLE kept (value VARCHAR(10))", "INSERT INTO kept VALUES ('kept')")


def read_database(server: DatabaseServer) -> object:
    return run_sql(server.url, "SELECT value FROM kept")[0][0]


KINDS: dict[str, tuple[Callable[[], Server], Callable[..., None], Callable[..., object]]] = {
    "redis": (lambda: RedisServer(appendonly=True), write_redis, read_redis),
    "postgresql": (PostgreSQLServer, write_database, read_database),
    "mariadb": (MariaDBServer, write_database, read_database),
    "rabbitmq": (RabbitMQServer, write_rabbitmq, read_rabbitmq),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_server_lives_as_it_is_told(kind: str) -> None:
    """It answers, freezes, thaws, survives kill and restart with its data and port, and leaves nothing behind."""
    make, write, read = KINDS[kind]
    obtain(type(make())).close()  # installs it where it may
    with make() as server:
        url, folder = server.url, server.folder
        write(server)

        server.freeze()
        assert not server._is_ready()
        server.thaw()
        server.heal()
        assert "kept" == read(server)

        killed = server.pid
        server.kill()
        assert not server.running
        assert not alive(killed)
        server.start()
        assert "kept" == read(server)

        server.restart()
        assert url == server.url
        assert "kept" == read(server)

        processes = tree(server.pid)
    assert not folder.exists()
    wait_until(lambda: not any(alive(pid) for pid in processes), what="its processes to end")


@pytest.mark.parametrize("name", ["qbridge_rabbitmq", "qbridge_redis", "qbridge_postgresql", "qbridge_mariadb"])
def test_fresh_places_are_apart(name: str, request: pytest.FixtureRequest) -> None:
    """Two fresh places on one server have different URLs, and both differ from the server's own."""
    server: Server = request.getfixturevalue(name)
    with server.fresh() as one, server.fresh() as other:
        assert 3 == len({server.url, one, other})


def test_a_fresh_redis_database_is_empty_afterwards(qbridge_redis: RedisServer) -> None:
    """What a test left there is gone when the place is given back."""
    with qbridge_redis.fresh() as url, qbridge_redis.client(url) as client:
        client.set("a", "b")
    with qbridge_redis.client(url) as client:
        assert not client.exists("a")


@pytest.mark.parametrize("name", ["qbridge_postgresql", "qbridge_mariadb"])
def test_a_fresh_database_is_dropped_while_in_use(name: str, request: pytest.FixtureRequest) -> None:
    """A connection that a test forgot does not keep its database alive."""
    server: DatabaseServer = request.getfixturevalue(name)
    with server.fresh() as url:
        engine = sqlalchemy.create_engine(url, poolclass=NullPool)
        forgotten = engine.connect()
        forgotten.execute(sqlalchemy.text("SELECT 1"))
    with pytest.raises(sqlalchemy.exc.SQLAlchemyError):
        run_sql(url, "SELECT 1")
    forgotten.invalidate()
    forgotten.close()


def test_rabbitmq_vhosts_and_users(qbridge_rabbitmq: RabbitMQServer) -> None:
    """A user may do what its permissions say, in the vhost that they name; the vhost goes with its block."""
    with qbridge_rabbitmq.vhost("a/b c") as url:
        assert url.endswith("/a%2Fb%20c")
        qbridge_rabbitmq.create_user("reader", "p@ss")
        qbridge_rabbitmq.set_permissions("reader", "a/b c", configure="", write="", read=".*")
        assert "reader:p%40ss@" in qbridge_rabbitmq.user_url("reader", "p@ss", "a/b c")
        assert {} == qbridge_rabbitmq.queues("a/b c")
        qbridge_rabbitmq.delete_user("reader")
    with pytest.raises(ServerFailed, match="404"):
        qbridge_rabbitmq.queues("a/b c")


def test_rabbitmqctl_speaks_to_the_private_node(qbridge_rabbitmq: RabbitMQServer) -> None:
    """The command line runs with the private node's environment, not with the machine's."""
    if not qbridge_rabbitmq.private:
        pytest.skip("rabbitmqctl needs a private node")
    assert f"qbridge{qbridge_rabbitmq.port}@localhost" in qbridge_rabbitmq.ctl("status")


def test_rabbitmq_serves_tls() -> None:
    """The TLS listener shows a certificate of the throwaway CA."""
    import ssl

    with RabbitMQServer(tls=True) as server:
        assert server.ca is not None
        context = ssl.create_default_context(cafile=str(server.ca.certificate))
        with (
            socket.create_connection(("127.0.0.1", server.tls_port), 5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            encrypted.sendall(b"AMQP\x00\x00\x09\x01")
            assert b"\x01" == encrypted.recv(1)


def test_redis_with_everything(tmp_path: Path) -> None:
    """Password, ACL user, TLS, unix socket and settings at once."""
    import redis

    server = RedisServer(
        requirepass="s3cret/@",
        users=["worker on >pass ~* &* +@all -flushall"],
        tls=True,
        unix_socket=True,
        settings={"maxmemory": "50mb", "maxmemory-policy": "allkeys-lru"},
    )
    with server:
        with server.client() as client:
            assert "allkeys-lru" == client.config_get("maxmemory-policy")["maxmemory-policy"]
        with server.client(server.user_url("worker", "pass")) as client:
            assert "worker" == client.acl_whoami()
        with pytest.raises(redis.AuthenticationError), server.client(server.user_url("worker", "wrong")) as client:
            client.ping()
        with redis.Redis(unix_socket_path=str(server.unix_socket), password="s3cret/@") as client:
            assert client.ping()
        with pytest.raises(redis.ConnectionError), redis.Redis(port=server.port) as client:
            client.ping()


def test_a_server_that_does_not_start_shows_its_log() -> None:
    """The error names the server and shows what it said."""
    with pytest.raises(ServerFailed, match=r"private redis server ended with code 1[\s\S]*no-such-setting"):
        RedisServer(settings={"no-such-setting": "1"}).start()


@pytest.fixture
def redis_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    with RedisServer() as server:
        monkeypatch.setenv("QBRIDGE_TEST_REDIS_URL", server.url)
        yield server


def test_a_url_takes_the_place_of_the_private_server(
    redis_elsewhere: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server named by the variable is used, and cannot be frozen: skipped here, failed in CI."""
    server = obtain(RedisServer)
    assert not server.private
    assert redis_elsewhere.url == server.url
    with server.fresh() as url:
        assert url != server.url
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="QBRIDGE_TEST_REDIS_URL"):
        server.freeze()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="QBRIDGE_TEST_REDIS_URL"):
        server.kill()
    server.close()
    assert redis_elsewhere.running


def test_a_url_where_nobody_answers_is_an_error(redis_elsewhere: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable."""
    redis_elsewhere.stop()
    with pytest.raises(ServerFailed, match="QBRIDGE_TEST_REDIS_URL"):
        obtain(RedisServer)


START_AND_SAY = """
import sys, time
from qbridge.testing.servers import RedisServer, RabbitMQServer, PostgreSQLServer
from qbridge.testing.servers.guardian import tree
servers = [kind().start() for kind in (RedisServer, PostgreSQLServer, RabbitMQServer)[: int(sys.argv[1])]]
import os
servers[0].freeze()
pids = [pid for pid in tree(os.getpid()) if pid != os.getpid()]
print(*pids, *[server.folder for server in servers], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "servers"), [(signal.SIGKILL, 3), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_nothing_outlives_a_killed_test_run(number: signal.Signals, servers: int) -> None:
    """Whatever ends the test run, its servers (a frozen one too), epmd and folders go with it."""
    run = subprocess.Popen([sys.executable, "-c", START_AND_SAY, str(servers)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run.stdout:
        words = run.stdout.readline().split()
    pids = [int(word) for word in words if word.isdigit()]
    folders = [Path(word) for word in words if not word.isdigit()]
    assert len(pids) > servers
    assert servers == len(folders)
    run.send_signal(number)
    run.wait(60)
    wait_until(lambda: not any(alive(pid) for pid in pids), 20, what="the servers to end")
    wait_until(lambda: not any(folder.exists() for folder in folders), 20, what="the folders to be removed")


def test_the_command_line_runs_servers_until_it_is_told_to_end() -> None:
    """It prints a line per server that can be put into the environment, and ends the servers with itself."""
    run = subprocess.Popen(
        [sys.executable, "-m", "qbridge.testing.servers", "run", "redis"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "QBRIDGE_TEST_REDIS_URL"},
    )
    assert run.stdout is not None
    with run.stdout:
        variable, _, url = run.stdout.readline().strip().partition("=")
    assert "QBRIDGE_TEST_REDIS_URL" == variable
    with RedisServer.at(url).client() as client:
        assert client.ping()
    begun = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert 0 == run.wait(30)
    assert time.monotonic() - begun < 20
    port = int(url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
