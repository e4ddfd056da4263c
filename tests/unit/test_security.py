"""Whether the threat model names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_of_the_threat_model_exists() -> None:
    """A promise without a test is none; a test that was renamed takes its line with it."""
    named = set(re.findall(r"`(test_\w+)`", (TESTS.parent / "SECURITY.md").read_text()))
    found = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20
    assert set() == named - found
