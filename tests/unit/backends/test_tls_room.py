"""TLS means a verified server, in what each driver really does with the settings."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp.transport
import celery
import pytest
from kombu.connection import Connection
from pydantic import ValidationError

from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults, Sentinel
from qbridge.backends.tls import TLS
from qbridge.testing.servers import ThrowawayCA


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CA, a client certificate and its key."""
    ca = ThrowawayCA(tmp_path_factory.mktemp("ca"))
    certificate, key = ca.issue("client")
    return {"ca_file": ca.certificate, "cert_file": certificate, "key_file": key}


def tls_of(files: dict[str, Path]) -> TLS:
    """TLS with a CA and a client certificate."""
    return TLS(ca_file=files["ca_file"], cert_file=files["cert_file"], key_file=files["key_file"])


def app_of(*rooms: Any) -> celery.Celery:
    """A plain Celery app under the rooms' safe settings."""
    app = celery.Celery("t", set_as_current=False)
    for room in rooms:
        app.conf.update(room.celery_settings())
    return app


class _Wrapped(Exception):
    """Carries the context and the arguments with which a socket was about to be wrapped."""


def amqp_context(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> tuple[ssl.SSLContext, dict[str, Any]]:
    """What py-amqp makes of a kombu connection's TLS options, stopped before the handshake."""

    def wrap_socket(self: ssl.SSLContext, sock: Any, **kwargs: Any) -> Any:
        raise _Wrapped(self, kwargs)

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    monkeypatch.setattr(
        amqp.transport._AbstractTransport, "_connect", lambda self, *a: setattr(self, "sock", _NoSocket())
    )
    with pytest.raises(_Wrapped) as caught:
        connection.transport.establish_connection()
    context, kwargs = caught.value.args
    return context, kwargs


class _NoSocket:
    def __getattr__(self, _name: str) -> Callable[..., int]:
        return lambda *_a, **_k: 0


def test_rabbitmq_over_tls_verifies_certificate_and_host_name(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """py-amqp compares host names only if it is told one: it is told."""
    app = app_of(RabbitMQBroker(host="rabbit.example", tls=tls_of(files)))
    context, kwargs = amqp_context(app.connection_for_write(), monkeypatch)
    assert ssl.CERT_REQUIRED == context.verify_mode
    assert context.check_hostname
    assert "rabbit.example" == kwargs["server_hostname"]
    assert 1 == context.cert_store_stats()["x509_ca"]  # ours, and not the system's


def test_rabbitmq_tls_true_trusts_the_system_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tls=True`` and ``amqps://`` mean the same."""
    for broker in (RabbitMQBroker(host="r", tls=True), RabbitMQBroker.from_url("amqps://r")):
        with monkeypatch.context() as patch:
            context, kwargs = amqp_context(app_of(broker).connection_for_write(), patch)
        assert (ssl.CERT_REQUIRED, True, "r") == (
            context.verify_mode,
            context.check_hostname,
            kwargs["server_hostname"],
        )


def test_rabbitmq_tls_without_verification_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in so many words, it is done."""
    context, _ = amqp_context(app_of(RabbitMQBroker(tls=TLS(verify=False))).connection_for_write(), monkeypatch)
    assert (ssl.CERT_NONE, False) == (context.verify_mode, context.check_hostname)


def test_rabbitmq_tls_may_leave_out_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate must be valid, for whomever it is."""
    context, _ = amqp_context(app_of(RabbitMQBroker(tls=TLS(check_hostname=False))).connection_for_write(), monkeypatch)
    assert (ssl.CERT_REQUIRED, False) == (context.verify_mode, context.check_hostname)


def test_each_server_of_a_cluster_is_verified_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """kombu writes the first server's name into the shared options; the second must not be checked against it."""
    connection = app_of(RabbitMQBroker(hosts=("one", "two"), tls=True)).connection_for_write()
    names = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            names.append(amqp_context(connection, patch)[1]["server_hostname"])
        connection.maybe_switch_next()
    assert ["one", "two", "one"] == names


def test_redis_broker_over_tls_verifies(files: dict[str, Path]) -> None:
    """kombu's own default for rediss:// is to verify nothing."""
    broker = RedisBroker(host="r", tls=tls_of(files))
    connection = app_of(broker).connection_for_write()
    parameters = _channel_parameters(connection)
    assert "SSLConnection" == parameters["connection_class"].__mro__[0].__name__
    made = parameters.pop("connection_class")(**_for_redis_py(parameters))
    assert (ssl.CERT_REQUIRED, True) == (made.cert_reqs, made.check_hostname)
    assert [str(files[name]) for name in ("ca_file", "cert_file", "key_file")] == [
        made.ca_certs,
        made.certfile,
        made.keyfile,
    ]


def test_redis_results_over_tls_verify(files: dict[str, Path]) -> None:
    """Celery itself refuses rediss:// results that do not say what they verify."""
    app = app_of(RedisResults(host="r", tls=tls_of(files)))
    parameters = dict(app.backend.connparams)
    made = parameters.pop("connection_class")(**_for_redis_py(parameters))
    assert (ssl.CERT_REQUIRED, True) == (made.cert_reqs, made.check_hostname)
    assert [str(files[name]) for name in ("ca_file", "cert_file", "key_file")] == [
        made.ca_certs,
        made.certfile,
        made.keyfile,
    ]


@pytest.mark.parametrize("room", [RedisBroker, RedisResults])
def test_redis_tls_without_verification_is_possible(room: type[RedisBroker | RedisResults]) -> None:
    """``ssl_cert_reqs=none`` in the URL means it, as everywhere."""
    options = room.from_url("rediss://r?ssl_cert_reqs=none").ssl_options()
    assert {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False} == options


def test_sentinels_are_spoken_to_over_tls_too(files: dict[str, Path]) -> None:
    """With ``tls`` set, nothing goes out in the clear."""
    broker = RedisBroker(sentinel=Sentinel(hosts=["s"], master_name="m"), tls=tls_of(files))
    kwargs = broker.celery_settings()["broker_transport_options"]["sentinel_kwargs"]
    assert (True, ssl.CERT_REQUIRED, True) == (kwargs["ssl"], kwargs["ssl_cert_reqs"], kwargs["ssl_check_hostname"])


def test_certificate_files_must_exist() -> None:
    """A wrong path is said at configuration time."""
    with pytest.raises(ValidationError, match="ca_file"):
        TLS(ca_file="/no/such/file")


def test_a_key_needs_its_certificate(files: dict[str, Path]) -> None:
    """A key alone would be ignored by the drivers."""
    with pytest.raises(ValidationError, match="cert_file"):
        TLS(key_file=files["key_file"])


def _channel_parameters(connection: Connection) -> dict[str, Any]:
    channel_class = connection.transport.Channel

    class Unconnected(channel_class):  # type: ignore[misc,valid-type]  # kombu's channel pings the server when it is made
        def __init__(self) -> None:
            self.connection = connection.transport
            for name in self.from_transport_options:
                options = connection.transport_options or {}
                if name in options:
                    setattr(self, name, options[name])

        def __del__(self) -> None:
            pass

    return dict(Unconnected()._connparams())


def _for_redis_py(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "max_connections"}
