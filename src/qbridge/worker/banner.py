"""What does a worker say about itself when it starts? Plain text: it ends in log files."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any
from urllib.parse import urlsplit

from qbridge import __version__
from qbridge.task import TaskDefinition

__all__ = ["banner", "signature_text"]

_POOLS = {"prefork": "process", "processes": "process", "thread": "thread", "solo": "solo"}
_MANY = 30
"""Tasks listed; the rest is counted."""


def banner(worker: Any) -> str:
    """Return the banner of a worker whose pool and queues are known.

    Args:
        worker: a ``celery.apps.worker.Worker``.

    Returns:
        A few lines: broker, results, queues, pool and tasks with their signatures.
    """
    app = worker.app
    pool = worker.pool_cls.__module__.rpartition(".")[2]
    if pool == "pools":  # ours: one module for all
        pool = "solo" if "Solo" in worker.pool_cls.__name__ else "thread"
    rows = [
        ("broker", app.connection_for_read().as_uri()),
        ("results", _results(app)),
        ("queues", ", ".join(sorted(app.amqp.queues.consume_from)) or "none"),
        ("pool", f"{_POOLS.get(pool, pool)} × {1 if pool == 'solo' else worker.concurrency}"),
        *_tasks(app),
    ]
    lines = [f"qbridge {__version__} worker {worker.hostname} (process {os.getpid()})"]
    lines += [f"  {label:<8} {value}" for label, value in rows]
    return "\n".join(lines)


def _results(app: Any) -> str:
    url = str(app.backend.as_uri())
    return "not kept" if urlsplit(url).scheme == "disabled" else url


def _tasks(app: Any) -> list[tuple[str, str]]:
    shown = []
    for name, task in sorted(app.tasks.items()):
        definition = getattr(task, "definition", None)
        if definition is not None:
            shown.append(f"{name}{signature_text(definition)}")
        elif not name.startswith("celery."):
            shown.append(f"{name} (untyped)")
    if len(shown) > _MANY:
        shown[_MANY:] = [f"and {len(shown) - _MANY} more"]
    if not shown:
        return [("tasks", "none: import their module, or name it in BridgeConfig(modules=[...])")]
    return [("tasks" if number == 0 else "", line) for number, line in enumerate(shown)]


def signature_text(definition: TaskDefinition) -> str:
    """Return the signature that callers see, with the short names of its types.

    Args:
        definition: of the task.

    Returns:
        Such as ``(order: Order, *, dpi: int = 96) -> Rendered``.
    """
    signature = inspect.signature(definition.function)
    parameters = list(signature.parameters.values())
    if definition.context:
        parameters = parameters[1:]
    shown = signature.replace(
        parameters=[
            parameter.replace(annotation=_Plain(parameter.annotation), default=_short_default(parameter.default))
            for parameter in parameters
        ],
        return_annotation=_Plain(signature.return_annotation),
    )
    return str(shown)


class _Plain:
    """An annotation that prints without the modules of its types, and without quotes."""

    def __new__(cls, annotation: Any) -> Any:
        return annotation if annotation is inspect.Signature.empty else super().__new__(cls)

    def __init__(self, annotation: Any) -> None:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        self._text = _QUALIFIED.sub(lambda found: found[1] or "", text)

    def __repr__(self) -> str:
        return self._text


class _Elided:
    def __repr__(self) -> str:
        return "…"


# A quoted text as it is, or the last part of a dotted name.
_QUALIFIED = re.compile(r"""('[^']*'|"[^"]*")|\b(?:[A-Za-z_]\w*\.)+""")


def _short_default(default: Any) -> Any:
    return default if default is inspect.Parameter.empty or len(repr(default)) <= 24 else _Elided()
