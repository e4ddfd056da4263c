"""A run that was ended because its connection broke: is it taken for a crash where that could not be stored?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

from qbridge import Bridge, BridgeConfig
from qbridge.worker.request import TypedRequest


def lost() -> ExceptionInfo:
    """What the pool says of a process that is gone."""
    try:
        raise WorkerLostError("signal 15")
    except WorkerLostError:
        return ExceptionInfo()


def test_a_run_that_was_ended_is_no_crash_though_the_results_are_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message goes back with the connection. A copy because its process is gone would be a run more."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"db+sqlite:///{tmp_path}/r.db")) as bridge:
        add = bridge.task(name="add")(lambda: None)
        add.delay()
        app: Any = bridge.celery
        with app.connection_for_read() as connection:
            message = connection.default_channel.basic_get("default")
            request: Any = TypedRequest(
                message, app=app, task=app.tasks["add"], on_ack=message.ack, hostname="w", headers=message.headers,
                body=message.body, decoded=False,
            )  # fmt: skip

            def away(*args: Any, **kwargs: Any) -> None:
                raise ConnectionError("the results are away")

            monkeypatch.setattr(app.backend, "mark_as_retry", away)
            with pytest.raises(ConnectionError):
                request._announce_cancelled()
            assert request.on_failure(lost()) is None
            assert not request.acknowledged
        assert bridge.celery.connection_for_read().default_channel.store.size("default") == 1
