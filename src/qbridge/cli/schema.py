"""``qbridge schema``: may the code of this checkout be deployed beside the code of before?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from qbridge.cli.complaints import CannotStart, PoliteGroup
from qbridge.cli.loading import app_option, give_app_to, load_with_tasks
from qbridge.cli.screen import screen, symbol
from qbridge.snapshots import Change, changes_since, read_snapshot, snapshot_of, snapshot_text

__all__ = ["schema"]

_DEFAULT = "qbridge-schema.json"
_STYLES = {"breaking": "red", "cannot tell": "yellow", "compatible": "green"}


@click.group("schema", cls=PoliteGroup)
@app_option(required=False)
@click.pass_context
def schema(context: click.Context, app: str | None) -> None:
    """Find changes of tasks that would break calls."""
    give_app_to(context, app, "snapshot", "check")


@click.command()
@app_option()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=_DEFAULT)
def snapshot(app: str, file: Path) -> None:
    """Write what the tasks take and return to a file (qbridge-schema.json), to be committed."""
    with load_with_tasks(app) as bridge:
        made = snapshot_of(bridge.tasks.values())
    try:
        file.write_text(snapshot_text(made), encoding="utf-8")
    except OSError as error:
        raise CannotStart(f"{file} cannot be written: {error.strerror}", "Name another file.") from None
    number = len(made["tasks"])
    screen().print(f"{file}: {number} task{'' if number == 1 else 's'}", soft_wrap=True)


@click.command()
@app_option()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=_DEFAULT)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def check(app: str, file: Path, as_json: bool) -> None:
    """Compare the tasks with the file; the exit code is 1 if calls or results of before would break."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}",
            "Make it, and commit it: qbridge schema snapshot",
        ) from None
    with load_with_tasks(app) as bridge:
        changes = changes_since(read_snapshot(text, str(file)), bridge.tasks.values())
    breaking = sum(change.breaks for change in changes)
    if as_json:
        click.echo(json.dumps({"ok": not breaking, "changes": [asdict(change) for change in changes]}, indent=2))
    else:
        _show(changes, breaking)
    sys.exit(1 if breaking else 0)


def _show(changes: list[Change], breaking: int) -> None:
    console = screen()
    if changes:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("task", "place", "change", "verdict"):
            table.add_column(name, overflow="fold", no_wrap=name == "verdict")
        for change in changes:
            verdict = Text(change.verdict, style=_STYLES[change.verdict])
            table.add_row(Text(change.task), Text(change.place), Text(change.what), verdict)
        console.print(table)
        console.print()
    for todo in dict.fromkeys(f"{change.task}: {change.todo}" for change in changes if change.breaks and change.todo):
        console.print(Text(todo), soft_wrap=True)
    level = "error" if breaking else "ok"
    said = f"{breaking} of {len(changes)} changes would break" if breaking else "Nothing would break"
    console.print(symbol(console, level), Text(said))


for _command in (snapshot, check):
    schema.add_command(_command)
