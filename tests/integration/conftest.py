"""What the tests of single services share: a bridge on each broker in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge.testing.contracts.kit import Contract


@pytest.fixture(params=["rabbitmq", "redis", "embedded"])
def contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a broker that nobody has used before, and no worker yet; results in a file."""
    results = f"sqlite:///{tmp_path / 'results.db'}"
    if request.param == "embedded":
        contract = Contract(f"embedded://{tmp_path / 'bridge.db'}", results, tmp_path)
        yield contract
        contract.close()
        return
    server = request.getfixturevalue(f"qbridge_{request.param}")
    with server.heal().fresh() as url:
        contract = Contract(url, results, tmp_path)
        yield contract
        contract.close()
