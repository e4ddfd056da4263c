"""Which choices do not work together?"""

from __future__ import annotations

from typing import Any

import pytest

from qbridge.config import BridgeConfig, QueueConfig, WorkerConfig
from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"celery": {"task_time_limit": 2, "task_soft_time_limit": 3}}, "is above task_time_limit"),
        ({"celery": {"task_time_limit": 2}, "worker": {"pool": "thread"}}, "cannot enforce time limits"),
        ({"celery": {"task_soft_time_limit": 2}, "worker": {"pool": "solo"}}, "cannot enforce time limits"),
        ({"worker": {"prefetch": 0}}, "worker.prefetch"),
        ({"worker": {"pool": "solo", "concurrency": 2}}, "one task at a time"),
        ({"worker": {"pool": "thread", "max_tasks_per_child": 2}}, "replaces processes"),
        ({"worker": {"pool": "solo", "max_memory_per_child": 2}}, "replaces processes"),
        ({"worker": {"shutdown_timeout": -1}}, "worker.shutdown_timeout"),
        ({"worker": {"max_redeliveries": -1}}, "worker.max_redeliveries"),
        ({"worker": {"watchdog": -1}}, "worker.watchdog"),
        ({"worker": {"health_port": 65536}}, "worker.health_port"),
        ({"worker": {"health_port": 80}, "defaults": "celery"}, "qbridge's own worker"),
        ({"results": {"url": "sqlite:///x.db", "cleanup_interval": 60}, "defaults": "celery"}, "let beat remove"),
        ({"broker": "redis://h", "queues": [QueueConfig("a", type="quorum")]}, "only RabbitMQ has queue types"),
        ({"queues": [QueueConfig("a", max_priority=3)]}, "RabbitMQ's classic queues"),
        ({"queues": ["a", "a"]}, "there twice"),
        ({"queues": ["a", "a.dead"]}, "dead letters of 'a'"),
        ({"queues": [{"name": "a", "type": "quorum", "max_priority": 3}]}, "a quorum queue with max_priority"),
        ({"queues": [{"name": "a", "declare": False, "max_priority": 3}]}, "its owner decides"),
        ({"queues": {"a": {}}}, "list of names"),
        ({"queues": 3}, "list of names"),
        ({"queues": [3]}, "queues.0"),
        ({"queues": [QueueConfig("default", declare=False)]}, "declare=False"),
        ({"results": {"url": "redis://h", "expires": 5}, "retry": Retry(on=OSError)}, "before the last retry"),
        ({"results": {"kind": "rpc", "expires": 5}, "broker": "redis://h", "celery": {"x_y": 1}}, "x_y"),
        ({"modules": ["proj/tasks.py"]}, "not the name of a module"),
        ({"modules": ["proj."]}, "not the name of a module"),
        ({"serialization": {"format": "pickle"}}, "'json' or 'msgpack'"),
        ({"serialization": {"max_payload_bytes": 3}}, "max_payload_bytes"),
        ({"name": ""}, "name"),
        ({"delivery": "at_least_onse"}, "did you mean 'at_least_once'"),
        ({"defaults": "sane"}, "defaults"),
        ({"timezone": "../etc/passwd"}, "no such time zone"),
        ({"timezone": ""}, "no such time zone"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], words: str) -> None:
    """The message says why and what to write."""
    with pytest.raises(ConfigurationError) as caught:
        BridgeConfig(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " a",
        "a\n",
        "a\x00b",
        "a,b",
        "amq.x",
        "celery_delayed_3",
        "qbridge.schedule",
        "unacked",
        "x" * 248,
        "ä" * 100,
        "a\u200bb",
    ],
)
def test_a_queue_name_that_gets_lost_on_the_way(name: str) -> None:
    """Names that AMQP, RabbitMQ or the command line could not carry are refused, wherever they are written."""
    for arguments in ({"queues": [name]}, {"default_queue": name}):
        with pytest.raises(ConfigurationError, match="queue name"):
            BridgeConfig(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "reports.slow", "Ä", "a b", "a/b:c#d*", "x" * 247, "ä" * 42])
def test_a_queue_name_that_arrives(name: str) -> None:
    """Everything else is a name."""
    assert BridgeConfig(queues=[name]).queues == (QueueConfig(name),)


def test_queues_of_others_may_have_longer_names() -> None:
    """A queue that is only named is not wrapped in an exchange name."""
    assert QueueConfig("x" * 255, declare=False).name == "x" * 255
    with pytest.raises(ConfigurationError, match="too long"):
        QueueConfig("x" * 256, declare=False)


def test_max_priority_means_classic_on_rabbitmq() -> None:
    """A queue with max_priority needs no type beside it, and may name the classic one."""
    BridgeConfig(broker="amqp://h//", queues=[QueueConfig("a", max_priority=9)])
    BridgeConfig(broker="amqp://h//", queues=[QueueConfig("a", type="classic", max_priority=9)])


def test_celerys_defaults_join_a_fleet_as_it_is() -> None:
    """What Celery ignores in an existing fleet is not refused under defaults="celery"."""
    config = BridgeConfig(
        defaults="celery",
        broker="redis://h",
        results="rpc://",
        worker=WorkerConfig(pool="thread"),
        celery={"task_time_limit": 3},
        queues=[QueueConfig("celery", declare=False)],
    )
    assert config.results.kind == "rpc"
    BridgeConfig(defaults="celery", results={"url": "sqlite:///x.db", "cleanup_interval": None})


def test_rpc_needs_a_broker_that_carries_it() -> None:
    """rpc results are refused exactly where the broker says that it does not carry them."""
    for url in ("amqp://h//", "redis://h", "embedded://"):
        if BridgeConfig(broker=url).broker.capabilities.rpc_results:
            assert BridgeConfig(broker=url, results="rpc://").results.kind == "rpc"
        else:
            with pytest.raises(ConfigurationError, match="rpc results travel over the broker"):
                BridgeConfig(broker=url, results="rpc://")


def test_msgpack_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the message names the extra that brings it."""
    monkeypatch.setattr("qbridge.config.models.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"qbridge\[msgpack\]"):
        BridgeConfig(serialization={"format": "msgpack"})
