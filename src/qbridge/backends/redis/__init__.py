"""The room of Redis: as a broker and as a result backend."""

from __future__ import annotations

from qbridge.backends.redis.broker import RedisBroker
from qbridge.backends.redis.results import RedisResults
from qbridge.backends.redis.server import Sentinel

__all__ = ["RedisBroker", "RedisResults", "Sentinel"]
