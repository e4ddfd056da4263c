"""Which messages wait until no other worker has their task's claim?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qbridge import Bridge, BridgeConfig
from qbridge.dead_letters.letter import HEADER_UNSTORED_SINCE
from qbridge.standing import AGAIN, HEADER_ONCE, TOKEN
from qbridge.worker.claims import Claims


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    """Those of a worker of the embedded broker, which keeps no message of one run from another one."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"db+sqlite:///{tmp_path}/r.db")) as bridge:
        bridge.task(name="add")(lambda: None)
        yield Claims(SimpleNamespace(app=bridge.celery))


@pytest.mark.parametrize(
    ("waits", "headers", "info"),
    [
        (False, {}, {}),
        (False, {}, {"redelivered": True}),  # leased by the broker itself
        (True, {AGAIN: True}, {}),
        (False, {AGAIN: True, HEADER_UNSTORED_SINCE: 1.0}, {}),
        (True, {AGAIN: True, HEADER_ONCE: True}, {}),
        (True, {AGAIN: True, HEADER_ONCE: True, HEADER_UNSTORED_SINCE: 1.0}, {}),  # the other message may run
        (False, {HEADER_ONCE: True}, {}),
        (False, {AGAIN: True, HEADER_ONCE: True}, {TOKEN: 1}),  # has waited
    ],
)
def test_a_message_waits_if_another_one_of_its_task_may_run(
    claims: Claims, waits: bool, headers: dict[str, Any], info: dict[str, Any]
) -> None:
    """Of a key there may be two, also where one of them goes around because its outcome cannot be stored."""
    message = SimpleNamespace(delivery_info=info, headers={"task": "add", "id": "1", **headers})
    assert waits == claims.holds(message, lambda _: None)
