"""Does the reference's table of fields say everything?"""

from __future__ import annotations

import pytest

from qbridge.config import BridgeConfig, FieldRow, describe


def test_every_field_is_described() -> None:
    """Each row has a type and a description, and each field of the config a row."""
    rows = list(describe())
    assert set(BridgeConfig.model_fields) == {row.path for row in rows if "." not in row.path}
    assert [row for row in rows if not (row.description and row.type)] == []
    assert len({(row.path, row.model) for row in rows if row.model not in ("TLS", "Sentinel")}) == len(
        [row for row in rows if row.model not in ("TLS", "Sentinel")]
    )


def test_rows_read_like_python() -> None:
    """Types and defaults are written as one would write them."""
    rows = {row.path: row for row in describe()}
    assert rows["worker.concurrency"] == FieldRow(
        path="worker.concurrency",
        model="WorkerConfig",
        type="int | None",
        default="None",
        environment="QBRIDGE_WORKER__CONCURRENCY",
        description="Tasks that run at a time; unset: one per core.",
    )
    assert rows["worker.pool"].type == "'process' | 'thread' | 'solo'"
    assert rows["queues[].name"].environment == ""
    assert rows["broker.path"].default == "'.qbridge/bridge.db'"


def test_no_default_shows_a_secret() -> None:
    """Default passwords are masked."""
    assert {row.default for row in describe() if row.path.endswith("password")} <= {"'**'", "None"}


def test_every_environment_name_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name in the table would be refused as a stray one."""
    from qbridge.config.sources import _resolve
    from qbridge.config.tree import node_of_model

    for row in describe():
        if row.environment:
            path = tuple(row.environment.removeprefix("QBRIDGE_").lower().split("__"))
            assert _resolve(path, node_of_model(BridgeConfig)) is not None
