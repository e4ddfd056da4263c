"""The bridge itself: what it refuses, what it says, its end; nothing is connected."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from qbridge import (
    Bridge,
    BridgeConfig,
    BrokerUnavailable,
    ConfigurationError,
    RedisBroker,
    Retry,
    TaskSet,
    UnknownQueueError,
)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge on files that nobody opens before they are needed."""
    config = BridgeConfig(broker=f"embedded:///{tmp_path}/b.db", results=f"db+sqlite:///{tmp_path}/r.db")
    with Bridge(config) as made:
        yield made


def test_revoking_needs_a_broker_only(bridge: Bridge) -> None:
    """A task that stores no results may be told not to run all the same."""

    @bridge.task(results=False)
    def one() -> None: ...

    one.delay().revoke()


def test_revoking_without_a_broker_ends_in_an_error_of_ours(closed_port: int) -> None:
    """Like sending: bounded, with the server's name."""
    broker = RedisBroker(host="127.0.0.1", port=closed_port, publish_timeout=1)
    with Bridge(BridgeConfig(broker=broker, results="redis://127.0.0.1:1/0")) as made:
        result = made.result("x")
        with pytest.raises(BrokerUnavailable, match=str(closed_port)):
            result.revoke()


def test_worker_refuses_a_queue_that_nobody_declared(bridge: Bridge) -> None:
    """With a suggestion, as a send does."""
    with pytest.raises(UnknownQueueError, match="Did you mean 'default'"), bridge.worker(queues=["defualt"]):
        pass


def test_closed_bridge_stays_closed(bridge: Bridge) -> None:
    """Nothing is opened again behind its back."""
    bridge.close()
    for use in (lambda: bridge.send("x"), lambda: bridge.result("x"), bridge.worker):
        with pytest.raises(ConfigurationError, match="closed"):
            use()


def test_celerys_own_default_broker_is_not_called_an_embedded_one() -> None:
    """The warning is about files in the working directory."""
    with Bridge(BridgeConfig(defaults="celery")) as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        made.celery.conf.broker_url = "memory://"
        made.send("x")


def test_an_unreachable_broker_is_our_error_under_celerys_defaults_too(closed_port: int) -> None:
    """Celery's own retries run out, and the caller gets one type of error whatever the defaults."""
    raw = {"task_publish_retry_policy": {"max_retries": 0}, "broker_transport_options": {"max_retries": 0}}
    broker = f"amqp://guest:guest@127.0.0.1:{closed_port}//"
    with Bridge(BridgeConfig(broker=broker, results="none", defaults="celery", celery=raw)) as bridge:

        @bridge.task
        def one() -> None: ...

        with pytest.raises(BrokerUnavailable, match="did not take the message"):
            one.delay()


def test_a_task_whose_retries_outlive_its_result_is_refused_where_it_is_declared() -> None:
    """As the config's own Retry is; a task without a result, or of an existing fleet, waits as long as it likes."""
    long = Retry(on=OSError, attempts=3, wait_initial=60)
    config: dict[str, Any] = {"broker": "embedded:///tmp/never-made.db", "results": {"url": "redis://h", "expires": 50}}
    with Bridge(BridgeConfig(**config)) as bridge:
        with pytest.raises(ConfigurationError, match=r"task slow: results expire after 50 s.*Retry with fewer"):
            bridge.task(name="slow", retry=long)(lambda a: a)
        tasks = TaskSet()
        tasks.task(name="slower", retry=long)(lambda a: a)
        with pytest.raises(ConfigurationError, match="task slower"):
            bridge.include(tasks)
        bridge.task(name="quick", retry=Retry(on=OSError, attempts=3, wait_initial=1))(lambda a: a)
        bridge.task(name="quiet", retry=long, results=False)(lambda a: a)
        assert ["quick", "quiet"] == sorted(bridge.tasks)
    with Bridge(BridgeConfig(**config, defaults="celery")) as bridge:
        bridge.task(name="slow", retry=long)(lambda a: a)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ("shop", "Bridge(BridgeConfig(name='shop'))"),
        ("redis://:hidden@broker", "Bridge(BridgeConfig(broker='redis://...'))"),
        (Celery("shop", set_as_current=False), "Bridge(BridgeConfig.from_celery(app.conf))"),
        ({"broker": "redis://broker"}, "BridgeConfig(...) takes arguments"),
    ],
)
def test_what_is_no_configuration_is_refused_with_the_way_out(given: Any, way_out: str) -> None:
    """``Celery("shop")`` takes a name there; it was an AttributeError here."""
    with pytest.raises(ConfigurationError) as caught:
        Bridge(given)
    assert f"not {type(given).__name__}" in str(caught.value)
    assert way_out in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_the_settings_of_a_celery_app_make_a_bridge() -> None:
    """As the message above says."""
    app = Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    with Bridge(BridgeConfig.from_celery(app.conf)) as made:
        assert isinstance(made.config.broker, RedisBroker)
