"""Does a probe find out what a worker wrote, and cost little?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qbridge.probe import fault_of, main


def test_a_probe_imports_next_to_nothing(tmp_path: Path) -> None:
    """Neither Celery nor pydantic nor typing: the start of the interpreter is what is left."""
    (tmp_path / "health").write_text('{"live": true, "ready": false, "reason": "it is starting", "at": 0}')
    look = "import sys; from qbridge.probe import main; main([sys.argv[1]]); print(*sorted(sys.modules))"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {look}", tmp_path / "health"]
    said, modules = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said.startswith("the worker has not written")
    assert not {"celery", "kombu", "pydantic", "click", "typing", "pathlib", "dataclasses"} & set(modules.split())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"live": true}', "cannot be read"),
        (None, "there is no"),
    ],
)
def test_what_no_worker_wrote_is_no_sign_of_life(tmp_path: Path, text: str | None, fault: str) -> None:
    """A file that cannot be read says what is wrong, and fails."""
    if text is not None:
        (tmp_path / "health").write_text(text)
    assert fault in fault_of(str(tmp_path / "health"), ready=False)
    assert main([str(tmp_path / "health")]) == 1


def test_a_wrong_question_is_told_from_a_sick_worker(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and how to ask."""
    assert main([]) == 2
    assert main(["--what"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m qbridge.probe FILE")
