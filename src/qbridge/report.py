"""What ``bridge.check()`` and ``qbridge check`` say: findings about configuration, broker and result backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qbridge.backends.base import Finding
from qbridge.config import BridgeConfig, QueueConfig, conflicting_environment
from qbridge.config.exposure import exposure

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The findings of one check, in the order in which they were made."""

    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, config: BridgeConfig, queues: Iterable[QueueConfig]) -> Report:
        """Look at a configuration and at the live servers that it names."""
        return cls(tuple(_look(config, list(queues))))

    @property
    def ok(self) -> bool:
        """True if nothing is wrong: no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``qbridge check --json`` prints."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def _look(config: BridgeConfig, queues: list[QueueConfig]) -> Iterator[Finding]:
    yield from config.findings
    yield from conflicting_environment(config)
    yield from exposure(config)
    plain = {"plain": True} if config.broker.kind == "rabbitmq" and config.defaults == "celery" else {}
    yield from config.broker.check(queues, **plain)
    yield from config.results.check()
