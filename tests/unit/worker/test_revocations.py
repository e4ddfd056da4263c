"""Does a worker know all that is revoked, and nothing for ever?"""

from __future__ import annotations

from datetime import timedelta
from itertools import count

import pytest

from qbridge.worker import revocations
from qbridge.worker.revocations import Revocations


def test_all_are_known_and_each_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learnt last stays; what is old goes, however many there are."""
    seconds = count()
    monkeypatch.setattr(revocations.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(revocations, "REVOKED_FOR", 1.0)
    known = Revocations(timedelta(seconds=2))
    known.learn(f"{number}" for number in range(60_000))
    known.learn(["0", "x"])
    assert "59999" in known
    known.learn([])
    assert "59999" in known
    known.learn([])
    assert "59999" not in known
    assert "0" in known
    assert "x" in known
    assert "never" not in known
