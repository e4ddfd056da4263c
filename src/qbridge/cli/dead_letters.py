"""``qbridge dead-letters``: what did workers give up, why, and what is to become of it?"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

import click
from rich import box
from rich.table import Table
from rich.text import Text

from qbridge.bridge import Bridge
from qbridge.cli.complaints import PoliteGroup
from qbridge.cli.loading import app_option, give_app_to, load_with_tasks
from qbridge.cli.screen import error_screen, screen, visible
from qbridge.dead_letters import DeadLetter
from qbridge.dead_letters.letter import REASONS
from qbridge.exceptions import PayloadError

__all__ = ["dead_letters"]

F = TypeVar("F", bound=Callable[..., Any])

_WHOLE_LINES = 10_000
"""Columns of a pipe: no cell is folded there."""
_SHOWN = 2000
"""Characters of a body that are shown."""


def _filters(command: F) -> F:
    for option in (
        click.option("--task", metavar="NAME", help="Only those of this task."),
        click.option("--reason", type=click.Choice(REASONS), help="Only those given up for this reason."),
        click.option("--queue", "-q", metavar="NAME", help="Only those that came from this queue."),
    ):
        command = option(command)
    return command


@click.group("dead-letters", cls=PoliteGroup)
@app_option(required=False)
@click.pass_context
def dead_letters(context: click.Context, app: str | None) -> None:
    """See, replay and discard what workers gave up."""
    give_app_to(context, app, "list", "show", "replay", "discard")


@click.command("list")
@app_option()
@_filters
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The most that are listed.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(app: str, queue: str | None, reason: Any, task: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, oldest first, queue by queue; arguments are not shown."""
    with load_with_tasks(app) as bridge:
        letters = bridge.dead_letters.list(queue, limit=limit, reason=reason, task=task)
    if as_json:
        click.echo(json.dumps({"dead_letters": [_described(letter) for letter in letters]}, indent=2))
        return
    console = screen()
    if not letters:
        console.print("No dead letters.")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("id", "at", "queue", "reason", "task", "error"):
        table.add_column(name, overflow="fold", no_wrap=name == "id")
    for letter in letters:
        error = f"{letter.error_type}: {letter.error_text}".strip(": ")
        cells = (letter.id, _moment(letter.at), letter.queue, letter.reason, letter.task or "–", error[:200])
        table.add_row(*(Text(visible(" ".join(cell.split()))) for cell in cells))
    if not console.is_terminal:
        console.width = _WHOLE_LINES
    console.print(table)
    if len(letters) == limit:
        console.print(Text(f"There may be more: these are the first {limit}.", style="dim"))


@click.command()
@app_option()
@click.argument("id")
@click.option("--body", "-b", is_flag=True, help="Its body too: the arguments of the task.")
@click.option("--json", "as_json", is_flag=True, help="For machines; the body in base64.")
def show(app: str, id: str, body: bool, as_json: bool) -> None:  # noqa: A002 - click's name of the argument
    """Show one dead letter: why, where, when, its headers, on request its body."""
    with load_with_tasks(app) as bridge:
        letter = bridge.dead_letters.get(id)
    told = _described(letter)
    told["traceback"] = letter.traceback
    told["headers"] = {name: value for name, value in letter.headers.items() if body or not name.endswith("argsrepr")}
    told["properties"] = dict(letter.properties)
    if as_json:
        if body:
            told["body"] = base64.b64encode(letter.body).decode()
        click.echo(json.dumps(told, indent=2, default=repr))
        return
    console = screen()
    for name, value in told.items():
        if name in ("traceback", "headers", "properties"):
            continue
        console.print(
            Text.assemble((f"{name:<17} ", "dim"), "–" if value in (None, "") else visible(value)), soft_wrap=True
        )
    for name in ("headers", "properties"):
        console.print(Text(name, style="dim"))
        for key, value in told[name].items():
            console.print(Text(visible(f"  {key}: {value!r}")), soft_wrap=True)
    if letter.traceback:
        console.print(Text("traceback", style="dim"))
        console.print(Text(visible(letter.traceback.rstrip())), soft_wrap=True)
    if body:
        console.print(Text("body", style="dim"))
        console.print(Text(visible(_readable(letter))), soft_wrap=True)
    else:
        console.print(Text(f"The body ({len(letter.body):,} bytes) is shown with --body.", style="dim"))


@click.command()
@app_option()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "every", is_flag=True, help="All of them, of every queue.")
@click.option("--limit", type=click.IntRange(1), help="The most that are sent.")
@click.option("--rate", type=float, metavar="PER_SECOND", help="The most per second.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def replay(
    app: str, ids: tuple[str, ...], queue: str | None, reason: Any, task: str | None, every: bool, limit: int | None,
    rate: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Send dead letters to the queues that they came from: same task id, body and headers.

    A time at which a task was to expire is left out if it is over. Those that cannot be sent again are skipped, and
    told: the exit code is 1 then.
    """
    with load_with_tasks(app) as bridge:
        done: list[DeadLetter] = []
        skipped: dict[str, str] = {}

        def skip(letter: DeadLetter, error: PayloadError) -> None:
            skipped[letter.id] = str(error)

        for one in _queues(bridge, ids, queue, reason, task, every):
            left = None if limit is None else limit - len(done)
            if left != 0:
                done += bridge.dead_letters.replay(
                    ids or None, queue=one, reason=reason, task=task, limit=left, rate=rate, skipped=skip
                )
    _told(done, ids, "replayed", as_json, skipped)


@click.command()
@app_option()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "every", is_flag=True, help="All of them, of every queue.")
@click.option("--limit", type=click.IntRange(1), help="The most that are deleted.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="For machines; needs --yes unless ids are given.")
def discard(
    app: str, ids: tuple[str, ...], queue: str | None, reason: Any, task: str | None, every: bool, limit: int | None,
    yes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Delete dead letters, for good; asks first, unless ids are given."""
    with load_with_tasks(app) as bridge:
        chosen = _queues(bridge, ids, queue, reason, task, every)
        if not ids and not yes:
            if as_json:
                raise click.UsageError("--json does not ask: add --yes")
            click.confirm("Delete these dead letters for good?", abort=True)
        done: list[DeadLetter] = []
        for one in chosen:
            left = None if limit is None else limit - len(done)
            if left != 0:
                done += bridge.dead_letters.discard(ids or None, queue=one, reason=reason, task=task, limit=left)
    _told(done, ids, "discarded", as_json)


def _queues(
    bridge: Bridge, ids: tuple[str, ...], queue: str | None, reason: str | None, task: str | None, every: bool
) -> list[str | None]:
    """Return what to look through: one queue, any queue (None), or each in turn for --all."""
    filtered = bool(ids) or any(given is not None for given in (queue, reason, task))
    if every and filtered:
        raise click.UsageError("--all means all: leave out ids and filters, or leave out --all")
    if not every and not filtered:
        raise click.UsageError("say which: ids, --queue, --reason, --task, or --all")
    return [*sorted(bridge.celery.amqp.queues)] if every else [queue]


def _told(
    done: list[DeadLetter], ids: tuple[str, ...], verb: str, as_json: bool, skipped: Mapping[str, str] | None = None
) -> None:
    missing = sorted(set(ids) - {letter.id for letter in done})
    if as_json:
        told: dict[str, Any] = {verb: [_described(letter) for letter in done], "missing": missing}
        click.echo(json.dumps(told if skipped is None else {**told, "skipped": skipped}, indent=2))
    else:
        screen().print(f"{len(done):,} {verb}.")
        for one in missing:
            error_screen().print(Text(f"There is no dead letter {one}: look at the list."))
        for why in (skipped or {}).values():
            error_screen().print(Text(visible(f"Skipped: {why}")), soft_wrap=True)
    if missing or skipped:
        sys.exit(1)


def _described(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "queue": letter.queue,
        "reason": letter.reason,
        "task": letter.task,
        "task_id": letter.task_id,
        "version": letter.version,
        "fingerprint": letter.fingerprint,
        "error_type": letter.error_type,
        "error_text": letter.error_text,
        "attempts": letter.attempts,
        "crashes": letter.crashes,
        "first_at": None if letter.first_at is None else letter.first_at.isoformat(),
        "at": letter.at.isoformat(),
        "worker": letter.worker,
        "content_type": letter.content_type,
        "content_encoding": letter.content_encoding,
        "bytes": len(letter.body),
    }


def _moment(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _readable(letter: DeadLetter) -> str:
    try:
        text = letter.body.decode()
    except UnicodeDecodeError:
        text = repr(letter.body)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(letter.body):,} bytes)"


for _command in (list_, show, replay, discard):
    dead_letters.add_command(_command)
