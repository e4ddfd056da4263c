"""The demo tells the same true story on every broker × result backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_demo_is_true_on_this_pair(broker_url: str, results_url: str, tmp_path: Path) -> None:
    """Exit code 0 means that everything it showed was compared and true."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QBRIDGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "qbridge", "demo", "--broker", broker_url, "--results", results_url],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓") >= 7
    assert list(tmp_path.iterdir()) == []
