"""``qbridge worker``: which worker runs, with which pool, on which queues?"""

from __future__ import annotations

import sys
from typing import Any

import click
from celery import concurrency as pools
from celery.exceptions import ImproperlyConfigured
from celery.utils.nodenames import default_nodename, host_format

from qbridge.bridge import Bridge
from qbridge.cli.complaints import CannotStart
from qbridge.cli.loading import app_option, import_task_modules, load_bridge
from qbridge.cli.reload import run_and_reload
from qbridge.config import WorkerConfig
from qbridge.exceptions import ConfigurationError
from qbridge.worker.banner import banner
from qbridge.worker.main import refuse_unenforced_limits

__all__ = ["LOG_LEVELS", "worker"]

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_POOLS = {"process": "prefork", "thread": "threads", "solo": "solo"}


@click.command()
@app_option()
@click.option("-P", "--pool", type=click.Choice(tuple(_POOLS)), help="How tasks run beside one another.")
@click.option("-c", "--concurrency", type=click.IntRange(min=1), metavar="N", help="Tasks at a time.")
@click.option("-Q", "--queues", metavar="A,B", help="Consume these only; else all but those of remote tasks.")
@click.option(
    "-l", "--loglevel", type=click.Choice(LOG_LEVELS, case_sensitive=False), default="info", show_default=True,
    help="What is logged.",
)  # fmt: skip
@click.option("-n", "--name", metavar="NAME", help="Name of this worker; %h stands for the host.")
@click.option("--health-file", type=click.Path(dir_okay=False), metavar="FILE", help="Tell there how this worker is.")
@click.option("--health-port", type=click.IntRange(0, 65535), metavar="N", help="Answer /live and /ready over HTTP.")
@click.option("--health-host", metavar="ADDRESS", help="Address of that port.")
@click.option("--reload", is_flag=True, help="Restart when a .py file changes; for development only.")
def worker(
    app: str,
    pool: str | None,
    concurrency: int | None,
    queues: str | None,
    loglevel: str,
    name: str | None,
    health_file: str | None,
    health_port: int | None,
    health_host: str | None,
    reload: bool,
) -> None:
    """Run a worker in this process.

    What is not given comes from the configuration. SIGTERM gives running tasks the seconds
    of worker.shutdown_timeout to end; what runs longer goes back to its queue. A second one ends it.
    """
    if reload:
        sys.exit(run_and_reload(app, sys.argv))
    bridge = load_bridge(app)
    import_task_modules(bridge)
    given = {"health_file": health_file, "health_port": health_port, "health_host": health_host}
    _set_health(bridge, {name: value for name, value in given.items() if value is not None})
    try:
        program = _make(bridge, pool, concurrency, _names(bridge, queues), loglevel.upper(), name)
    except ImproperlyConfigured as error:
        raise CannotStart(" ".join(str(error).split())) from None
    click.echo(banner(program) + "\n")
    program.start()
    sys.exit(program.exitcode or 0)


def _make(
    bridge: Bridge, pool: str | None, concurrency: int | None, queues: list[str] | None, loglevel: str, name: str | None
) -> Any:
    if pool == "solo" and concurrency not in (None, 1):
        raise ConfigurationError(
            "the solo pool runs one task at a time", "Leave --concurrency out, or use --pool thread."
        )
    celery = bridge.celery
    pool_cls = pools.get_implementation(_POOLS[pool] if pool else celery.conf.worker_pool)
    if bridge.config.defaults == "safe":
        refuse_unenforced_limits(celery, pool_cls, queues)
    return celery.Worker(
        hostname=_hostname(name) if name else None,
        pool_cls=pool_cls,
        concurrency=concurrency,
        queues=queues,
        loglevel=loglevel,
        quiet=True,
    )


def _hostname(name: str) -> str:
    try:
        return str(host_format(default_nodename(name)))
    except ValueError:
        raise click.UsageError(
            f"-n {name!r} has a % that stands for nothing: %h is the host's name, %n the part before the @, %d the "
            "domain; write %% for the sign itself."
        ) from None


def _set_health(bridge: Bridge, given: dict[str, Any]) -> None:
    if not given:
        return
    if bridge.config.defaults == "celery":
        raise ConfigurationError(
            "health is told by qbridge's own worker, and defaults='celery' runs Celery's",
            "Leave --health-file and --health-port out, or write defaults='safe'.",
        )
    app: Any = bridge.celery
    app.worker_config = WorkerConfig(**{**app.worker_config.model_dump(), **given})


def _names(bridge: Bridge, queues: str | None) -> list[str] | None:
    if queues is None:
        return None
    names = [name.strip() for name in queues.split(",") if name.strip()]
    for name in names:
        bridge.check_queue(name)
    if not names:
        raise CannotStart(
            f"--queues {queues!r} names no queue",
            "Is a variable not set? Name queues, or leave --queues out: all are consumed then.",
        )
    return names
