"""``qbridge tasks``: which tasks are there, what do they take and give, and under which policies do they run?"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import click
from rich.text import Text

from qbridge.bridge import Bridge
from qbridge.cli.loading import app_option, import_task_modules, load_bridge
from qbridge.cli.screen import screen
from qbridge.retry import Retry
from qbridge.task import Task
from qbridge.worker.banner import signature_text

__all__ = ["tasks"]


@click.command()
@app_option()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def tasks(app: str, as_json: bool) -> None:
    """List the tasks with their signatures, queues and policies."""
    bridge = load_bridge(app)
    import_task_modules(bridge)
    described = [_described(bridge, task) for _, task in sorted(bridge.tasks.items())]
    if as_json:
        click.echo(json.dumps({"tasks": described}, indent=2))
        return
    console = screen()
    for number, task in enumerate(described):
        if number:
            console.print()
        line = Text.assemble((task["name"], "bold"), (task["signature"], "cyan"))
        console.print(line, soft_wrap=not console.is_terminal)
        console.print(Text(f"  {'  '.join(_policies(task))}", style="dim"), soft_wrap=not console.is_terminal)
    if not described:
        console.print("No tasks: decorate functions with @bridge.task, and import their modules.")


def _described(bridge: Bridge, task: Task[Any, Any]) -> dict[str, Any]:
    definition = task.definition
    options = definition.options
    expires = options.get("expires")
    return {
        "name": task.name,
        "signature": signature_text(definition),
        "version": task.version,
        "fingerprint": task.fingerprint,
        "queue": task.queue,
        "async": definition.is_async,
        "remote": definition.remote,
        "delivery": options.get("delivery") or bridge.config.delivery,
        "retry": _retry(options.get("retry", bridge.config.retry)),
        "time_limit": options.get("time_limit"),
        "soft_time_limit": options.get("soft_time_limit"),
        "rate_limit": options.get("rate_limit"),
        "expires": expires.total_seconds() if isinstance(expires, timedelta) else expires,
        "priority": options.get("priority"),
        "results": options.get("results", bridge.config.results.kind != "none"),
    }


def _retry(policy: Retry | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    on = policy.on if isinstance(policy.on, tuple) else (policy.on,)
    return {
        "on": [getattr(error, "__name__", "a function") for error in on],
        "attempts": policy.attempts if policy.bounded else None,
        "timeout": _seconds(policy.timeout),
        "wait_initial": _seconds(policy.wait_initial),
        "wait_max": _seconds(policy.wait_max),
        "where": policy.where,
    }


def _seconds(value: float | timedelta | None) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _policies(task: dict[str, Any]) -> list[str]:
    found = [f"queue {task['queue']}"]
    if task["version"] > 1:
        found.append(f"version {task['version']}")
    if task["remote"]:
        return [*found, "remote: it runs elsewhere"]
    found += ["async"] if task["async"] else []
    found.append(task["delivery"].replace("_", " "))
    retry = task["retry"]
    if retry is not None:
        found.append(f"{retry['attempts'] or 'any number of'} attempts on {', '.join(retry['on'])}")
    for name, word in (("time_limit", "limit"), ("soft_time_limit", "soft limit"), ("expires", "expires after")):
        if task[name] is not None:
            found.append(f"{word} {task[name]:g} s")
    if task["rate_limit"] is not None:
        found.append(f"rate {task['rate_limit']}")
    if task["priority"] is not None:
        found.append(f"priority {task['priority']}")
    if not task["results"]:
        found.append("no results")
    return found
