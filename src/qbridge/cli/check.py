"""``qbridge check``: what is fine, what is not, and what is to be done?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click
from rich.console import Console
from rich.text import Text

from qbridge.backends.base import Finding
from qbridge.bridge import Bridge
from qbridge.cli.complaints import Complaint
from qbridge.cli.loading import app_option, import_task_modules, load_bridge
from qbridge.cli.screen import screen, symbol, visible
from qbridge.config.faults import faults_of
from qbridge.exceptions import ConfigurationError
from qbridge.report import Report

__all__ = ["check"]

_GROUPS = {"broker": "Broker", "results": "Results"}
_FIRST = "Configuration"
"""The group of all other codes."""


@click.command()
@app_option(required=False)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def check(app: str | None, as_json: bool) -> None:
    """Say what is fine, what is not, and what to do.

    Looks at the configuration and at the live servers, and changes nothing.
    Without -A the configuration comes from the environment and its files. The exit code is 0 if nothing is wrong.
    """
    bridge, found = _load(app)
    if bridge is not None:
        found += bridge.check().findings
    report = Report(tuple(found))
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _show(screen(), report.findings, _places(bridge))
    sys.exit(0 if report.ok else 1)


def _load(app: str | None) -> tuple[Bridge | None, list[Finding]]:
    """Return the bridge, or why there is none."""
    try:
        if app is None:
            return Bridge(), []
        bridge = load_bridge(app)
        import_task_modules(bridge)
    except ConfigurationError as error:
        return None, [
            Finding("error", "configuration.invalid", _described(fault.path, fault.source, fault.what), fault.todo)
            for fault in faults_of(error)
        ]
    except Complaint as complaint:
        if complaint.details:  # the module's own traceback
            click.echo(complaint.details, err=True)
        return None, [Finding("error", "application.import", complaint.what, complaint.todo)]
    return bridge, []


def _described(path: Sequence[str | int], source: str, what: str) -> str:
    place = ".".join(map(str, path))
    where = f"{place} ({source})" if place and source else place or source
    return f"{where}: {what}" if where else what


def _places(bridge: Bridge | None) -> dict[str, str]:
    if bridge is None:
        return {}
    return {"Broker": bridge.config.broker.safe_url(), "Results": bridge.config.results.safe_url()}


def _show(console: Console, findings: Sequence[Finding], places: dict[str, str]) -> None:
    groups: dict[str, list[Finding]] = {_FIRST: [], **{name: [] for name in places}}
    for finding in findings:
        groups.setdefault(_GROUPS.get(finding.code.partition(".")[0], _FIRST), []).append(finding)
    if not groups[_FIRST]:
        groups[_FIRST].append(Finding("ok", "configuration.valid", "no fault found"))
    for name, members in groups.items():
        heading = Text.assemble((name, "bold"), ("  " + places[name] if name in places else "", "dim"))
        console.print(heading, soft_wrap=True)
        for finding in members:
            _line(console, finding)
        console.print()
    _sum_up(console, findings)


def _line(console: Console, finding: Finding) -> None:
    sign = symbol(console, finding.level)
    indent = " " * (len(sign) + 3)
    _wrapped(console, Text.assemble("  ", sign, " ", visible(finding.what)), indent)
    if finding.level != "ok":
        for part in visible(finding.todo).splitlines():
            _wrapped(console, Text(f"{indent}{part}", style="dim" if finding.level == "info" else ""), indent)


def _wrapped(console: Console, text: Text, indent: str) -> None:
    """Print with a hanging indent on a terminal; in a pipe lines stay whole, for grep."""
    if not console.is_terminal:
        console.print(text, soft_wrap=True)
        return
    first, *rest = text.wrap(console, max(20, console.width - len(indent)))
    console.print(first)
    for line in rest:
        line.rstrip()
        console.print(Text(indent) + line)


def _sum_up(console: Console, findings: Sequence[Finding]) -> None:
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    counts = ((errors, "error"), (warnings, "warning"))
    counted = [f"{number} {word}{'s' if number > 1 else ''}" for number, word in counts if number]
    if errors:
        console.print(symbol(console, "error"), Text(", ".join(counted)))
    else:
        console.print(symbol(console, "ok"), Text(f"Nothing is wrong{f', {counted[0]}' if counted else ''}"))
