"""A pytest plugin: whose app and whose connection do Celery's and kombu's own integration tests run on? Ours.

Loaded with ``-p on_bridge`` beside ``-p celery.contrib.pytest``. Both of Celery's app fixtures come from one function,
and all of kombu's tests make their connections by ``kombu.Connection``; nothing else is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import celery.contrib.pytest
import kombu
from celery.contrib.testing.app import DEFAULT_TEST_CONFIG, UnitLogging, setup_default_app

from qbridge import Bridge, BridgeConfig
from qbridge.amqp import BridgeConnection


@contextmanager
def _create_app(
    enable_logging: bool = False, use_trap: bool = False, parameters: dict[str, Any] | None = None, **config: Any
) -> Iterator[Any]:
    """Do what ``celery.contrib.pytest._create_app`` does, with the app under a bridge."""
    from celery.contrib.testing import tasks  # noqa: F401 - the ping that start_worker sends

    assert not parameters
    settings = dict(deepcopy(DEFAULT_TEST_CONFIG), **config)
    settings["accept_content"] = list(settings["accept_content"])
    broker, results = settings.pop("broker_url"), settings.pop("result_backend")
    bridge = Bridge(BridgeConfig(broker=broker, results=results, defaults="celery", celery=settings))
    app = bridge.celery
    if not enable_logging:
        app.log_cls = UnitLogging
    with setup_default_app(app, use_trap=use_trap):
        yield app
    bridge.close()


def pytest_configure() -> None:
    """Put ours in the place of theirs, before any test module is imported."""
    if os.environ.get("INTEROP_SUITE") == "kombu":
        kombu.Connection = BridgeConnection  # type: ignore[misc]
    else:
        celery.contrib.pytest._create_app = _create_app
