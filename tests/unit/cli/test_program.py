"""The program without processes: names, help, complaints, and what importing costs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from qbridge import __version__
from qbridge.cli import program
from qbridge.cli.complaints import CannotStart, Complaint, complaint_about
from qbridge.cli.screen import SYMBOLS, symbol, visible
from qbridge.cli.watch import _ending
from qbridge.exceptions import BrokerUnavailable, UnknownQueueError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_importing_qbridge_imports_no_command_line() -> None:
    """Nor click, nor rich; and the version is told without loading Celery."""
    code = "import sys, qbridge; print([m for m in ('click', 'rich', 'qbridge.cli', 'celery') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, qbridge.cli; print('celery' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_command_has_a_line_of_help_that_fits() -> None:
    """The list of commands is not cut off in 80 columns."""
    shown = CliRunner().invoke(program, ["--help"], env={"COLUMNS": "80"}).output
    for name in ("demo", "worker", "beat", "check", "tasks", "schema", "queues", "dead-letters", "watch"):
        assert f"\n  {name} " in shown
        assert CliRunner().invoke(program, [name, "--help"]).exit_code == 0
    assert "..." not in shown.partition("Commands:")[2]


def test_a_misspelt_command_suggests_the_right_one() -> None:
    """click-didyoumean."""
    done = CliRunner().invoke(program, ["chek"])
    assert done.exit_code == 2
    assert "check" in done.output
    assert CliRunner().invoke(program, ["--version"]).output == f"qbridge {__version__}\n"


def test_check_reads_the_configuration_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without -A; nothing is made by looking."""
    done = CliRunner().invoke(program, ["check", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["ok"] is True
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.setenv("QBRIDGE_BROKER", "redis://:pw1234@host/x")
    done = CliRunner().invoke(program, ["check"])
    assert done.exit_code == 1
    assert "broker (environment variable QBRIDGE_BROKER)" in done.output
    assert "pw1234" not in done.output


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("level", list(SYMBOLS))
def test_symbols_fit_the_output(level: str, encoding: str) -> None:
    """A word stands for the sign where the output cannot show it."""
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    symbol(console, level).plain.encode(encoding)


def test_errors_become_complaints_with_an_exit_code() -> None:
    """What happened and what to do, 2 for what cannot work as configured, 1 for what failed."""
    wrong = complaint_about(UnknownQueueError("no queue 'x' is declared", "Did you mean 'y'?"))
    assert isinstance(wrong, CannotStart)
    assert (wrong.what, wrong.todo, wrong.exit_code) == ("no queue 'x' is declared", "Did you mean 'y'?", 2)
    assert complaint_about(BrokerUnavailable("gone")).exit_code == 1


def test_a_complaint_shows_details_first(capsys: pytest.CaptureFixture[str]) -> None:
    """So that the message is the last thing on the screen; markup in it is text."""
    Complaint("it [bold]broke[/bold]", "Mend it.", details="Traceback …").show()
    assert capsys.readouterr().err == "Traceback …\n✗ it [bold]broke[/bold].\n  Mend it.\n"


def test_texts_of_others_do_not_command_the_terminal() -> None:
    """Escape sequences, a change of direction and what cannot be encoded are shown as what they are."""
    assert visible("\x1b[31mred\x07\x9b1m\u202e\udce9\r\x00") == r"\x1b[31mred\x07\x9b1m\u202e\udce9\r\x00"
    assert visible("Zeile\n\tzwei: é 中 😀") == "Zeile\n\tzwei: é 中 😀"
    console = Console(file=io.StringIO(), force_terminal=True)
    _ending(console, _Failed())  # type: ignore[arg-type]
    assert "\x1b]0" not in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "FAILURE: ValueError: \\x1b]0;title" in console.file.getvalue()  # type: ignore[attr-defined]


class _Failed:
    """A result, as far as the end of ``watch`` looks at it."""

    def get(self) -> None:
        raise ValueError("\x1b]0;title")
