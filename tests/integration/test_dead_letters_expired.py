"""What becomes of a task that has expired before a worker had it, where that is to be kept?"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from qbridge import TaskRevoked
from qbridge.testing.contracts.kit import Contract


@pytest.mark.parametrize("option", ["expires", "deadline"])
def test_what_expired_is_kept_where_that_was_asked_for(contract: Contract, option: str) -> None:
    """It is REVOKED, as ever, and a dead letter too; replayed, it runs. Without the setting it is REVOKED only."""
    keeping = contract.another_bridge(worker={"keep_expired": True})
    contract.declare_on(keeping)
    add: Any = contract.tasks.add
    late: dict[str, Any] = {option: timedelta(seconds=0.01)}
    kept = add.using(**late).delay(1, 2)
    with keeping.worker(pool="solo", queues=["default"]):
        with pytest.raises(TaskRevoked):
            kept.get(timeout=20)
        assert add.delay(3, 4).get(timeout=20) == 7
        [letter] = contract.bridge.dead_letters.list()
        assert (letter.reason, letter.task_id, letter.attempts) == ("expired", kept.id, 0)
        assert letter.body.startswith(b"[[1, 2], {}")
        contract.bridge.dead_letters.replay(letter.id)
        assert contract.bridge.result(kept.id, add).get(timeout=20) == 3
    gone = add.using(**late).delay(1, 2)
    with contract.bridge.worker(pool="solo", queues=["default"]), pytest.raises(TaskRevoked):
        gone.get(timeout=20)
    assert contract.bridge.dead_letters.list() == []
