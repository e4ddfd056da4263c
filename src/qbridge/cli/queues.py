"""``qbridge queues``: what waits where, and who takes it?"""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich import box
from rich.table import Table
from rich.text import Text

from qbridge.cli.depths import read_depths
from qbridge.cli.loading import app_option, import_task_modules, load_bridge
from qbridge.cli.screen import screen

__all__ = ["queues"]


@click.command()
@app_option()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--timeout", type=float, default=5.0, show_default=True, metavar="SECONDS", help="For the broker to answer."
)
def queues(app: str, as_json: bool, timeout: float) -> None:
    """List the queues: what waits, who consumes, dead letters.

    What a broker does not tell is left out: Redis knows no consumers, AMQP does not tell what workers hold.
    """
    bridge = load_bridge(app)
    import_task_modules(bridge)
    broker = bridge.config.broker
    depths = read_depths(bridge, timeout)
    used_by: dict[str, list[str]] = {}
    for task in bridge.tasks.values():
        used_by.setdefault(task.queue, []).append(task.name)
    if as_json:
        listed = [
            {
                **asdict(depth),
                "dead_letters": depths.dead.get(depth.name),
                "tasks": sorted(used_by.get(depth.name, [])),
            }
            for depth in depths.queues
        ]
        click.echo(json.dumps({"broker": broker.safe_url(), "queues": listed, "held": depths.held}, indent=2))
        return
    console = screen()
    told = broker.kind == "embedded"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("queue", overflow="fold")
    table.add_column("waiting", justify="right")
    if told:
        table.add_column("running", justify="right")
    if broker.kind != "redis":
        table.add_column("consumers", justify="right")
    if depths.dead:
        table.add_column("dead", justify="right")
    table.add_column("tasks", justify="right")
    table.add_column("", no_wrap=True)
    for depth in depths.queues:
        cells = [Text(depth.name), _number(depth.waiting)]
        if told:
            cells.append(_number(depth.running))
        if broker.kind != "redis":
            cells.append(_number(depth.consumers))
        if depths.dead:
            dead = depths.dead.get(depth.name)
            cells.append(Text(f"{dead:,}", style="bold red") if dead else _number(dead))
        stuck = depth.waiting and depth.consumers == 0
        note = "does not exist yet" if depth.waiting is None else "no worker consumes it" if stuck else ""
        style = "yellow" if stuck else "dim"
        table.add_row(*cells, str(len(used_by.get(depth.name, []))), Text(note, style=style))
    console.print(Text.assemble(("broker  ", "dim"), broker.safe_url()), soft_wrap=True)
    console.print()
    console.print(table)
    console.print()
    if depths.held:
        console.print(Text(f"Held by workers, of all queues in this Redis database: {depths.held}"))


def _number(value: int | None) -> Text:
    return Text("–", style="dim") if value is None else Text(f"{value:,}")
