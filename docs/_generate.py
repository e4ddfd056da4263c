"""Which pages of the documentation are made from the code? Written to ``_generated/`` at each build, never by hand.

The pages of the reference include them. A setting without a reason in ``_REASONS``, or a reason without a setting,
fails the build: the list of what ``defaults="safe"`` changes is closed. The fault
table is made from the last measurement.
"""

from __future__ import annotations

import csv
import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from celery.app.defaults import NAMESPACES, flatten

from qbridge import BridgeConfig, __version__, exceptions
from qbridge.backends.base import Broker, ResultBackend
from qbridge.celery_settings import app_settings
from qbridge.cli import program
from qbridge.config import owned_settings
from qbridge.config.describe import FieldRow, describe

_BROKERS = {
    "RabbitMQ, quorum queues": "amqp://localhost",
    "RabbitMQ, classic queues": {"kind": "rabbitmq", "queue_type": "classic"},
    "Redis": "redis://localhost",
    "embedded": "embedded://",
}
_RESULTS = {
    "rpc": "rpc://",
    "Redis": "redis://localhost",
    "database": "sqlite:///results.db",
    "none": "disabled://",
}

#: What `defaults="safe"` writes into Celery's settings, and why; the value "from" a field is the field's.
_REASONS = {
    "accept_content": "JSON, and the format of `serialization.format`; never pickle",
    "result_accept_content": "the same",
    "task_serializer": "from `serialization.format`",
    "result_serializer": "results are small and read by many: any peer can read JSON",
    "event_serializer": "likewise",
    "enable_utc": "times on the wire are unambiguous",
    "timezone": "from `timezone`",
    "task_create_missing_queues": "a name that nobody declared is a mistake, not a new queue that nobody consumes",
    "task_default_queue": "from `default_queue`",
    "imports": "from `modules`",
    "task_ignore_result": "where no results are kept, none are encoded",
    "task_publish_retry": "a message is sent again after a broken connection",
    "task_publish_retry_policy": "kombu's own retry: once, at once; the sender's go on until `publish_timeout`",
    "broker_url": "from `broker`",
    "broker_use_ssl": "from `broker.tls`",
    "broker_connection_retry": "connections are made again",
    "broker_connection_retry_on_startup": "a worker that starts before its broker waits for it",
    "broker_connection_max_retries": "for as long as it takes: the supervisor decides when to give up",
    "broker_connection_timeout": "from `broker.connect_timeout`, and never more than `publish_timeout`",
    "broker_channel_error_retry": "a channel that the broker closes does not end the worker",
    "broker_heartbeat": "from `broker.heartbeat`; none on a file",
    "broker_pool_limit": "connections for sending, for each process",
    "broker_pool_acquire_timeout": "Celery waits for ever for a free connection",
    "broker_transport_options": "a bound for every wait on a socket",
    "worker_consumer": "no message kills the worker; no mingle and no gossip",
    "worker_pool": "from `worker.pool`",
    "worker_concurrency": "from `worker.concurrency`",
    "worker_max_tasks_per_child": "from `worker.max_tasks_per_child`",
    "worker_max_memory_per_child": "from `worker.max_memory_per_child`",
    "worker_prefetch_multiplier": "from `worker.prefetch`: what a busy worker holds back, an idle one cannot take",
    "worker_soft_shutdown_timeout": "from `worker.shutdown_timeout`",
    "worker_cancel_long_running_tasks_on_connection_loss": "a run that will be delivered again is ended, not doubled",
    "worker_proc_alive_timeout": "a process of the pool is not killed because its parent did not hear it start",
    "worker_hijack_root_logger": "logging belongs to the application",
    "worker_redirect_stdouts": "so does standard output",
    "result_backend": "from `results`",
    "result_expires": "from `results.expires`",
    "result_persistent": "from `results.persistent`: results survive a restart of the broker",
    "result_backend_thread_safe": "one client for all threads; with rpc, one for each",
    "result_backend_transport_options": "a bound for every wait on the result backend",
    "result_backend_always_retry": "a result is stored again after an error",
    "result_backend_max_retries": "three times: Celery's default blocks a worker for as long as the server is away",
    "result_backend_base_sleep_between_retries_ms": "milliseconds",
    "result_backend_max_sleep_between_retries_ms": "milliseconds",
    "redis_socket_timeout": "from `results.socket_timeout`",
    "redis_socket_connect_timeout": "from `results.connect_timeout`",
    "redis_retry_on_timeout": "repeating is decided above",
    "redis_backend_health_check_interval": "seconds of silence after which a connection is tried before it is used",
    "redis_socket_keepalive": "a dead peer is noticed",
    "redis_backend_use_ssl": "from `results.tls`",
    "redis_username": "from `results.username`, with Sentinels",
    "redis_password": "from `results.password`, with Sentinels",
    "database_engine_options": "a bounded pool, and a bound for every wait",
    "database_create_tables_at_setup": "from `results.create_tables`",
    "database_table_names": "from `results.table_names`",
    "database_table_schemas": "from `results.table_schemas`",
}


def write_pages(docs: Path) -> None:
    """Write all generated pages; one that did not change is left alone, so that Sphinx reads only what is new.

    Args:
        docs: the folder of the documentation.
    """
    folder = docs / "_generated"
    folder.mkdir(exist_ok=True)
    with _no_settings():
        pages = {
            "configuration.md": configuration(),
            "cli.md": command_line(),
            "pairs.md": pairs(),
            "owned.md": owned(),
            "safe.md": safe(),
            "bounds.md": bounds(),
            "faults.md": faults(docs.parent / "bench" / "results" / f"faults-{__version__}.csv"),
        }
    for name, lines in pages.items():
        path, text = folder / name, "\n".join(lines) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


@contextmanager
def _no_settings() -> Iterator[None]:
    """An empty folder and no variable of ours: what is written must not depend on who builds."""
    ours = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("QBRIDGE_", "CELERY_"))}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.update(ours)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _prose(text: str) -> str:
    return text.replace("``", "`")


def configuration() -> Iterator[str]:
    """All fields with their environment variables, one table per model."""
    tables: dict[str, list[FieldRow]] = {}
    for row in describe():
        known = {other.path.rpartition(".")[2] for other in tables.get(row.model, [])}
        if row.path.rpartition(".")[2] not in known:  # TLS and Sentinel are parts of several models
            tables.setdefault(row.model, []).append(row)
    for model, rows in tables.items():
        yield from (f"## {model}", "")
        if model in ("TLS", "Sentinel"):
            yield from (f"For results: `results.{model.lower()}` and `QBRIDGE_RESULTS__{model.upper()}__…`.", "")
        yield from _rows(rows)


def _rows(rows: list[FieldRow]) -> Iterator[str]:
    yield from _table(
        ("field", "type", "default", "environment", "what"),
        (
            (
                _code(row.path),
                _code(row.type),
                _code(row.default) if row.default != "see description" else "see there",
                _code(row.environment),
                _prose(row.description),
            )
            for row in rows
        ),
    )


def command_line() -> Iterator[str]:
    """All commands with their options, from click."""
    context = click.Context(program, info_name="qbridge")
    for name, command in _commands(program, context):
        yield from (f"## qbridge {name}", "")
        usage = command.get_usage(click.Context(command, info_name=f"qbridge {name}"))
        yield from ("```text", " ".join(usage.removeprefix("Usage: ").split()), "```", "")
        yield from (inspect.cleandoc(command.help or "").replace("\b\n", ""), "")
        rows = [
            parameter.get_help_record(click.Context(command))
            for parameter in command.params
            if isinstance(parameter, click.Option)
        ]
        yield from _table(("option", "what"), ((_code(row[0]), row[1]) for row in rows if row is not None))


def _commands(group: click.Group, context: click.Context, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, context, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _broker(value: Any) -> Broker:
    return BridgeConfig(broker=value).broker


def _results_of(value: str) -> ResultBackend:
    return BridgeConfig(results=value).results


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def pairs() -> Iterator[str]:
    """What brokers, result backends and pairs can do, from their capabilities."""
    yield from ("## Brokers", "")
    brokers = {name: _broker(value).capabilities for name, value in _BROKERS.items()}
    yield from _table(
        ("broker", "priorities", "delays kept by the broker", "confirmed sends", "carries rpc results", "notes"),
        (
            (name, can.priorities, _yes(can.native_delays), _yes(can.publisher_confirms), _yes(can.rpc_results),
             "; ".join(can.notes))
            for name, can in brokers.items()
        ),
    )  # fmt: skip
    yield from ("## Result backends", "")
    results = {name: _results_of(value).capabilities for name, value in _RESULTS.items()}
    yield from _table(
        ("result backend", "readable in other processes, more than once", "progress", "chords", "claims", "notes"),
        (
            (
                name,
                _yes(can.readable_elsewhere),
                _yes(can.progress),
                _yes(can.chords),
                _yes(can.claims),
                "; ".join(can.notes),
            )
            for name, can in results.items()
        ),
    )
    yield from ("## Pairs", "")
    yield from _table(
        ("", *results),
        ((name, *(_pair(value, other) for other in _RESULTS.values())) for name, value in _BROKERS.items()),
    )


def _pair(broker: Any, results: str) -> str:
    try:
        config = BridgeConfig(broker=broker, results=results)
    except exceptions.ConfigurationError as error:
        return f"refused: {error.what}"
    can = config.results.capabilities
    words = [word for word, able in (("results", results != _RESULTS["none"]), ("progress", can.progress)) if able]
    return ", ".join([*words, *(["chords"] if can.chords else [])]) or "tasks only"


def owned() -> Iterator[str]:
    """The raw Celery settings that have a field, and the field."""
    yield from _table(("Celery setting", "field"), ((_code(k), _code(v)) for k, v in owned_settings().items()))


def safe() -> Iterator[str]:
    """The app-wide settings of ``defaults="safe"``: value, where, Celery's default, why."""
    defaults = dict(flatten(NAMESPACES))
    values: dict[str, dict[str, Any]] = {}
    tls = {"broker": {"kind": "rabbitmq", "tls": True}}
    worker = {"worker": {"concurrency": 4, "max_tasks_per_child": 100, "max_memory_per_child": 500_000}}
    tables = {"table_names": {"task": "t"}, "table_schemas": {"task": "s"}}
    sentinel = {"hosts": ["s"], "master_name": "m"}
    secure = {"kind": "redis", "tls": True, "sentinel": sentinel, "username": "u", "password": "p"}
    cases: dict[str, dict[str, Any]] = {
        **{f"broker {name}": {"broker": value, "results": "disabled://"} for name, value in _BROKERS.items()},
        **{f"results {name}": {"broker": "amqp://", "results": value} for name, value in _RESULTS.items()},
    }
    for name, fields in cases.items():
        for setting, value in app_settings(BridgeConfig(**fields)).items():
            values.setdefault(setting, {})[name] = value
    seldom: set[str] = set()
    for fields in (tls, worker, {"results": secure}, {"results": {"url": "sqlite:///r.db", **tables}}):
        seldom |= app_settings(BridgeConfig(**fields)).keys() - values.keys()
    _demand_reasons(values.keys() | seldom)
    rows = []
    for setting in sorted(_REASONS):
        found = values.get(setting, {})
        default = defaults[setting].default if setting in defaults else None
        rows.append((_code(setting), _value(setting, found), _code(repr(default)), _REASONS[setting]))
    yield from _table(("setting", "value", "Celery's default", "why"), rows)


def _demand_reasons(settings: Iterable[str]) -> None:
    written, explained = set(settings), set(_REASONS)
    if written != explained:
        raise RuntimeError(f"docs/_generate.py: _REASONS and what safe writes differ: {sorted(written ^ explained)}")


def _value(setting: str, found: dict[str, Any]) -> str:
    reason = _REASONS[setting]
    if not found:
        return "if the field is set"
    if reason.startswith("from `") and setting in ("broker_url", "result_backend"):
        return "the field's URL"
    distinct = {repr(value): value for value in found.values()}
    if len(distinct) > 1 or len(repr(next(iter(distinct.values())))) > 60:
        return "depends on the service"
    return _code(next(iter(distinct)))


#: Where the measurement of ``bench.bounds`` is kept, and the columns that it is shown in: faults that begin like this.
_BOUNDS = Path(__file__).parents[1] / "bench" / "results" / "bounds-0.1.0.csv"
_FAULTS = {
    "stopped": ("stopped",),
    "frozen": ("frozen", "locked"),
    "full": ("full", "disk full"),
    "restarted": ("restarted",),
    "cut off": ("cut off",),
}


def bounds() -> Iterator[str]:
    """Each call of the client: its bound, and the longest that it took under each fault, at any server."""
    with _BOUNDS.open(newline="", encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    rows = []
    for call in dict.fromkeys(row["call"] for row in measured):
        of_call = [row for row in measured if row["call"] == call]
        cells = []
        for beginnings in _FAULTS.values():
            times = [float(row["longest"]) for row in of_call if row["fault"].startswith(beginnings)]
            cells.append(f"{max(times):.1f}" if times else "")
        rows.append((_code(call), of_call[0]["promise"], f"{float(of_call[0]['bound']):g}", *cells))
    yield from _table(("call", "bound", "here", *_FAULTS), rows)


_SYSTEMS = {"qbridge": "qbridge", "celery": "Celery", "celery-late": "Celery, `acks_late`"}
_COUNTS = {
    "submitted": "submitted",
    "confirmed": "confirmed",
    "executed": "executed",
    "again": "cut short and begun again",
    "twice": "executed twice",
    "concurrently": "concurrently twice",
    "lost": "lost",
    "dead": "dead letters",
    "stuck": "stuck",
}
_RESUMES = {
    "worker": "worker killed",
    "child": "pool's process killed",
    "broker": "broker restarted",
    "freeze": "broker frozen for 30 s",
    "results": "result server restarted",
    "cut": "connections cut",
    "loss": "connections lost without a word",
    "stall": "connections stalled",
    "roll": "worker restarted (SIGTERM)",
}


def faults(path: Path) -> Iterator[str]:
    """The fault table, as it was measured; without a measurement, a sentence that says so."""
    if not path.exists():
        yield "There is no measurement of this version: `nox -s faults` makes one."
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    yield from ("### What became of the tasks", "")
    yield from _faults_table(rows, _COUNTS, "")
    yield from ("### Seconds until things went on, the longest of each cell", "")
    yield from _faults_table(rows, _RESUMES, "resume_")


def _faults_table(rows: Sequence[dict[str, str]], columns: Mapping[str, str], prefix: str) -> Iterator[str]:
    yield from _table(
        ("system", "broker", "results", "pool", *columns.values()),
        (
            (
                _SYSTEMS[row["system"]],
                row["broker"],
                row["results"],
                row["pool"],
                *(row[prefix + name] or "–" for name in columns),
            )
            for row in rows
        ),
    )
