"""Which commands does ``qbridge`` have? The program of the console script; each command is a module of its own."""

from __future__ import annotations

import sys

import click

from qbridge import __version__
from qbridge.cli.beat import beat
from qbridge.cli.check import check
from qbridge.cli.complaints import PoliteGroup
from qbridge.cli.demo.command import demo
from qbridge.cli.queues import queues
from qbridge.cli.screen import survive_any_encoding
from qbridge.cli.tasks import tasks
from qbridge.cli.watch import watch
from qbridge.cli.worker import worker

__all__ = ["main", "program"]


@click.group(
    cls=PoliteGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: qbridge demo",
)
@click.option("-A", "--app", metavar="MODULE[:BRIDGE]", help="The same as -A after the command's name.")
@click.version_option(__version__, "-V", "--version", message="qbridge %(version)s")
@click.pass_context
def program(context: click.Context, app: str | None) -> None:
    """Typed tasks over Celery: try them, run workers, look at what runs."""
    if app is not None:
        context.default_map = {name: {"app": app} for name in ("worker", "beat", "check", "tasks", "queues", "watch")}


for command in (demo, worker, beat, check, tasks, queues, watch):
    program.add_command(command)


def main() -> None:
    """Run the program; the console script's entry point."""
    survive_any_encoding(sys.stdout, sys.stderr)
    program(prog_name="qbridge")
