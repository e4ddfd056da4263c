"""``qbridge watch``: how far is this task, and how does it end?"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from qbridge.cli.loading import app_option, load_bridge
from qbridge.cli.screen import error_screen, screen, symbol, visible
from qbridge.context import Progress as Told
from qbridge.exceptions import QBridgeError, TaskFailed, TaskRevoked
from qbridge.result import TaskResult

__all__ = ["watch"]

_INTERVAL = 0.2
_FINAL = {"SUCCESS", "FAILURE", "REVOKED"}
_SHOWN = 2000
"""Characters of a result that are shown."""
_MEANING = {
    "PENDING": "no worker has said anything: it waits in its queue, or there is no such task",
    "STARTED": "running",
    "RETRY": "failed, and will be tried again",
}


@click.command()
@app_option()
@click.argument("task_id")
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop watching then, with exit code 3.")
def watch(app: str, task_id: str, timeout: float | None) -> None:
    """Follow a task to its end: state, progress, result.

    Exit code: 0 if it succeeded, 1 if it failed or was revoked, 3 if it had not ended in time.
    """
    bridge = load_bridge(app)
    with bridge:
        result = bridge.result(task_id)
        until = None if timeout is None else time.monotonic() + timeout
        console = screen()
        follow = _live if console.is_terminal else _lines
        if not follow(console, result, until):
            error_screen().print(Text(f"Still {result.state} after {timeout:g} s: watch it again, or wait longer."))
            sys.exit(3)
        sys.exit(_ending(console, result))


def _live(console: Console, result: TaskResult[Any], until: float | None) -> bool:
    """Draw until it ends; False if time is up."""
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False), console=console, transient=True,
    )  # fmt: skip
    with bars:
        bar = bars.add_task("PENDING", total=None, note="")
        while (state := result.state) not in _FINAL:
            told = result.progress()
            if told is None:
                bars.update(bar, description=state, note=_MEANING.get(state, ""))
            else:
                note = visible(told.note or "")
                bars.update(bar, description=state, completed=told.done, total=told.total or None, note=note)
            if until is not None and time.monotonic() > until:
                return False
            time.sleep(_INTERVAL)
    return True


def _lines(console: Console, result: TaskResult[Any], until: float | None) -> bool:
    """Print a line for each change until it ends; False if time is up."""
    before: tuple[str, Told | None] | None = None
    while (state := result.state) not in _FINAL:
        now = state, result.progress()
        if now != before:
            before = now
            console.print(Text(visible(_line(*now))), soft_wrap=True)
        if until is not None and time.monotonic() > until:
            return False
        time.sleep(_INTERVAL)
    return True


def _line(state: str, told: Told | None) -> str:
    if told is None:
        return f"{state}: {_MEANING[state]}" if state in _MEANING else state
    note = f" {told.note}" if told.note else ""
    return f"{state} {told.done:g}/{told.total:g} ({told.fraction:.0%}){note}"


def _ending(console: Console, result: TaskResult[Any]) -> int:
    try:
        value = result.get()
    except TaskRevoked as error:
        console.print(symbol(console, "error"), Text(visible(f"REVOKED: {error.what}")), soft_wrap=True)
        return 1
    except Exception as error:  # the task's own
        if isinstance(error, QBridgeError) and not isinstance(error, TaskFailed):
            raise
        name, text = type(error).__name__, str(error)
        if isinstance(error, TaskFailed):
            name, text = error.type_name, error.message
        console.print(symbol(console, "error"), Text(visible(f"FAILURE: {name}: {text}")), soft_wrap=True)
        return 1
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}… ({len(shown):,} characters)"
    console.print(symbol(console, "ok"), Text(visible(f"SUCCESS: {shown}")), soft_wrap=True)
    return 0
