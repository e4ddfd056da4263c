"""Which commands does ``qbridge`` have? The program of the console script; each command is a module of its own."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from qbridge import __version__
from qbridge.cli.complaints import PoliteGroup
from qbridge.cli.screen import survive_any_encoding

__all__ = ["main", "program"]

_COMMANDS = {
    "demo": "qbridge.cli.demo.command",
    "worker": "qbridge.cli.worker",
    "beat": "qbridge.cli.beat",
    "check": "qbridge.cli.check",
    "tasks": "qbridge.cli.tasks",
    "schema": "qbridge.cli.schema",
    "queues": "qbridge.cli.queues",
    "dead-letters": "qbridge.cli.dead_letters",
    "watch": "qbridge.cli.watch",
    "keys": "qbridge.cli.keys",
}
"""Command → its module, in the order of the help; a module is imported when its command is asked for."""


class _Commands(PoliteGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name.replace("-", "_"))
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: qbridge demo",
)
@click.option("-A", "--app", metavar="MODULE[:BRIDGE]", help="The same as -A after the command's name.")
@click.version_option(__version__, "-V", "--version", message="qbridge %(version)s")
@click.pass_context
def program(context: click.Context, app: str | None) -> None:
    """Typed tasks over Celery: try them, run workers, look at what runs."""
    if app is not None:
        context.default_map = {name: {"app": app} for name in _COMMANDS if name not in ("demo", "keys")}


def main() -> None:
    """Run the program; the console script's entry point."""
    survive_any_encoding(sys.stdout, sys.stderr)
    program(prog_name="qbridge")
