"""Which broker and which results does a URL mean?"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import AmqpDsn, RedisDsn, SecretStr

from qbridge.config import BridgeConfig
from qbridge.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("amqp://u:p@h//", "rabbitmq"),
        ("amqps://u:p@h/shop", "rabbitmq"),
        ("pyamqp://h", "rabbitmq"),
        ("amqp://a//;amqp://b//", "rabbitmq"),
        (["amqp://a//", "amqp://b//"], "rabbitmq"),
        (SecretStr("amqp://u:p@h//"), "rabbitmq"),
        (AmqpDsn("amqp://u:p@h//"), "rabbitmq"),
        (RedisDsn("redis://h/1"), "redis"),
        ("redis://:p@h:1/2", "redis"),
        ("rediss://h", "redis"),
        ("redis+socket:///run/redis.sock", "redis"),
        ("unix:///run/redis.sock?db=1", "redis"),
        ("sentinel://a:26379;sentinel://b:26379?master_name=m", "redis"),
        ("embedded:///tmp/b.db", "embedded"),
        ("embedded", "embedded"),
        ({"kind": "redis", "host": "h"}, "redis"),
        ({"url": "redis://h"}, "redis"),
        ({}, "embedded"),
    ],
)
def test_what_means_a_broker(url: Any, kind: str) -> None:
    """Every scheme that Celery's users write, and their usual wrappings, lead to a broker."""
    assert BridgeConfig(broker=url).broker.kind == kind


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("rpc://", "rpc"),
        ("rpc", "rpc"),
        ("redis://h/1", "redis"),
        ("unix:///run/redis.sock", "redis"),
        ("db+postgresql://u:p@h/x", "database"),
        ("postgresql+psycopg://u:p@h/x", "database"),
        ("sqlite:///x.db", "database"),
        ("db+sqlite:///x.db", "database"),
        ("mysql+pymysql://u:p@h/x", "database"),
        ("mariadb+pymysql://u:p@h/x", "database"),
        ("disabled://", "none"),
        ("disabled", "none"),
        ("none", "none"),
        ({"expires": 5, "url": "sqlite:///x.db"}, "database"),
        ({"kind": "none"}, "none"),
    ],
)
def test_what_means_a_result_backend(url: Any, kind: str) -> None:
    """Every scheme that Celery's and SQLAlchemy's users write leads to a result backend."""
    assert BridgeConfig(broker="amqp://h//", results=url).results.kind == kind


TWO = "db+postgresql://:s3cret@a/x;db+postgresql://:s3cret@b/x"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqpp://u:s3cret@h", "did you mean 'amqp'?"),
        ("reddis://:s3cret@h", "did you mean 'redis'?"),
        ("sqs://k:s3cret@", "known: amqp://"),
        ("user:s3cret@h:5672", "is not a URL"),
        ("rediss//:s3cret@h", "is not a URL"),
        ("amqp:/u:s3cret@h", "is not a URL"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("rabbitmg", "did you mean 'rabbitmq'?"),
        ("amqp://u:s3cret@h:port//", "port"),
        ("redis://:s3cret@h/x", "number of a database"),
        ("amqp://u:1/s3cret@h/x", "unquoted '@'"),
        ("amqp://u:1?s3cret@h/x", "unquoted '@'"),
        ("redis://:1#s3cret@h/x", "unquoted '@'"),
        ("redis://:s3cret@h/1?lese=3", "lese"),
        (3, "is an int"),
        (None, "is a NoneType"),
        ({"kind": "rabbit"}, "did you mean 'rabbitmq'?"),
        ({"kind": 3}, "known: rabbitmq"),
        ({"kind": "redis", "url": "amqp://u:s3cret@h//"}, "leave kind out"),
        ({"hst": "h"}, "did you mean 'host'?"),
        ({"vhost": "/", "db": 1}, "no single broker"),
        ({"kind": "redis", "vhost": "/"}, "no such field here, only on RabbitMQBroker"),
        ({"kind": "redis", "pasword": "s3cret"}, "broker.pasword (argument): no such field; did you mean 'password'?"),
        ({"kind": "rabbitmq", "password": ["s3cret"]}, "broker.password"),
        ({"kind": "rabbitmq", "port": "s3cret"}, "broker.port"),
        ({"kind": "rabbitmq", "tls": {"verify": "s3cret"}}, "broker.tls"),
    ],
)
def test_what_means_no_broker(url: Any, words: str) -> None:
    """The message says what to write instead, and nothing of what was written that may be a password."""
    with pytest.raises(ConfigurationError) as caught:
        BridgeConfig(broker=url)
    assert words in str(caught.value)
    assert "s3cret" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "url", ["mongodb://u:s3cret@h", "postgrsql://u:s3cret@h/x", "redis://:s3cret@h/x", "db+://", 1]
)
def test_what_means_no_result_backend(url: Any) -> None:
    """Unknown results are refused alike."""
    with pytest.raises(ConfigurationError, match=r"^the configuration cannot work: results \(argument\)") as caught:
        BridgeConfig(results=url)
    assert "s3cret" not in repr(caught.value)
