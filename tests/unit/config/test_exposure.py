"""What ``check`` says about who could get in, before it looks at any server."""

from __future__ import annotations

from typing import Any

import pytest

from qbridge import BridgeConfig
from qbridge.config.exposure import exposure
from qbridge.serialization.keys import new_key


def codes(**fields: Any) -> list[str]:
    """The codes of what is found."""
    return [finding.code for finding in exposure(BridgeConfig(**fields))]


@pytest.mark.parametrize(
    ("broker", "results", "expected"),
    [
        ("amqp://guest:guest@localhost//", "rpc://", []),
        ("amqp://guest:guest@127.0.0.1//", "redis://[::1]/0", []),
        ("amqp://guest:guest@mq.example.org//", "rpc://", ["broker.guest", "broker.no_tls"]),
        ("amqp://shop:secret@mq.example.org//", "rpc://", ["broker.no_tls"]),
        ("amqps://shop:secret@mq.example.org//", "rpc://", []),
        ("redis://10.0.0.7/0", "redis://:secret@10.0.0.7/1", ["broker.no_password", "broker.no_tls", "results.no_tls"]),
        ("rediss://:secret@redis.example.org/0", "rediss://:secret@redis.example.org/1", []),
        ("redis+socket:///run/redis.sock", "redis://localhost", []),
        ("embedded://./b.db", "postgresql://shop:secret@db.example.org/shop", ["results.no_tls"]),
        ("embedded://./b.db", "postgresql://shop:secret@db.example.org/shop?sslmode=verify-full", []),
        ("embedded://./b.db", "postgresql://shop:secret@localhost/shop", []),
        ("embedded://./b.db", "sqlite:///r.db", []),
    ],
)
def test_what_strangers_could_use_is_said(broker: str, results: str, expected: list[str]) -> None:
    """An account that everybody knows, no password, no encryption; on this machine none of it matters."""
    assert codes(broker=broker, results=results) == expected


def test_content_types_beyond_need_are_said() -> None:
    """An existing Celery configuration may accept more than JSON."""
    celery = {"accept_content": ["json", "yaml"]}
    assert codes(defaults="celery", celery=celery) == ["configuration.content_types"]
    assert codes(defaults="celery", celery={"accept_content": ["json"]}) == []


def test_keys_that_nobody_has_to_have_are_said() -> None:
    """The state of a roll-out is not meant to stay."""
    key = new_key("a")
    assert codes(serialization={"signing_keys": [key], "require_signatures": False}) == [
        "configuration.signatures_not_required"
    ]
    assert codes(serialization={"signing_keys": [key]}) == []


def test_no_secret_is_in_what_is_said() -> None:
    """Findings end up in logs of deployments."""
    config = BridgeConfig(broker="redis://:hunter2@10.0.0.7/0", results="postgresql://shop:hunter2@db.example.org/shop")
    assert "hunter2" not in "".join(f"{finding.what}{finding.todo}" for finding in exposure(config))
