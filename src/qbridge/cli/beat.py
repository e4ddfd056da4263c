"""``qbridge beat``: who sends the periodic tasks?"""

from __future__ import annotations

import click

from qbridge.cli.loading import app_option, import_task_modules, load_bridge
from qbridge.cli.worker import LOG_LEVELS

__all__ = ["beat"]


@click.command()
@app_option()
@click.option("-s", "--schedule", metavar="FILE", help="Where Celery's beat keeps the times of the last runs.")
@click.option(
    "-l", "--loglevel", type=click.Choice(LOG_LEVELS, case_sensitive=False), default="info", show_default=True,
    help="What is logged.",
)  # fmt: skip
def beat(app: str, schedule: str | None, loglevel: str) -> None:
    """Send periodic tasks: Celery's beat; run one of it."""
    bridge = load_bridge(app)
    import_task_modules(bridge)
    celery = bridge.celery
    celery.set_default()
    entries = celery.conf.beat_schedule or {}
    click.echo(f"qbridge beat\n  broker   {bridge.config.broker.safe_url()}\n  entries  {len(entries)}\n")
    celery.Beat(loglevel=loglevel.upper(), schedule=schedule, quiet=True).run()
