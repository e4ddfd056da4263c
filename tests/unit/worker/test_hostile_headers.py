"""What do hostile numbers and bodies of any type do to the parts of a worker that look at them?"""

from __future__ import annotations

import time
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from qbridge.worker.consumer import BridgeConsumer
from qbridge.worker.screening import fault_of
from qbridge.worker.unknown import UnknownTasks

HEADERS = {"task": "a", "id": "1"}


@pytest.mark.parametrize("limit", [10**400, 1e11, nan, -1, True, "1"])
def test_a_time_limit_that_no_clock_takes_is_a_fault(limit: Any) -> None:
    """The pool of processes adds it to the time of now, in the worker's loop."""
    assert "timelimit" in str(fault_of({**HEADERS, "timelimit": [limit, None]}))
    assert "timelimit" in str(fault_of({**HEADERS, "timelimit": [None, limit]}))


@pytest.mark.parametrize("limit", [None, 0, 1.5, 1e9, inf])
def test_other_time_limits_are_none(limit: Any) -> None:
    """Whatever a producer may send."""
    assert fault_of({**HEADERS, "timelimit": [limit, limit]}) is None


@pytest.mark.parametrize("since", [nan, inf, 10**400, -1, 1e12, "1", None])
def test_an_unknown_task_begins_to_wait_where_its_header_says_no_time(since: Any, monkeypatch: Any) -> None:
    """With one that is no number the end of its time never came."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr("qbridge.worker.unknown.put_off", lambda *args: sent.append(args[-1]) or True)
    consumer = SimpleNamespace(app=SimpleNamespace(unknown_task_grace=5.0), connection_errors=())
    message = SimpleNamespace(
        headers={**HEADERS, "qbridge_unknown_since": since},
        channel=SimpleNamespace(connection=1),
        ack_log_error=lambda *args: None,
    )
    assert UnknownTasks(consumer).put_back(message, lambda message: None)
    assert sent[0]["qbridge_unknown_since"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("body", [True, 5, None, 1.5, [1], {"a": 1}, "text", b"octets"])
def test_a_body_of_any_type_is_refused_once(body: Any) -> None:
    """What is said in the log comes after it has left its queue: else each start of a worker added a copy."""
    done: list[str] = []
    consumer: Any = SimpleNamespace(
        _kept=lambda *args: done.append("kept") or True,
        connection_errors=(),
    )
    message = SimpleNamespace(
        body=body, content_type="application/json", delivery_info={}, reject_log_error=lambda *args: done.append("gone")
    )
    BridgeConsumer.refuse(consumer, message, ValueError("no"))
    assert done == ["kept", "gone"]
