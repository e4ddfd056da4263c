"""TLS with a throwaway CA on real servers: the right one works, and no other server is believed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from qbridge import Bridge, BridgeConfig, BrokerUnavailable, DatabaseResults, ResultsUnavailable
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults
from qbridge.backends.tls import TLS
from qbridge.testing.servers import PostgreSQLServer, RabbitMQServer, RedisServer, ThrowawayCA
from qbridge.testing.waiting import wait_until

BOUND = 2.0
"""Seconds that a send may take, and a question to the results."""


@dataclass
class Service:
    """A server that speaks TLS, what a bridge on it is made of, and how it comes to show another certificate."""

    ca: ThrowawayCA
    parts: list[str]
    config: Callable[[Path | None], BridgeConfig]
    show: Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Service]:
    with RabbitMQServer(tls=True) as server:
        ca = server.ca
        assert ca is not None

        def config(ca_file: Path | None) -> BridgeConfig:
            broker = RabbitMQBroker(
                host="localhost", port=server.tls_port, tls=TLS(ca_file=ca_file), publish_timeout=BOUND
            )
            return BridgeConfig(broker=broker, results="rpc://")

        def show(how: dict[str, Any]) -> None:
            ca.issue("server", **how)
            server.ctl("eval", "ssl:clear_pem_cache().")  # Erlang keeps what it has read for two minutes

        yield Service(ca, ["broker"], config, show)


@pytest.fixture(scope="module")
def redis() -> Iterator[Service]:
    with RedisServer(tls=True) as server:
        ca = server.ca
        assert ca is not None

        def config(ca_file: Path | None) -> BridgeConfig:
            where: dict[str, Any] = {"host": "localhost", "port": server.port, "tls": TLS(ca_file=ca_file)}
            broker = RedisBroker(**where, publish_timeout=BOUND)
            return BridgeConfig(broker=broker, results=RedisResults(**where, db=1, socket_timeout=1))

        def show(how: dict[str, Any]) -> None:
            certificate, _ = ca.issue("server", **how)
            with Redis(port=server.port, ssl=True, ssl_cert_reqs="none") as client:
                client.config_set("tls-cert-file", str(certificate))

        yield Service(ca, ["broker", "results"], config, show)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with PostgreSQLServer(tls=True) as server:
        ca = server.ca
        assert ca is not None

        def config(ca_file: Path | None) -> BridgeConfig:
            url = server.url.replace("127.0.0.1", "localhost") + f"?sslmode=verify-full&sslrootcert={ca_file}"
            results = DatabaseResults(url=url, connect_timeout=2)
            return BridgeConfig(broker=f"embedded://{tmp_path_factory.mktemp('tls') / 'b.db'}", results=results)

        def show(how: dict[str, Any]) -> None:
            before = server.log.read_text().count("reloading configuration files")
            server.issue(ca, **how)
            os.kill(server.pid, signal.SIGHUP)
            wait_until(
                lambda: server.log.read_text().count("reloading configuration files") > before, what="the reload"
            )

        yield Service(ca, ["results"], config, show)


@pytest.fixture(params=["rabbitmq", "redis", "postgresql"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """Each server in turn, with the right certificate before and after."""
    found: Service = request.getfixturevalue(request.param)
    before = (found.ca.folder / "server.pem").read_bytes()
    yield found
    if before != (found.ca.folder / "server.pem").read_bytes():
        found.show({})


def _bridge(config: BridgeConfig) -> Bridge:
    bridge = Bridge(config)

    @bridge.task(name="tls.add")
    def add(a: int, b: int) -> int:
        return a + b

    return bridge


def test_the_right_authority_lets_tasks_run(service: Service) -> None:
    """There and back, and ``check`` has nothing against it."""
    with _bridge(service.config(service.ca.certificate)) as bridge, bridge.worker(pool="solo"):
        assert bridge.tasks["tls.add"].delay(1, 2).get(timeout=20) == 3
        assert [] == [finding for finding in bridge.check().findings if finding.level == "error"]


@pytest.mark.parametrize("fault", ["another authority", "expired", "another host"])
def test_no_other_server_is_believed(service: Service, fault: str, tmp_path: Path) -> None:
    """Nothing is sent to it, the error says why in time, and so does ``check``."""
    ca_file = service.ca.certificate
    if fault == "another authority":
        ca_file = ThrowawayCA(tmp_path / "ca").certificate
    else:
        service.show({"expired": True} if fault == "expired" else {"host": "elsewhere.example"})
    with _bridge(service.config(ca_file)) as bridge:
        began = time.monotonic()
        if "broker" in service.parts:
            with pytest.raises(BrokerUnavailable, match=r"certificate|hostname|Hostname") as raised:
                bridge.tasks["tls.add"].delay(1, 2)
            assert raised.value.may_have_arrived is False
        else:
            with pytest.raises(ResultsUnavailable, match=r"certificate|host name"):
                bridge.result("some-id").get(timeout=BOUND)
        assert time.monotonic() - began < BOUND + 1
        found = {finding.code: finding for finding in bridge.check().findings if finding.level == "error"}
        assert list(found) == [f"{part}.tls" for part in service.parts]
        # libpq has one word for all that is wrong with a certificate but its host
        words = {"another authority": "self-signed|verify failed", "expired": "expired|verify failed"}
        assert all(re.search(words.get(fault, "match"), finding.what) for finding in found.values()), found
