"""`qbridge tasks`: what it says about versions; the rest is tested with the real program."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbridge.cli import program

SHOP = """
from qbridge import Bridge, BridgeConfig

bridge = Bridge(BridgeConfig(broker="embedded:///nowhere/b.db", results="rpc://"))


@bridge.task(version=2)
def paint(width: int, height: int) -> str: ...


@bridge.task
def add(a: int, b: int) -> int: ...
"""


def test_a_version_is_shown_where_there_was_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it machines get the fingerprint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("shop_of_tasks.py").write_text(SHOP)
    shown = CliRunner().invoke(program, ["tasks", "-A", "shop_of_tasks"]).output
    assert "queue default  version 2  at least once" in shown
    assert "version 1" not in shown
    told = json.loads(CliRunner().invoke(program, ["tasks", "-A", "shop_of_tasks", "--json"]).output)["tasks"]
    sys.modules["shop_of_tasks"].bridge.close()  # a program that ends leaves that to its end
    assert [(task["version"], len(task["fingerprint"])) for task in told] == [(1, 12), (2, 12)]
