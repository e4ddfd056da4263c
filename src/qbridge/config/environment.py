"""Do Celery's own environment variables contradict the configuration?

Celery reads four variables whenever it looks at its URLs (``celery/app/utils.py``), and they beat even what the code
assigned. So a bridge whose configuration says otherwise does not start: it would speak to another server in silence.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qbridge.backends.base import Finding
from qbridge.config.rooms import BROKERS, RESULTS, Side
from qbridge.exceptions import ConfigurationError

if TYPE_CHECKING:
    from qbridge.config.bridge_config import BridgeConfig

__all__ = ["CELERY_VARIABLES", "conflicting_environment"]

#: Variable to the field that it would override.
CELERY_VARIABLES = {
    "CELERY_BROKER_URL": "broker",
    "CELERY_BROKER_READ_URL": "broker",
    "CELERY_BROKER_WRITE_URL": "broker",
    "CELERY_RESULT_BACKEND": "results",
}


def conflicting_environment(config: BridgeConfig) -> list[Finding]:
    """Name each of Celery's variables that says something else than the configuration.

    Args:
        config: the configuration.

    Returns:
        One finding of level ``"error"`` per variable; empty if none is set or all mean the same server.
    """
    return [
        Finding(
            "error",
            "environment.conflict",
            f"the environment variable {variable} is set to another server than the configuration's "
            f"{field}, and Celery would follow the variable",
            f"unset {variable}, or say it to qbridge: QBRIDGE_{field.upper()}",
        )
        for variable, field in CELERY_VARIABLES.items()
        if (url := os.environ.get(variable)) and not _same(url, getattr(config, field), _side(field))
    ]


def _side(field: str) -> Side:
    return BROKERS if field == "broker" else RESULTS


def _same(url: str, room: Any, side: Side) -> bool:
    if url == room.celery_url():
        return True
    try:
        other = side.from_url(url)
    except ConfigurationError:
        return False
    return bool(other.kind == room.kind and other.celery_url() == room.celery_url())
