"""The one config of a bridge: what can be said, where it may be said, and which choices do not work together."""

from __future__ import annotations

from qbridge.config.bridge_config import BridgeConfig
from qbridge.config.celery_names import known_settings
from qbridge.config.describe import FieldRow, describe
from qbridge.config.environment import conflicting_environment
from qbridge.config.models import QueueConfig, SerializationConfig, WorkerConfig
from qbridge.config.owned import owned_settings
from qbridge.config.raw_settings import overlay
from qbridge.config.suggest import closest, did_you_mean

__all__ = [
    "BridgeConfig",
    "FieldRow",
    "QueueConfig",
    "SerializationConfig",
    "WorkerConfig",
    "closest",
    "conflicting_environment",
    "describe",
    "did_you_mean",
    "known_settings",
    "overlay",
    "owned_settings",
]
